"""Save and load whole checkpoints: a saved checkpoint appears only when it is complete."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from gluprune.io.atomic import complete_folder
from gluprune.io.hub import first_line
from gluprune.models.families import family_of
from gluprune.models.glu import model_glus, resize, text_configs
from gluprune.models.widths import layer_widths, set_config_widths

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def save(model: PreTrainedModel, destination: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    """Write a model and its tokenizer as a stock checkpoint; the folder appears only when it is complete.

    Args:
        model: A causal LM, pruned and patched or not.
        destination: A folder that does not exist or is empty.
        tokenizer: Anything with `save_pretrained`.

    Returns:
        The folder.

    Raises:
        ValueError: The destination exists and is not empty.
        OSError: A file cannot be written; the message names it.

    Example:
        >>> import gluprune
        >>> model = gluprune.load(model_path)
        >>> report = gluprune.prune(model, pruning_ratio=0.25)
        >>> path = gluprune.save(model, folder / "saved")
    """
    with complete_folder(destination) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return Path(destination)


def load(path: str | Path, **kwargs) -> PreTrainedModel:
    """Load a causal LM, including one with layers of different widths.

    A checkpoint with one width loads as with `AutoModelForCausalLM.from_pretrained`. For layers of different widths
    (`prune(..., layers=...)` or `allocation="sensitivity"`), for which stock Llama classes raise, the model is built
    and each MLP gets its width before the weights are read.

    Args:
        path: A folder or a Hub id.
        **kwargs: Passed on to `from_pretrained` (dtype, device_map, revision, ...).

    Returns:
        The model, of the stock transformers class.

    Raises:
        ValueError: There is no model at `path`, or its family is not supported.

    Example:
        >>> import gluprune
        >>> model = gluprune.load(model_path)
        >>> type(model).__name__
        'LlamaForCausalLM'
    """
    of_the_hub = ("revision", "cache_dir", "token", "subfolder", "local_files_only")
    hub = {key: kwargs[key] for key in of_the_hub if key in kwargs}
    config = read_config(path, trust_remote_code=kwargs.get("trust_remote_code", False), **hub)
    family_of(config)
    if len(set(layer_widths(config))) == 1:
        return _auto_class(config).from_pretrained(path, config=config, **kwargs)
    model_class = _model_class(config)
    model = model_class.from_pretrained(path, config=config, **kwargs)
    model.__class__ = stock_class(config)
    return model


def read_config(path: str | Path, **kwargs) -> PreTrainedConfig:
    """Return the config of a model folder or Hub id.

    Raises:
        ValueError: There is no readable model config at `path`.
    """
    try:
        return AutoConfig.from_pretrained(path, **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is neither a model folder nor a reachable Hub id: {first_line(error)}") from error


def build_empty(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model of a config on the meta device: shapes and dtypes without memory.

    Raises:
        ValueError: The model type is not supported.
    """
    family_of(config)
    with torch.device("meta"):
        return _model_class(config)._from_config(config, dtype=config.dtype or torch.float32)


def _auto_class(config: PreTrainedConfig) -> Any:
    """Return the class of transformers that loads whole models: with the vision part, where there is one."""
    is_composite = config.get_text_config() is not config
    return AutoModelForImageTextToText if is_composite else AutoModelForCausalLM


def stock_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class of transformers for the whole model of a config.

    Raises:
        ValueError: transformers has no class for whole models of this type.
    """
    mapping: Any = _auto_class(config)._model_mapping
    if type(config) not in mapping:
        raise ValueError(f"model type {config.model_type!r} is not supported: transformers has no class that generates")
    return mapping[type(config)]


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the stock causal LM class, or a subclass that gives every MLP its width while the model is built."""
    stock = stock_class(config)
    widths = layer_widths(config)
    if len(set(widths)) == 1:
        return stock

    def build(self, config, *args, **options):
        text = config.get_text_config()
        set_config_widths(text, [max(widths)] * len(widths))
        stock.__init__(self, config, *args, **options)
        for own in (text, *text_configs(self)):
            set_config_widths(own, widths)
        for glu, width in zip(model_glus(self), widths, strict=True):
            resize(glu, width)

    # transformers renames the tensors of a checkpoint only for classes of its modules.
    return type(stock.__name__, (stock,), {"__init__": build, "__module__": stock.__module__})
