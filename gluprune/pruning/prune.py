"""`prune`: score, select and narrow the MLPs of a loaded model, all or nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, TypeAlias

import torch

from gluprune.calibration.collect import calibrate_in_passes
from gluprune.calibration.statistics import LayerStatistics, Statistics
from gluprune.io.progress import progress
from gluprune.models.consumers import sizes_of
from gluprune.models.glu import GLU, count_parameters, model_glus, text_configs
from gluprune.models.widths import check_layers, set_config_widths
from gluprune.models.wrappers import unwrapped
from gluprune.pruning.checks import check_prunable, check_statistics, common_width
from gluprune.pruning.compensate import refitted_down, replace_down
from gluprune.pruning.history import calibration_entry, prune_step, record
from gluprune.pruning.narrow import narrow
from gluprune.pruning.recipe import Recipe
from gluprune.pruning.report import PruneReport
from gluprune.pruning.scores import Score, score_layer
from gluprune.pruning.widths import planned_widths, select, target_width
from gluprune.runtime.patching import realign

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@torch.inference_mode(False)  # inference tensors could not be trained afterwards
@torch.no_grad()
def prune(
    model: PreTrainedModel,
    *,
    expansion_ratio: float | None = None,
    pruning_ratio: float | None = None,
    intermediate_size: int | None = None,
    score: str | Score = "maw_gud",
    multiple_of: int = 128,
    deploy: str | None = None,
    calibration: Iterable | Statistics | None = None,
    compensate: bool = False,
    allocation: str = "uniform",
    layers: Sequence[int] | None = None,
) -> PruneReport:
    """Remove the neurons of lowest score from the GLU MLPs of a Hugging Face causal LM, in place, all or nothing.

    Gate and up lose rows (and bias entries), down loses columns. `out_features`, `in_features`, `mlp.intermediate_size`
    and the config are updated, so `model.save_pretrained` writes a stock checkpoint. Parameter objects stay the same;
    their stale gradients are dropped. An optimizer created before keeps state of the former shapes: create a new one.
    If anything fails, every tensor, attribute and config value is restored.

    Memory above the model itself stays below the MLP weights of one layer. Calibration adds the memory that
    `calibrate_in_passes` describes, `compensate` adds a copy of the narrowed down projections.

    The selection of *Fragile Knowledge, Robust Instruction-Following* (arXiv 2512.22671) is
    `prune(model, pruning_ratio=p, score="maw", multiple_of=1)`, which keeps `I - int(p * I)` neurons.

    Args:
        model: A causal LM of a family in `gluprune.models.families.FAMILIES`, or a vision-language model with such a
            text part, which is pruned. Compiled models and PEFT models with merged adapters are unwrapped.
        expansion_ratio: Intermediate size divided by hidden size. Exactly one of the three targets must be given.
        pruning_ratio: Share of the neurons to remove, between 0 and 1.
        intermediate_size: Number of neurons to keep.
        score: How neurons are ranked. From the weights: "maw_gud" (peak-to-peak magnitude of gate, up and down), "maw"
            (= "ppm": gate and up only, the criterion of the paper), "vow", "pon", "l2". With calibration data:
            "activation", "hybrid" and "surgeon", which also runs the model backward. Or a callable that takes gate
            `[I, H]`, up `[I, H]` and down `[H, I]` and returns `[I]`; higher is kept.
        multiple_of: The width is rounded to the nearest multiple. 128 keeps rows aligned for fast loads; 1 is exact.
        deploy: Where the model will run: "transformers", "vllm", "tp2", "tp4", "tp8" (ranks of tensor parallelism),
            "fp8", "awq", "gptq" or "llama.cpp". Widths become multiples of what it needs as well; layers that it would
            refuse are an error (`gluprune.models.consumers`).
        calibration: Needed by calibrated scores, `compensate` and `allocation`; an error if nothing uses it. Batches
            as `gluprune.calibrate` takes them, or the `Statistics` that it returned.
        compensate: Refit the down projections to the kept neurons by least squares (`gluprune.pruning.compensate`).
        allocation: "uniform" gives every layer the same width. "sensitivity" takes the width as the mean, and gives
            every layer the width at which the total loss rises least, as measured for `score="surgeon",
            compensate=True` one layer at a time (`gluprune.calibration.sensitivity`), shrunk towards one width the more
            is pruned (`gluprune.pruning.widths.shrunk_costs`). It needs `Statistics` of `calibrate(...,
            sensitivity=True)`.
        layers: Indices of the layers to prune; None means all. If layers end up with different widths, the saved
            checkpoint loads with `gluprune.load`, and stock `from_pretrained` raises.

    Returns:
        A `PruneReport`.

    Raises:
        ValueError: An unknown or unsuitable value, which the message names; the model is unchanged.
        TypeError: An argument of the wrong type; the model is unchanged.

    Example:
        >>> import gluprune
        >>> model = gluprune.load(model_path)
        >>> report = gluprune.prune(model, pruning_ratio=0.25)
        >>> report.intermediate_size, report.original_intermediate_size
        (384, 512)
    """
    recipe = Recipe(score, compensate, allocation, multiple_of=multiple_of, deploy=deploy)
    needs = recipe.needs
    recipe.check_data([] if calibration is None else ["calibration"], "calibration data: give calibration=")
    model = unwrapped(model)
    glus = model_glus(model)
    indices = check_layers(layers, len(glus))
    check_prunable(model, glus, indices)
    present = [glu.intermediate_size for glu in glus]
    original = common_width(present, indices)
    width = target_width(
        original,
        glus[0].hidden_size,
        expansion_ratio=expansion_ratio,
        pruning_ratio=pruning_ratio,
        width=intermediate_size,
        multiple_of=recipe.width_multiple,
    )
    if needs.calibration and isinstance(calibration, Statistics):
        check_statistics(calibration, present, indices, recipe, lambda index: glus[index].down.weight)
    widths = planned_widths(present, indices, recipe, calibration, width=width, **sizes_of(model.config))
    choices = _choices(glus, _activations(model, glus, indices, calibration, recipe), widths, recipe)
    if needs.calibration:  # text runs through the whole model: everything is chosen before anything is changed
        choices = iter(list(progress(choices, desc="scoring", unit="layer", total=len(indices))))
    parameters = count_parameters(model)
    trained = any(weight.grad is not None for index in indices for weight in glus[index].mlp.parameters())
    with ExitStack() as undo:
        kept = _narrow_all(model, glus, progress(choices, desc="narrowing", unit="layer", total=len(indices)), undo)
        report = PruneReport(
            kept=kept,
            widths=widths,
            intermediate_size=width,
            original_intermediate_size=original,
            hidden_size=glus[0].hidden_size,
            parameters=count_parameters(model),
            original_parameters=parameters,
            score=recipe.score_name,
            multiple_of=recipe.width_multiple,
            deploy=recipe.deploy,
        )
        undo.pop_all()
    if trained:
        logger.warning("create a new optimizer: one created before pruning keeps state of the former shapes")
    realign(glus[index].mlp for index in indices)
    record(model, prune_step(report, recipe, calibration_entry(calibration) if needs.calibration else None))
    return report


# Layer index, the neurons that the layer keeps, and its refitted down projection or None.
Choice: TypeAlias = tuple[int, torch.Tensor, torch.Tensor | None]


def _narrow_all(
    model: PreTrainedModel, glus: list[GLU], choices: Iterable[Choice], undo: ExitStack
) -> dict[int, torch.Tensor]:
    """Narrow the chosen layers and write the widths into the config. Return the kept neurons of every layer."""
    kept = {}
    for index, neurons, down in choices:
        narrow(glus[index], neurons, undo)
        if down is not None:
            replace_down(glus[index].down, down, undo)
        kept[index] = neurons
    for config in text_configs(model):
        undo.callback(_restore_attributes, config, dict(vars(config)))
        set_config_widths(config, [glu.intermediate_size for glu in glus])
    return kept


def _activations(
    model: PreTrainedModel,
    glus: list[GLU],
    layers: Sequence[int],
    calibration: Iterable | Statistics | None,
    recipe: Recipe,
) -> Iterator[tuple[int, LayerStatistics | None]]:
    """Yield the index of every layer with its statistics, or with None if the recipe needs none."""
    needs = recipe.needs
    if calibration is None or not needs.calibration:
        yield from ((index, None) for index in layers)
    elif isinstance(calibration, Statistics):
        for index in layers:
            yield index, calibration.layers[index].to(glus[index].down.weight.device)
    else:
        yield from calibrate_in_passes(
            model, calibration, gram=needs.gram, sensitivity=needs.sensitivity, layers=layers
        )


def _choices(
    glus: list[GLU],
    activations: Iterator[tuple[int, LayerStatistics | None]],
    widths: dict[int, int],
    recipe: Recipe,
) -> Iterator[Choice]:
    """Choose the neurons of one layer after the other."""
    for index, found in activations:
        kept = select(score_layer(recipe.score, glus[index], index, found), widths[index])
        down = None
        if recipe.compensate:
            assert found is not None and found.gram is not None
            down = refitted_down(glus[index].weights()[2], kept, found.gram, f"layer {index}")
        yield index, kept, down


def _restore_attributes(owner: object, before: dict) -> None:
    vars(owner).clear()
    vars(owner).update(before)
