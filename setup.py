"""Three packages in one distribution.

`csrc_triton` holds the kernels and knows no model, `gluprune` is the library, `gluprune_evals` (in the folder evals)
evaluates pruned models.
"""

from setuptools import setup

setup()
