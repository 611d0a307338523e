"""The texts of `shrink` and `heal`: what a model is calibrated or trained on, and what is held apart to measure on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gluprune.calibration.batches import begin_token
from gluprune.io.text import WIKIPEDIA, fingerprints, read_texts
from gluprune.measure.perplexity import cut_windows, perplexity

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OWN_TEXT = "text written by the model"
_HELD_APART = 0.1  # of each text
_TEST_WINDOWS = 32  # to measure on, at most


@dataclass(frozen=True)
class GivenTexts:
    """The texts by name.

    Attributes:
        calibration: To calibrate on.
        test: To measure on; empty if a part of the others is to be held apart.
        digests: SHA-256 of all of them.
    """

    calibration: Mapping[str, str]
    test: Mapping[str, str]
    digests: Mapping[str, str]

    @classmethod
    def read(
        cls,
        text: str | Path | Sequence[str | Path],
        test_text: str | Path | Sequence[str | Path],
        fields: str | Sequence[str],
    ) -> GivenTexts:
        """Read texts; two equal ones are an error, since the text to measure on must be held apart.

        Args:
            text: Sources to calibrate on; if there are none, `WIKIPEDIA`.
            test_text: Sources to measure on.
            fields: Fields that hold the text in JSON files.
        """
        text, test_text, fields = _several(text) or [WIKIPEDIA], _several(test_text), _several(fields)
        contents = read_texts([*text, *test_text], fields)
        digests = fingerprints([*text, *test_text], contents)
        if len(set(digests.values())) < len(contents):
            sources = f"text {', '.join(map(str, text))}; test_text {', '.join(map(str, test_text)) or 'none'}"
            raise ValueError(f"two texts are equal, but what is measured on must be held apart: {sources}")
        named = list(zip(digests, contents, strict=True))
        return cls(dict(named[: len(text)]), dict(named[len(text) :]), digests)


@dataclass(frozen=True)
class Texts:
    """What is calibrated and what is measured on, by name.

    Attributes:
        calibration: To calibrate and reconstruct on.
        test: To measure on; no part of the others.
        digests: SHA-256 of the whole texts that these are of.
    """

    calibration: Mapping[str, str]
    test: Mapping[str, str]
    digests: Mapping[str, str]

    @classmethod
    def of(cls, given: GivenTexts, own: str = "") -> Texts:
        """Divide texts. Without text to measure on, the last tenth of each text to calibrate on is held apart.

        Args:
            given: The texts, of which some may be to measure on.
            own: What the model wrote, or nothing.
        """
        written = {OWN_TEXT: own} if own else {}
        digests = dict(given.digests)
        if own:
            digests[OWN_TEXT] = hashlib.sha256(own.encode()).hexdigest()
        if given.test:
            return cls({**written, **given.calibration}, given.test, digests)
        kept, test = {}, {}
        for name, text in given.calibration.items():
            kept[name], test[f"last tenth of {name}"] = _divided(text)
            digests[f"last tenth of {name}"] = digests[name]
        return cls({**written, **kept}, test, digests)

    @property
    def calibration_digests(self) -> dict[str, str]:
        """Name -> SHA-256 of the texts to calibrate on."""
        return {name: self.digests[name] for name in self.calibration}

    @property
    def test_digests(self) -> dict[str, str]:
        """Name -> SHA-256 of the texts to measure on."""
        return {name: self.digests[name] for name in self.test}


def check_lengths(given: GivenTexts, tokenizer: PreTrainedTokenizerBase, length: int) -> int:
    """Check that texts are long enough; return how many windows there are to calibrate on.

    Raises:
        ValueError: A text to calibrate on, or what is to be measured on, is shorter than one window of `length` tokens.
    """
    divided, windows = Texts.of(given), 0
    needed = length - (begin_token(tokenizer) is not None)
    for name, content in divided.calibration.items():
        tokens = len(tokenizer(content, add_special_tokens=False, verbose=False).input_ids)
        if tokens < needed:
            part = "" if given.test else " before its last tenth"
            raise ValueError(
                f"{name} has {tokens} tokens{part}: one window needs {needed}; give more text, or a smaller length"
            )
        windows += tokens // max(needed, 1)
    HeldApart(divided.test, tokenizer, length)
    return windows


class HeldApart:
    """The text to measure perplexity on, in at most 32 windows.

    Args:
        test: Name -> text, of which there is at least one.
        tokenizer: The tokenizer of the models.
        length: Tokens per window.

    Attributes:
        ids: int64 `[T]`, the texts one after the other, without special tokens.

    Raises:
        ValueError: The texts are shorter than one window.
    """

    def __init__(self, test: Mapping[str, str], tokenizer: PreTrainedTokenizerBase, length: int):
        found = [tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in test.values()]
        self.ids = torch.tensor([token for one in found for token in one])
        self._begin, self._length = begin_token(tokenizer), length
        if self.ids.numel() <= length:
            raise ValueError(
                f"the text to measure on ({', '.join(test)}) has {self.ids.numel()} tokens: one window needs"
                f" {length + 1}; give more text (its last tenth is held apart), or text to measure on (test_text=)"
            )

    @property
    def tokens(self) -> int:
        """Number of tokens that are predicted."""
        return sum(len(window) - 1 for window in cut_windows(self.ids, self._length, _TEST_WINDOWS, self._begin))

    def perplexity(self, model: PreTrainedModel) -> float:
        """Return the perplexity of a causal LM."""
        return perplexity(model, self.ids, self._length, windows=_TEST_WINDOWS, begin=self._begin)


def _several(given: Any) -> list:
    """Return a list of what may be one string or path, or several."""
    return [given] if isinstance(given, (str, Path)) else list(given)


def _divided(text: str) -> tuple[str, str]:
    """Return a text without its last tenth, and the last tenth, which begins with a line or a word if there is one."""
    start = len(text) - int(len(text) * _HELD_APART)
    for separator in ("\n", " "):
        found = text.find(separator, start)
        if 0 <= found < (start + len(text)) // 2:
            start = found + 1
            break
    return text[:start], text[start:]
