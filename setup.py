"""Two packages in one distribution: `csrc_triton` (kernels, know no model) and `gluprune` (the library)."""

from setuptools import setup

setup()
