"""Three packages in one distribution: `csrc_triton` (kernels, know no model), `gluprune` (the library) and `evals` (the study)."""

from setuptools import setup

setup()
