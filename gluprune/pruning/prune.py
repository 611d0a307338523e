"""`prune`: score, select and narrow the MLPs of a loaded model, all or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from gluprune.calibration.sensitivity import removed_counts
from gluprune.calibration.statistics import LayerStatistics, Statistics, calibrate_in_passes
from gluprune.models.families import GLU, model_glus
from gluprune.pruning.compensate import replace_down, resolved_down
from gluprune.pruning.narrow import narrow, set_config_widths
from gluprune.pruning.scores import CALIBRATED_SCORES, STATIC_SCORES, Score, calibrated_score, static_score
from gluprune.pruning.widths import select, shrunk_costs, target_width, widths_by_cost

ALLOCATIONS = ("uniform", "sensitivity")


@dataclass(frozen=True)
class PruneReport:
    """What `prune` did.

    kept: layer index -> int64 `[widths[layer]]`, the neurons that stayed, ascending.
    widths: layer index -> neurons it has.
    intermediate_size, original_intermediate_size: neurons that were asked for, on the average where layers differ, and
        that a pruned layer had.
    hidden_size: H.
    parameters, original_parameters: of the whole model, tied weights counted once.
    score: name of the criterion.
    """

    kept: dict[int, torch.Tensor]
    widths: dict[int, int]
    intermediate_size: int
    original_intermediate_size: int
    hidden_size: int
    parameters: int
    original_parameters: int
    score: str

    @property
    def expansion_ratio(self) -> float:
        return self.intermediate_size / self.hidden_size

    @property
    def pruning_ratio(self) -> float:
        return 1 - self.intermediate_size / self.original_intermediate_size

    def to_dict(self) -> dict:
        """Everything as plain numbers, strings and lists (ready for JSON)."""
        return {
            "score": self.score,
            "intermediate_size": self.intermediate_size,
            "original_intermediate_size": self.original_intermediate_size,
            "widths": self.widths,
            "hidden_size": self.hidden_size,
            "expansion_ratio": self.expansion_ratio,
            "pruning_ratio": self.pruning_ratio,
            "parameters": self.parameters,
            "original_parameters": self.original_parameters,
            "kept": {layer: kept.tolist() for layer, kept in self.kept.items()},
        }

    def __str__(self) -> str:
        narrowest, widest = min(self.widths.values()), max(self.widths.values())
        spread = "" if narrowest == widest else f" on the average, {narrowest} to {widest} in a layer"
        return (
            f"{self.original_intermediate_size} -> {self.intermediate_size} neurons in {len(self.widths)} layers{spread}"
            f" (expansion ratio {self.expansion_ratio:.2f}, {self.pruning_ratio:.1%} pruned, score {self.score});"
            f" {self.original_parameters:,} -> {self.parameters:,} parameters"
        )


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _address_range(parameter: torch.Tensor) -> tuple[int, int]:
    extent = 1 + sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride()))
    return parameter.data_ptr(), parameter.data_ptr() + extent * parameter.element_size()


def check_prunable(model: nn.Module, glus: list[GLU], layers: Sequence[int]) -> None:
    """Refuse what cannot be narrowed: projections that are no plain linear layers, absent or shared weights."""
    for index in layers:
        for name, projection in glus[index].projections.items():
            label = f"layer {index}, {name}"
            if type(projection) is not nn.Linear:
                raise ValueError(
                    f"{label} is {type(projection).__name__}, not nn.Linear: quantized or adapted projections cannot be"
                    " pruned (dequantize, or merge the adapter, first)"
                )
            weight = projection.weight
            if weight.device.type == "meta":
                raise ValueError(f"{label} is on the meta device: load the weights before pruning")
            if type(weight) is not nn.Parameter or type(weight.data) is not torch.Tensor:
                raise ValueError(
                    f"{label}.weight is {type(weight).__name__}, not a plain parameter: quantized or sharded weights"
                    " cannot be pruned"
                )
            if not weight.is_floating_point() or weight.element_size() < 2:
                raise ValueError(f"{label}.weight has dtype {weight.dtype}: allowed are bf16, fp16, fp32 and fp64")

    # Two parameters must not share memory with an MLP's: narrowing one would leave the other behind.
    projections = [projection for index in layers for projection in glus[index].projections.values()]
    pruned = {id(parameter) for projection in projections for parameter in projection.parameters()}
    ranges = sorted(
        (str(parameter.device), *_address_range(parameter), name, id(parameter))
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.device.type != "meta" and parameter.numel()
    )
    last = ("", 0, 0, "", 0)
    for current in ranges:
        (device, start, stop, name, identity), (last_device, _, end, owner, owner_id) = current, last
        if device == last_device and start < end and (identity in pruned or owner_id in pruned):
            raise ValueError(f"{owner} and {name} share memory: tied or shared MLP weights cannot be pruned")
        if device != last_device or stop > end:
            last = current


def check_layers(layers: Sequence[int] | None, count: int) -> list[int]:
    if layers is None:
        return list(range(count))
    layers = list(layers)
    if not layers:
        raise ValueError("layers is empty: give at least one layer index, or None for all")
    for index in layers:
        if isinstance(index, bool) or not isinstance(index, int):
            raise TypeError(f"layers must hold integers, got {index!r}")
        if not 0 <= index < count:
            raise ValueError(f"layer index {index} is out of range: the model has layers 0 to {count - 1}")
        if layers.count(index) > 1:
            raise ValueError(f"layer index {index} is given twice")
    return sorted(layers)


def score_layer(score: str | Score, glu: GLU, index: int, activations: LayerStatistics | None = None) -> torch.Tensor:
    weights = glu.weights()
    if callable(score):
        values = score(*weights)
    elif score in CALIBRATED_SCORES:
        values = calibrated_score(score, *weights, activations)
    else:
        values = static_score(score, *weights)
    expected = (glu.intermediate_size,)
    if not isinstance(values, torch.Tensor) or values.shape != expected:
        found = list(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        raise ValueError(f"the score of layer {index} must be a tensor of shape {list(expected)}, got {found}")
    values = values.detach().float().cpu()
    if values.isnan().any():
        raise ValueError(f"the score of layer {index} has {int(values.isnan().sum())} NaN of {len(values)} values")
    return values


def what_needs_calibration(score: str | Score, compensate: bool, allocation: str) -> str:
    """The first argument that needs calibration data, as a caller writes it; empty where none does.

    Raises:
        ValueError: unknown allocation.
    """
    if allocation not in ALLOCATIONS:
        raise ValueError(f"unknown allocation {allocation!r}: allowed are {', '.join(ALLOCATIONS)}")
    if not callable(score) and score in CALIBRATED_SCORES:
        return f"score={score!r}"
    if compensate:
        return "compensate=True"
    return "allocation='sensitivity'" if allocation == "sensitivity" else ""


def needs_sensitivity(score: str | Score, allocation: str) -> bool:
    """Whether statistics without sensitivities do not do."""
    return score == "surgeon" or allocation == "sensitivity"


def check_statistics(
    statistics: Statistics, widths: Sequence[int], layers: Sequence[int], gram: bool, sensitivity: bool
) -> None:
    """The statistics are of the model whose layers have these widths.

    Raises:
        ValueError: a layer is missing or has another width, or `gram` or `sensitivity` is asked for and missing.
    """
    for index in layers:
        if index not in statistics.layers:
            raise ValueError(f"the calibration statistics have no layer {index}: they have {list(statistics.layers)}")
        layer = statistics.layers[index]
        if len(layer.squares) != widths[index]:
            raise ValueError(
                f"layer {index} has {widths[index]} neurons, its calibration statistics are of {len(layer.squares)}:"
                " statistics are of the model before it is pruned"
            )
        if gram and layer.gram is None:
            raise ValueError("compensate=True needs statistics with Gram matrices: calibrate(..., gram=True)")
        if sensitivity and layer.costs is None:
            raise ValueError(
                "score='surgeon' and allocation='sensitivity' need statistics with sensitivities:"
                " calibrate(..., sensitivity=True)"
            )


def allocated_widths(
    allocation: str,
    statistics: Iterable | Statistics | None,
    layers: Sequence[int],
    intermediate_size: int,
    width: int,
    multiple_of: int,
) -> dict[int, int]:
    """Layer index -> number of neurons that stay, `width` on the average.

    Raises:
        ValueError: "sensitivity" without statistics or with a width too small for it.
    """
    if allocation == "uniform":
        return dict.fromkeys(layers, width)
    if not isinstance(statistics, Statistics):
        raise ValueError(
            "allocation='sensitivity' needs Statistics, which know all layers: calibration=calibrate(..., sensitivity=True)"
        )
    costs = shrunk_costs([statistics.layers[index].costs for index in layers], width / intermediate_size)
    removed = removed_counts(intermediate_size)
    return dict(zip(layers, widths_by_cost(costs, removed, intermediate_size, width, multiple_of=multiple_of)))


def _activations(
    model: nn.Module,
    glus: list[GLU],
    layers: Sequence[int],
    calibration: Iterable | Statistics,
    gram: bool,
    sensitivity: bool,
) -> Iterator[tuple[int, LayerStatistics]]:
    if not isinstance(calibration, Statistics):
        yield from calibrate_in_passes(
            model, calibration, gram=gram or sensitivity, sensitivity=sensitivity, layers=layers
        )
        return
    for index in layers:
        yield index, calibration.layers[index].to(glus[index].down.weight.device)


def _restore_attributes(owner: object, before: dict) -> None:
    vars(owner).clear()
    vars(owner).update(before)


@torch.no_grad()
def prune(
    model: nn.Module,
    *,
    expansion_ratio: float | None = None,
    pruning_ratio: float | None = None,
    intermediate_size: int | None = None,
    score: str | Score = "maw",
    multiple_of: int = 128,
    calibration: Iterable | Statistics | None = None,
    compensate: bool = False,
    allocation: str = "uniform",
    layers: Sequence[int] | None = None,
) -> PruneReport:
    """Remove the neurons of lowest score from the GLU MLPs of a Hugging Face causal LM, in place, all or nothing.

    Gate and up lose rows (and bias entries), down loses columns; `out_features`, `in_features`,
    `mlp.intermediate_size` and the config follow, so `model.save_pretrained` writes a stock checkpoint. Parameter
    objects stay the same, their stale gradients are dropped. Memory above the model itself stays under one layer's MLP
    weights; calibration adds what `calibrate_in_passes` says, `compensate` the narrowed down projections once more. If
    anything fails, every tensor, attribute and config value is as it was.

    The selection of *Fragile Knowledge, Robust Instruction-Following* (arXiv 2512.22671) is
    `prune(model, pruning_ratio=p, score="maw", multiple_of=1)`, which keeps `I - int(p * I)` neurons.

    Args:
        model: a causal LM of a family in `gluprune.models.families.FAMILIES`.
        expansion_ratio: intermediate size over hidden size. Exactly one of the three targets must be given.
        pruning_ratio: share of the neurons to remove, between 0 and 1.
        intermediate_size: neurons to keep.
        score: "maw" (= "ppm"), "maw_gud", "vow", "pon", "l2"; with calibration data also "activation", "hybrid" and
            "surgeon", which runs the model backward, too; or a callable that takes gate `[I, H]`, up `[I, H]` and
            down `[H, I]` and returns `[I]`, higher is kept.
        multiple_of: the width is rounded to the nearest multiple. 128 keeps rows aligned for fast loads; 1 is exact.
        calibration: text for the calibrated scores and for `compensate`, otherwise not looked at: an iterable of int
            tensors of token ids `[B, S]`, of dicts with `input_ids` and maybe `attention_mask` (0 is padding and left
            out) or of tuples of the two, such as a DataLoader; or the `Statistics` that `calibrate` collected from it.
        compensate: re-solve the down projections for the neurons that stay (`gluprune.pruning.compensate`).
        allocation: "uniform" gives every layer the width asked for; "sensitivity" gives it to the average layer, and
            every layer the width at which the loss of the whole model suffers least in total, as measured for
            `score="surgeon", compensate=True` one layer at a time (`gluprune.calibration.sensitivity`) and drawn towards one width
            the more neurons go (`gluprune.pruning.widths.shrunk_costs`). It needs `Statistics` of
            `calibrate(..., sensitivity=True)`.
        layers: indices of the layers to prune; None means all. Where layers end up with different widths, the
            saved checkpoint loads with `gluprune.load`, and stock `from_pretrained` raises.

    Returns:
        A `PruneReport`.

    Raises:
        ValueError: see the message; the model is unchanged.
        TypeError: an argument of the wrong type; the model is unchanged.
    """
    if not callable(score) and score not in (*STATIC_SCORES, *CALIBRATED_SCORES):
        allowed = ", ".join([*STATIC_SCORES, *CALIBRATED_SCORES])
        raise ValueError(f"unknown score {score!r}: allowed are {allowed} or a callable")
    if not isinstance(compensate, bool):
        raise TypeError(f"compensate must be True or False, got {compensate!r}")
    calibrated = what_needs_calibration(score, compensate, allocation)
    if calibrated and calibration is None:
        raise ValueError(f"{calibrated} needs calibration data: give calibration=")
    sensitivity = needs_sensitivity(score, allocation)
    glus = model_glus(model)
    indices = check_layers(layers, len(glus))
    check_prunable(model, glus, indices)
    before = {glus[index].intermediate_size for index in indices}
    if len(before) > 1:
        raise ValueError(f"the chosen layers have different widths {sorted(before)}: prune them in separate calls")
    original, hidden_size = before.pop(), glus[0].hidden_size
    width = target_width(
        original,
        hidden_size,
        expansion_ratio=expansion_ratio,
        pruning_ratio=pruning_ratio,
        width=intermediate_size,
        multiple_of=multiple_of,
    )
    if calibrated and isinstance(calibration, Statistics):
        check_statistics(calibration, [glu.intermediate_size for glu in glus], indices, compensate, sensitivity)
    widths = allocated_widths(allocation, calibration, indices, original, width, multiple_of)

    original_parameters = count_parameters(model)
    if calibrated:
        activations = _activations(model, glus, indices, calibration, compensate, sensitivity)
    else:
        activations = ((index, None) for index in indices)

    def choices() -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None]]:
        """Layer, neurons that stay, and the re-solved down projection of each layer in turn."""
        for index, found in activations:
            kept = select(score_layer(score, glus[index], index, found), widths[index])
            down = resolved_down(glus[index].weights()[2], kept, found.gram, f"layer {index}") if compensate else None
            yield index, kept, down

    progress = {"total": len(indices), "unit": "layer", "disable": None, "leave": False}
    # Text runs through the whole model: all is chosen before anything is changed. Without it, a layer is narrowed while
    # scoring has it in the cache.
    chosen = list(tqdm(choices(), "scoring", **progress)) if calibrated else choices()
    all_kept = {}
    with ExitStack() as undo:
        for index, kept, down in tqdm(chosen, "narrowing", **progress):
            narrow(glus[index], kept, undo)
            if down is not None:
                replace_down(glus[index].down, down, undo)
            all_kept[index] = kept
        config = model.config.get_text_config()
        undo.callback(_restore_attributes, config, dict(vars(config)))
        set_config_widths(config, [glu.intermediate_size for glu in glus])
        report = PruneReport(
            kept=all_kept,
            widths=widths,
            intermediate_size=width,
            original_intermediate_size=original,
            hidden_size=hidden_size,
            parameters=count_parameters(model),
            original_parameters=original_parameters,
            score=score if isinstance(score, str) else getattr(score, "__name__", type(score).__name__),
        )
        undo.pop_all()
    for index in indices:  # a patched MLP moves its new weights into aligned storage when its mode is set
        glus[index].mlp.train(glus[index].mlp.training)
    return report
