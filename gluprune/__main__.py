"""`python -m gluprune`: the command line."""

import sys

from gluprune.cli import main

sys.exit(main())
