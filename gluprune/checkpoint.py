"""Save and load whole checkpoints: written under a temporary name, renamed when complete."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from gluprune.families import model_glus
from gluprune.narrow import resize, set_config_widths


def check_destination(destination: str | Path) -> Path:
    """The destination as a path, if a checkpoint may be written there.

    Raises:
        ValueError: it exists and is not an empty folder.
    """
    destination = Path(destination)
    if destination.exists() and not destination.is_dir():
        raise ValueError(f"output {destination} exists and is not a folder")
    if destination.is_dir() and any(destination.iterdir()):
        raise ValueError(f"output folder {destination} exists and is not empty")
    return destination


@contextmanager
def complete_folder(destination: str | Path) -> Iterator[Path]:
    """A sibling folder to write into, which takes the destination's name when the block ends well.

    At every moment the destination is either absent (or the empty folder it was) or complete.
    """
    destination = check_destination(destination).absolute()
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".partial", dir=destination.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp's own mode shuts other users out
        partial.rename(destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


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


def load(path: str | Path, **kwargs) -> PreTrainedModel:
    """Load a causal LM, layers of different widths included.

    A checkpoint with one width loads just as with `AutoModelForCausalLM.from_pretrained`. With layers of different
    widths (`prune(..., layers=...)`) stock Llama classes raise; here the model is built and each MLP is given its width
    before the weights are read.

    Args:
        path: a folder or a Hub id.
        kwargs: passed on to `from_pretrained` (dtype, device_map, revision, ...).

    Raises:
        ValueError: the path is no model.
    """
    hub = {key: kwargs[key] for key in ("revision", "cache_dir", "token", "subfolder", "local_files_only") if key in kwargs}
    config = read_config(path, trust_remote_code=kwargs.get("trust_remote_code", False), **hub)
    widths = layer_widths(config)
    if len(set(widths)) == 1:
        return AutoModelForCausalLM.from_pretrained(path, config=config, **kwargs)
    stock = AutoModelForCausalLM._model_mapping[type(config)]

    def build(self, config, *args, **options):
        set_config_widths(config.get_text_config(), [max(widths)] * len(widths))
        stock.__init__(self, config, *args, **options)
        set_config_widths(config.get_text_config(), widths)
        for glu, width in zip(model_glus(self), widths):
            resize(glu, width)

    model = type(stock.__name__, (stock,), {"__init__": build}).from_pretrained(path, config=config, **kwargs)
    model.__class__ = stock
    return model
