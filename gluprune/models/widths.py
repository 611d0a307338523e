"""Indices and intermediate sizes of layers; only this module knows how a transformers config stores the sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def layer_widths(config: PreTrainedConfig) -> list[int]:
    """Return the intermediate size of every layer."""
    text = config.get_text_config()
    if not getattr(text, "is_heterogeneous", False):
        return [text.intermediate_size] * text.num_hidden_layers
    return [layer.intermediate_size for layer in text.per_layer_config]


def width_entries(widths: Sequence[int]) -> dict[str, object]:
    """Return the config entries for the widths of all layers: `intermediate_size` and `per_layer_config`.

    `intermediate_size` is the largest width. `per_layer_config` holds the layers that differ from it, in the form of
    transformers, or is None. `gluprune.load` reads it; stock Llama classes cannot build such a model.

    Args:
        widths: Intermediate size of every layer, in order.
    """
    others = {index: {"intermediate_size": width} for index, width in enumerate(widths) if width != max(widths)}
    return {"intermediate_size": max(widths), "per_layer_config": others or None}


def with_widths(entries: Mapping[str, object], widths: Sequence[int]) -> dict[str, object]:
    """Return the entries of a config file with the widths of all layers; without `per_layer_config` if all are equal.

    Args:
        entries: The entries of the text part.
        widths: Intermediate size of every layer, in order.
    """
    written = {**entries, **width_entries(widths)}
    return {key: value for key, value in written.items() if key != "per_layer_config" or value is not None}


def widths_after(before: Sequence[int], pruned: Mapping[int, int]) -> list[int]:
    """Return the intermediate size of every layer once the layers of `pruned` have its widths."""
    return [pruned.get(index, width) for index, width in enumerate(before)]


def set_config_widths(config: PreTrainedConfig, widths: Sequence[int]) -> None:
    """Write the widths of all layers into a transformers text config, in place."""
    # While layers differ, a guard hides `intermediate_size`; this removes it.
    config.per_layer_config = None
    for key, value in width_entries(widths).items():
        setattr(config, key, value)


def check_layers(layers: Iterable[int] | None, count: int) -> list[int]:
    """Return layer indices in ascending order; None means all of `count` layers.

    Raises:
        ValueError: No index, an index out of range or given twice.
        TypeError: Not a list, or an index that is not an integer.
    """
    if layers is None:
        return list(range(count))
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise TypeError(f"layers must be a list of layer indices, got {layers!r}")
    given = list(layers)
    if not given:
        raise ValueError("layers is empty: give at least one layer index, or None for all")
    for index in given:
        if isinstance(index, bool) or not isinstance(index, Integral):
            raise TypeError(f"layers must hold integers, got {index!r}")
        if not 0 <= index < count:
            raise ValueError(f"layer index {index} is out of range: the model has layers 0 to {count - 1}")
        if given.count(index) > 1:
            raise ValueError(f"layer index {index} is given twice")
    return sorted(map(int, given))
