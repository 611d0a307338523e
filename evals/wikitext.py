"""WikiText as its authors wrote it: the release of the data set is split into tokens, and models read running text."""

from __future__ import annotations

import re

# What the release did, undone in this order.
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
