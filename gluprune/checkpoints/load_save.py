"""Save and load whole checkpoints: a saved checkpoint appears only when it is complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
)

from gluprune.checkpoints.card import History
from gluprune.checkpoints.source import other_files
from gluprune.io.atomic import read_chunks, write_file
from gluprune.io.folder import complete_folder
from gluprune.io.hub import first_line, stored_folder
from gluprune.io.shards import read_json_object
from gluprune.models.families import family_of, family_of_type
from gluprune.models.glu import model_glus, resize, text_configs
from gluprune.models.nemotron_nas import MODEL_TYPE
from gluprune.models.widths import layer_widths, set_config_widths
from gluprune.models.wrappers import adapter_layers, unwrapped
from gluprune.pruning.history import steps_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def save(model: PreTrainedModel, destination: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    """Write a model and its tokenizer as a stock checkpoint; the folder appears only when it is complete.

    A model that `prune` or `reconstruct` changed gets a model card and `gluprune.json`, which say how.

    Args:
        model: A causal LM, pruned and patched or not.
        destination: A folder that does not exist or is empty.
        tokenizer: Anything with `save_pretrained`.

    Returns:
        The folder.

    Raises:
        TypeError: Not a model of transformers, or a tokenizer that cannot be saved.
        ValueError: The destination exists and is not empty, or the model has adapters or a wrapper for several devices.
        OSError: A file cannot be written; the message names it.

    Example:
        >>> import gluprune
        >>> model = gluprune.load(model_path)
        >>> report = gluprune.prune(model, pruning_ratio=0.25)
        >>> path = gluprune.save(model, folder / "saved")
    """
    model = _whole_model(model)
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise TypeError(f"tokenizer must have save_pretrained, got {type(tokenizer).__name__}")
    with complete_folder(destination) as folder:
        _write(model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return Path(destination)


def _whole_model(model: Any) -> PreTrainedModel:
    """Return a model as it can be written, checked."""
    model = unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"model must be a model of transformers, got {type(model).__name__}")
    if adapter_layers(model):
        raise ValueError("the model has adapter layers: remove them first, with model = model.merge_and_unload()")
    return model


def save_like(model: PreTrainedModel, destination: str | Path, source: Path) -> Path:
    """Write a model with the tokenizer, licence and other files of the checkpoint that it was loaded from.

    Args:
        model: As for `save`.
        destination: As for `save`.
        source: The folder of the checkpoint.

    Returns:
        The folder.
    """
    with complete_folder(destination) as folder:
        write_like(model, folder, source)
    return Path(destination)


def write_like(model: PreTrainedModel, folder: Path, source: Path) -> None:
    """Write what `save_like` writes to a folder that exists."""
    _write(model, folder)
    for name in other_files(source, {path.name for path in folder.iterdir()})[0]:
        write_file(folder / name, read_chunks(source / name))


def round_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round the weights to those of a checkpoint. Buffers stay: rotary frequencies are never stored."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _write(model: PreTrainedModel, folder: Path) -> None:
    model.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):  # safetensors 0.8 lets only the owner read them
        shutil.copymode(folder / "config.json", path)
    history = History.of(getattr(model.config, "_name_or_path", None) or "")
    steps = steps_of(model)
    if history.steps or steps:
        files = history.documents(steps, type(model).__name__, layer_widths(model.config))
        for name, content in files.items():
            write_file(folder / name, [content])


def load(path: str | Path, **kwargs) -> PreTrainedModel:
    """Load a model in the class that its config names, including one with layers of different widths.

    The class is that of `architectures` in the config: a causal LM, or for example a reward model or a bare decoder. A
    checkpoint with one width loads as with `from_pretrained` of that class. For layers of different widths
    (`prune(..., layers=...)` or `allocation="sensitivity"`), for which stock Llama classes raise, the model is built
    and each MLP gets its width before the weights are read.

    Args:
        path: A folder or a Hub id.
        **kwargs: As for `from_pretrained`: dtype, device_map, revision, ..., and entries of the config (`use_cache`).
            Not `config`, `output_loading_info` and `ignore_mismatched_sizes`, which `load` itself sets.

    Returns:
        The model, of the stock transformers class.

    Raises:
        ValueError: There is no model at `path`, its family is not supported, or its tensors are not those of the class:
            missing, unexpected, or of another shape; the message names them.

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
    entries = {key for key in kwargs if hasattr(config, key)} - {"dtype", "torch_dtype"}  # these are of the weights
    config.update({key: kwargs.pop(key) for key in entries})
    is_remote = _is_remote(config, kwargs)
    if not is_remote:
        build_empty(config)  # a config that fails is found before the weights are read
    found: Any = _auto_class(config) if is_remote else _model_class(config)
    # The model keeps this name: a relative path would be another one, or a Hub id, after a change of folder.
    source = str(Path(path).absolute()) if Path(path).is_dir() else path
    # Shapes are checked below, with a message that names the tensors.
    model, loading = found.from_pretrained(
        source, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
    )
    _check_loaded(path, type(model).__name__, loading)
    if not is_remote:
        model.__class__ = stock_class(config)  # not the subclass that sets widths
    return model


