"""Text that comes with the package: 60 articles of Wikipedia, to calibrate on where no other text is given."""

from __future__ import annotations

from importlib.resources import files


def wikipedia_text() -> str:
    """Return 60 English articles of Wikipedia: the validation split of WikiText-2, as running text.

    1.1 MB, about 250,000 tokens. By Wikipedia's contributors, under CC BY-SA 3.0; chosen by Merity et al., *Pointer
    Sentinel Mixture Models* (arXiv 1609.07843, section 4.2).

    Example:
        >>> import gluprune
        >>> gluprune.wikipedia_text().count(" ") > 150_000
        True
    """
    return (files("gluprune.io") / "data" / "wikipedia.txt").read_text(encoding="utf-8")
