"""`gluprune info`."""

from __future__ import annotations

import json

from gluprune.cli.options import Json, Model, Quiet, Verbose

EXAMPLES = ("gluprune info meta-llama/Llama-3.2-1B",)


def run(model: Model, *, as_json: Json = False, verbose: Verbose = False, quiet: Quiet = False) -> None:
    """Show widths, sizes and where a model can run.

    Widths, ratios, parameters, bytes, alignment, the programs that take these widths, and where the checkpoint comes
    from, read from the config and the headers of the files.
    """
    from gluprune.checkpoints.info import info

    description = info(model)
    print(json.dumps(description.to_dict()) if as_json else description)
