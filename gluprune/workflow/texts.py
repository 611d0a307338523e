"""The texts of `shrink`: what it calibrates on, and what it holds apart to measure on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OWN_TEXT = "text written by the model"
_HELD_APART = 0.1  # of each text


@dataclass(frozen=True)
class GivenTexts:
    """The user's texts by name.

    Attributes:
        calibration: To calibrate on.
        test: To measure on; empty if a part of the others is to be held apart.
        digests: SHA-256 of all of them.
    """

    calibration: Mapping[str, str]
    test: Mapping[str, str]
    digests: Mapping[str, str]


@dataclass(frozen=True)
class Texts:
    """What is calibrated and what is measured on, by name.

    Attributes:
        calibration: To calibrate and reconstruct on.
        test: To measure on; no part of the others.
    """

    calibration: Mapping[str, str]
    test: Mapping[str, str]

    @classmethod
    def of(cls, given: GivenTexts, own: str = "") -> Texts:
        """Divide texts. Without text to measure on, the last tenth of each given text or else of `own` is held apart.

        Args:
            given: The user's texts.
            own: What the model wrote, or nothing.
        """
        written = {OWN_TEXT: own} if own else {}
        if given.test:
            return cls({**written, **given.calibration}, given.test)
        parts = {name: _divided(text) for name, text in (given.calibration or written).items()}
        kept = {name: first for name, (first, _) in parts.items()}
        return cls({**written, **kept}, {name: last for name, (_, last) in parts.items()})

    def test_ids(self, tokenizer: PreTrainedTokenizerBase, length: int) -> torch.Tensor:
        """Return the token ids `[T]` of the texts to measure on, one after the other, without special tokens.

        Raises:
            ValueError: They are shorter than one window of `length` tokens.
        """
        ids = [tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in self.test.values()]
        joined = torch.tensor([token for one in ids for token in one])
        if joined.numel() <= length:
            raise ValueError(
                f"the text to measure on ({', '.join(self.test)}) has {joined.numel()} tokens: one window needs"
                f" {length + 1}; give more text, or text to measure on (test_text=)"
            )
        return joined


def _divided(text: str) -> tuple[str, str]:
    """Return a text without its last tenth, and the last tenth, which begins with a line or a word if there is one."""
    start = len(text) - int(len(text) * _HELD_APART)
    for separator in ("\n", " "):
        found = text.find(separator, start)
        if 0 <= found < (start + len(text)) // 2:
            start = found + 1
            break
    return text[:start], text[start:]
