"""Prune a checkpoint on disk, tensor by tensor, without building the model: using the memory of one layer's MLP.

The shards are copied one after the other, block by block, and MLP tensors are narrowed on the way. A layer is scored
when its first tensor is written. The output equals pruning in memory and saving. Scores that need calibration data, and
the refitted down projections, are computed from a file of statistics (`gluprune calibrate`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from gluprune.checkpoints.plan import CheckpointReport, make_plan
from gluprune.checkpoints.write import write_plan
from gluprune.io.folder import check_destination, check_outside, complete_folder
from gluprune.io.hub import local_folder
from gluprune.pruning.recipe import SCORES, Recipe


def prune_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    expansion_ratio: float | None = None,
    pruning_ratio: float | None = None,
    intermediate_size: int | None = None,
    score: str = "maw_gud",
    multiple_of: int = 128,
    deploy: str | None = None,
    layers: Sequence[int] | None = None,
    statistics: str | Path | None = None,
    compensate: bool = False,
    allocation: str = "uniform",
    dry_run: bool = False,
    resume: bool = False,
) -> CheckpointReport:
    """Prune a safetensors checkpoint on disk into a new one, without building the model.

    Every tensor equals, byte for byte, the result of `load`, `prune` with the same arguments, and `save`. Shards keep
    their names. Tokenizer, chat template and other files are copied; weights of other formats are not. Memory: the
    projections of one layer that the score uses, plus half of that for output that waits to be written.

    The destination appears when everything is on disk. After a failure, finished shards stay in a hidden folder
    `.<destination>.<key>.partial` next to it, for `resume`.

    Args:
        source: A model folder, or a Hub id, which is downloaded first. It is never written to.
        destination: A folder that does not exist or is empty, outside the source.
        expansion_ratio: As in `prune`.
        pruning_ratio: As in `prune`.
        intermediate_size: As in `prune`.
        score: The name of a score, as in `prune`.
        multiple_of: As in `prune`.
        deploy: As in `prune`.
        layers: As in `prune`.
        statistics: File of statistics of this model (`Statistics.save`, `gluprune calibrate`), for calibrated scores,
            `compensate` and `allocation`; an error otherwise. One layer of it is read at a time.
        compensate: Refit the down projections, as in `prune`. This needs statistics with Gram matrices, and a few
            float32 matrices `[I, I]` in addition to the memory given above.
        allocation: "uniform" or "sensitivity", as in `prune`.
        dry_run: Check headers and arguments and return the report; no weight is read, nothing is written.
        resume: Continue an interrupted run with the same source and arguments. Without it, start from the beginning.

    Returns:
        A `CheckpointReport`.

    Raises:
        ValueError: Bad arguments, a corrupt or unsupported checkpoint, or a source that changes during the run.
        TypeError: An argument of the wrong type.
        OSError: A file cannot be read or written (a full disk, for example); the message names it.

    Example:
        >>> import gluprune
        >>> report = gluprune.prune_checkpoint(model_path, folder / "pruned", pruning_ratio=0.25)
        >>> model = gluprune.load(folder / "pruned")
    """
    if not isinstance(score, str) or score not in SCORES:
        raise ValueError(f"unknown score {score!r}; allowed for a checkpoint on disk: {', '.join(SCORES)}")
    recipe = Recipe(score, compensate, allocation, multiple_of=multiple_of, deploy=deploy)
    recipe.check_data([] if statistics is None else ["statistics"], "calibration statistics: give statistics=")
    if dry_run and resume:
        raise ValueError("dry_run=True writes nothing, so there is nothing to continue: remove resume=True")
    check_outside(destination, source)
    check_destination(destination)
    folder = local_folder(source)
    plan = make_plan(
        folder,
        recipe,
        target={"expansion_ratio": expansion_ratio, "pruning_ratio": pruning_ratio, "width": intermediate_size},
        layers=layers,
        statistics=None if statistics is None else Path(statistics).absolute(),
    )
    if dry_run:
        return plan.report
    with complete_folder(destination, plan.key, resume=resume) as output:
        kept = write_plan(plan, output)
        if plan.key_now() != plan.key:
            raise ValueError(f"{folder}{f' or {statistics}' if statistics else ''} changed while it was read")
    return replace(plan.report, kept=kept)
