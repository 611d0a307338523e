"""Calibration text as batches of token ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Token ids `[B, S]` and mask (bool `[B, S]`, True is a token; None if all are).
Batch: TypeAlias = tuple[torch.Tensor, torch.Tensor | None]
# Entries of a batch that change what a model computes, and that calibration does not pass on.
_NOT_PASSED_ON = ("inputs_embeds", "position_ids", "pixel_values", "pixel_values_videos")


def begin_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id with which a tokenizer begins every text, as those of Llama 3 and Gemma do; None if it adds none.

    Models trained with such a token are much worse without it.
    """
    begin: Any = getattr(tokenizer, "bos_token_id", None)
    return None if begin is None or tokenizer("a").input_ids[:1] != [begin] else begin


def batches_from_text(
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    windows: int = 128,
    length: int = 512,
    batch_size: int = 4,
) -> list[torch.Tensor]:
    r"""Cut windows, evenly spread over a text, into calibration batches.

    Args:
        tokenizer: A Hugging Face tokenizer. If it begins texts with a token (BOS), so does every window.
        text: One text, or a list of one text for each kind (domain, language, the model's own). Join the documents of
            one kind: `"\n\n".join(documents)`. A text that is too short for this number yields fewer windows.
        windows: Number of windows per text.
        length: Tokens per window, with that token.
        batch_size: Windows per batch.

    Returns:
        int64 tensors `[batch_size, length]`; the last may have fewer rows.

    Raises:
        ValueError: A text is shorter than one window, there is no text, or a number is below 1 (`length` below 2, if
            windows begin with BOS).

    Example:
        >>> import gluprune
        >>> from transformers import AutoTokenizer
        >>> tokenizer = AutoTokenizer.from_pretrained(model_path)
        >>> batches = gluprune.batches_from_text(tokenizer, "A long text. " * 100, windows=3, length=64)
        >>> [list(batch.shape) for batch in batches]
        [[3, 64]]
    """
    for name, value in {"windows": windows, "length": length, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    begin = begin_token(tokenizer)
    if begin is not None:
        length -= 1
        if not length:
            raise ValueError("length must be at least 2, since windows begin with the tokenizer's BOS token; got 1")
    texts = [text] if isinstance(text, str) else text
    if not texts:
        raise ValueError("give at least one calibration text")
    rows = []
    for number, content in enumerate(texts, 1):
        ids = torch.tensor(tokenizer(content, add_special_tokens=False, verbose=False).input_ids)
        available = ids.numel() // length
        if not available:
            label = "the text" if len(texts) == 1 else f"text {number} of {len(texts)}"
            hint = "; join short texts of one kind" if len(texts) > 1 else ""
            raise ValueError(f"{label} has {ids.numel()} tokens: one window needs {length}{hint}")
        chosen = torch.arange(min(windows, available)) * available // min(windows, available)
        rows.append(ids[: available * length].view(available, length)[chosen])
    found = torch.cat(rows)
    return list((found if begin is None else F.pad(found, (1, 0), value=begin)).split(batch_size))


def read_batches(model: PreTrainedModel, calibration: Iterable) -> list[Batch]:
    """Return all batches as token ids and masks, checked; batches with only padding are skipped.

    Args:
        model: A causal LM, whose vocabulary is checked.
        calibration: See `gluprune.calibrate`.

    Raises:
        TypeError: `calibration` or a batch has the wrong type.
        ValueError: A batch has the wrong shape, dtype or entries, a token id is outside the vocabulary, or there are no
            tokens.
    """
    name = type(calibration).__name__
    if not isinstance(calibration, Iterable):
        raise TypeError(f"calibration must be an iterable of batches, got {name}")
    if isinstance(calibration, Mapping) or (isinstance(calibration, torch.Tensor) and calibration.dim() == 2):
        raise TypeError(f"calibration must be an iterable of batches, got one batch ({name}): put it into a list")
    batches = []
    for number, batch in enumerate(calibration):
        ids, mask = _read_batch(batch, f"calibration batch {number}")
        check_vocabulary(model, ids, f"calibration batch {number} has token ids")
        if ids.numel() if mask is None else mask.any():
            batches.append((ids, mask))
    if not batches:
        raise ValueError("calibration holds no tokens: give at least one batch that is not all padding")
    return batches


def holds_integers(ids: torch.Tensor) -> bool:
    """Whether a tensor may hold token ids, by its dtype."""
    return not (ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool)


def check_vocabulary(model: PreTrainedModel, ids: torch.Tensor, label: str) -> None:
    """Check that token ids are those of a model.

    Raises:
        ValueError: One is outside the vocabulary; `label` is what the message begins with.
    """
    embedding: Any = model.get_input_embeddings()
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < embedding.num_embeddings:
        raise ValueError(
            f"{label} from {int(ids.min())} to {int(ids.max())}; the model's vocabulary goes from 0 to"
            f" {embedding.num_embeddings - 1}"
        )


def _read_batch(batch: object, label: str) -> Batch:
    if isinstance(batch, Mapping):
        if "input_ids" not in batch:
            raise ValueError(
                f"{label} is a dict without input_ids: its keys are {', '.join(map(str, batch)) or 'nothing'}"
            )
        ignored = [key for key in _NOT_PASSED_ON if batch.get(key) is not None]
        if ignored:
            raise ValueError(
                f"{label} has {', '.join(ignored)}: calibration passes on only input_ids and attention_mask; give rows"
                " of text, each with one document"
            )
        ids, mask = batch["input_ids"], batch.get("attention_mask")
    elif isinstance(batch, (tuple, list)) and 1 <= len(batch) <= 2:
        ids, mask = batch if len(batch) == 2 else (*batch, None)
    else:
        ids, mask = batch, None
    if not isinstance(ids, torch.Tensor):
        found = type(ids).__name__
        raise TypeError(f"{label} must be a tensor, a dict with input_ids or a tuple (ids, mask), got {found}")
    if ids.dim() != 2 or not holds_integers(ids):
        found = f"{ids.dtype} of shape {list(ids.shape)}"
        raise ValueError(f"{label} must hold integer token ids of shape [B, S], got {found}")
    ids = ids.long()  # embeddings take no smaller integers; int64 is not copied
    if mask is None:
        return ids, None
    if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape:
        found = list(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise ValueError(f"the attention_mask of {label} must have the shape of its ids {list(ids.shape)}, got {found}")
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"the attention_mask of {label} must hold 1 (a token) and 0 (padding); labels are not a mask")
    return ids, None if bool((mask != 0).all()) else mask != 0


def token_count(batch: Batch) -> int:
    """Return the number of tokens of a batch, without padding."""
    ids, mask = batch
    return ids.numel() if mask is None else int(mask.sum())
