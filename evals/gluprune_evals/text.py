"""Text to calibrate and to measure on: running text from files, and what tells one text from another."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch

# The release of WikiText is split into tokens, and models read running text: what it did, undone in this order.
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
    """Running text from the tokenised release of WikiText; other text, which has none of its marks, comes back as it is."""
    if not re.search(r" @[-,.]@ |<unk>", text):
        return text
    for pattern, replacement in _RULES:
        text = re.sub(pattern, replacement, text)
    return text


def read_text(path: str | Path) -> str:
    """Running text of a file: plain text, or JSON lines with `text`, `page`, or `question` and `answer`.

    The tokenised release of WikiText is made running text again.

    Raises:
        ValueError: a JSON line without these fields.
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
    """What tells one text, as cut into windows of token ids, from another."""
    return hashlib.sha256(torch.cat(list(batches)).numpy().tobytes()).hexdigest()[:16]
