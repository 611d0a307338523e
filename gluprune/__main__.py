"""`python -m gluprune`: the command line."""

import sys

from gluprune.cli.main import main

sys.exit(main())