def _is_remote(config: PreTrainedConfig, options: dict) -> bool:
    """Whether the model is of a class in the checkpoint's own code, which the user trusts."""
    own = getattr(config, "auto_map", None) or {}
    return bool(options.get("trust_remote_code")) and _auto_class(config).__name__ in own


def _check_loaded(path: str | Path, name: str, loading: dict) -> None:
    """Check that every tensor of a model came from its checkpoint, and the other way round.

    Args:
        path: The checkpoint.
        name: The class of the model.
        loading: What `from_pretrained` returns with `output_loading_info`.
    """
    mismatched = [
        f"{key} ({list(stored)} instead of {list(wanted)})" for key, stored, wanted in loading["mismatched_keys"]
    ]
    problems = {
        "lacks": loading["missing_keys"],
        "has unexpected": loading["unexpected_keys"],
        "has mis-shaped": mismatched,
    }
    found = [f"{verb} {_listed(keys)}" for verb, keys in problems.items() if keys]
    if found:
        raise ValueError(f"{path} does not hold the weights of {name}: it {'; it '.join(found)}")


def _listed(keys: Iterable[str], at_most: int = 3) -> str:
    names = sorted(keys)
    rest = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {rest} more" if rest > 0 else "")


def read_config(path: str | Path, **kwargs) -> PreTrainedConfig:
    """Return the config of a model folder or Hub id; code in it is run only if `kwargs` say so.

    Raises:
        TypeError: `path` is neither a string nor a path.
        ValueError: There is no readable model config at `path`, or it is in the format of an export.
    """
    if not isinstance(path, (str, Path)):
        raise TypeError(f"expected a folder or a Hub id, got {type(path).__name__}")
    try:
        config = AutoConfig.from_pretrained(path, **{"trust_remote_code": False, **kwargs})
        text: Any = config.get_text_config()
        if not isinstance(text, PreTrainedConfig):
            raise TypeError(f"text_config is {text!r}, not a config")
        return config
    except (OSError, ValueError) as error:
        if _is_export(path):
            family_of_type(MODEL_TYPE)
        raise ValueError(f"{path} is neither a model folder nor a reachable Hub id: {first_line(error)}") from error
    except Exception as error:  # transformers raises errors of many types for values that it does not expect
        raise ValueError(f"transformers rejects the config of {path}: {_one_line(error)}") from error


def _is_export(path: str | Path) -> bool:
    """Whether a checkpoint on this disk is in the format of `gluprune export`."""
    try:
        raw = read_json_object((stored_folder(path) or Path(path)) / "config.json")
    except (OSError, ValueError):
        return False
    return raw.get("model_type") == MODEL_TYPE


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def build_empty(config: PreTrainedConfig, device: str = "meta") -> PreTrainedModel:
    """Return the model of a config on the meta device: shapes and dtypes without memory.

    Args:
        config: Of a supported family.
        device: Another device, under a mode in which tensors take no memory.

    Raises:
        ValueError: The model type is not supported, or no model can be built from the config.
    """
    family_of(config)
    try:
        with torch.device(device):
            return _model_class(config)._from_config(config, dtype=config.dtype or torch.float32)
    except ValueError:
        raise
    except Exception as error:  # as in `read_config`
        raise ValueError(f"transformers builds no model from the config: {_one_line(error)}") from error


def _auto_class(config: PreTrainedConfig) -> Any:
    """Return the class of transformers that loads whole models: with the vision part, where there is one."""
    is_composite = config.get_text_config() is not config
    return AutoModelForImageTextToText if is_composite else AutoModelForCausalLM


def stock_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class of transformers that a config names, or that for whole models of its type if it names none.

    Raises:
        ValueError: transformers has no class for whole models of this type.
    """
    for name in config.architectures or ():
        found: Any = getattr(transformers, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel) and found.config_class is type(config):
            return found
    mapping: Any = _auto_class(config)._model_mapping
    if type(config) not in mapping:
        raise ValueError(f"model type {config.model_type!r} is not supported: transformers has no class that generates")
    return mapping[type(config)]


def _model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the stock class of a config, or a subclass that gives every MLP its width while the model is built."""
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
