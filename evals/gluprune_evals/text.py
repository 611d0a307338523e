"""Running text from files, and digests of texts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch

# The release of WikiText is tokenised, and models read running text: its rules, undone in this order.
_RULES = (
    (r" ?<unk>", ""),  # stands for a rare word
    (r" @([-,.])@ ", r"\1"),  # inside words and numbers: ` @-@ `
    (
        r"(?m)^ ?((?:= )+)(.*?)((?: =)+) *$",
        lambda match: match[1].replace(" ", "") + f" {match[2]} " + match[3].replace(" ", ""),
    ),
    (r" (\.\.\.|[,.;:!?%)\]])(?=[\s,.;:!?)\]\"']|$)", r"\1"),
    (r"([(\[$£€]) ", r"\1"),
    (r"(\w) ('(?:s|t|m|ve|re|ll|d)\b)", r"\1\2"),  # contractions and the possessive
    (r"(?<=s) ' (?=\w)", "' "),
    (r'" ([^"\n]*?) ?"', r'"\1"'),  # quotes, in pairs within a line
    (r"(?m)^ +| +$", ""),
    (r"\n{3,}", "\n\n"),
)


def detokenised(text: str) -> str:
    """Return running text from the tokenised release of WikiText; text without its marks is returned unchanged."""
    if not re.search(r" @[-,.]@ |<unk>", text):
        return text
    for pattern, replacement in _RULES:
        text = re.sub(pattern, replacement, text)
    return text


def read_text(path: str | Path) -> str:
    """Read running text from a file: plain text, or JSON Lines with `text`, `page`, or `question` and `answer`.

    The tokenised release of WikiText is turned into running text.

    Raises:
        ValueError: A JSON line has none of these fields.
    """
    text = Path(path).read_text(encoding="utf-8")
    if str(path).endswith(".jsonl"):
        pieces = []
        for number, line in enumerate(text.splitlines(), 1):
            row = json.loads(line)
            piece = "\n".join(row[name] for name in ("text", "page", "question", "answer") if name in row)
            if not piece:
                raise ValueError(f"{path}, line {number} has none of the fields text, page, question and answer")
            pieces.append(piece)
        text = "\n\n".join(pieces)
    return detokenised(text)


def digest(batches: Sequence[torch.Tensor]) -> str:
    """Return a digest of a text, cut into windows of token ids."""
    return hashlib.sha256(torch.cat(list(batches)).numpy().tobytes()).hexdigest()[:16]
