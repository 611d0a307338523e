"""Save and load whole checkpoints: a saved one appears only when it is complete."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from gluprune.io.atomic import complete_folder
from gluprune.models.families import family_of, model_glus
from gluprune.pruning.narrow import resize, set_config_widths


def save(model: PreTrainedModel, destination: str | Path, tokenizer=None) -> Path:
    """Write a model (and its tokenizer) as a stock checkpoint; the folder appears only when it is complete.

    Args:
        model: a causal LM, pruned and patched or not.
        destination: a folder that does not exist or is empty.
        tokenizer: anything with `save_pretrained`.

    Raises:
        ValueError: the destination exists and is not empty.
    """
    with complete_folder(destination) as folder:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return Path(destination)


def read_config(path: str | Path, **kwargs) -> PreTrainedConfig:
    """The config of a model folder or Hub id.

    Raises:
        ValueError: there is no readable model config at `path`.
    """
    try:
        return AutoConfig.from_pretrained(path, **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is neither a model folder nor a reachable Hub id: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def layer_widths(config: PreTrainedConfig) -> list[int]:
    """Intermediate size of every layer, also where layers differ."""
    text = config.get_text_config()
    if not getattr(text, "is_heterogeneous", False):
        return [text.intermediate_size] * text.num_hidden_layers
    return [layer.intermediate_size for layer in text.per_layer_config]


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The stock causal LM class, or a subclass of it that gives every MLP its own width while it is built."""
    stock = AutoModelForCausalLM._model_mapping[type(config)]
    widths = layer_widths(config)
    if len(set(widths)) == 1:
        return stock

    def build(self, config, *args, **options):
        text = config.get_text_config()
        set_config_widths(text, [max(widths)] * len(widths))
        stock.__init__(self, config, *args, **options)
        set_config_widths(text, widths)
        for glu, width in zip(model_glus(self), widths):
            resize(glu, width)

    return type(stock.__name__, (stock,), {"__init__": build})


def build_empty(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config on the meta device: shapes and dtypes without memory.

    Raises:
        ValueError: the model type is not supported.
    """
    family_of(config)
    with torch.device("meta"):
        return _model_class(config)._from_config(config, dtype=config.dtype or torch.float32)


def load(path: str | Path, **kwargs) -> PreTrainedModel:
    """Load a causal LM, layers of different widths included.

    A checkpoint with one width loads just as with `AutoModelForCausalLM.from_pretrained`. With layers of different
    widths (`prune(..., layers=...)`) stock Llama classes raise; here the model is built and each MLP is given its width
    before the weights are read.

    Args:
        path: a folder or a Hub id.
        kwargs: passed on to `from_pretrained` (dtype, device_map, revision, ...).

    Raises:
        ValueError: the path is no model, or its family is not supported.
    """
    of_the_hub = ("revision", "cache_dir", "token", "subfolder", "local_files_only")
    hub = {key: kwargs[key] for key in of_the_hub if key in kwargs}
    config = read_config(path, trust_remote_code=kwargs.get("trust_remote_code", False), **hub)
    family_of(config)
    if len(set(layer_widths(config))) == 1:
        return AutoModelForCausalLM.from_pretrained(path, config=config, **kwargs)
    model_class = _model_class(config)
    model = model_class.from_pretrained(path, config=config, **kwargs)
    model.__class__ = model_class.__base__
    return model
