"""Text from files (plain text, JSON Lines, WikiText's releases), from data sets of the Hub, and from the package."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from gluprune.io.hub import first_line
from gluprune.io.wikipedia import wikipedia_text

logger = logging.getLogger(__name__)

WIKIPEDIA = "wikipedia"  # names the text that comes with the package
DATASET = "hf:"  # begins the name of a data set of the Hub
_JSON_LINES, _JSON = (".jsonl", ".ndjson"), ".json"

# The release of WikiText is tokenised, and models read running text. Marks alone are no sign of it: code and other
# corpora have them, too.
_MARK, _HEADING = r" @[-,.]@ ", r"(?m)^ = \S.*? = *$"
# Its rules, undone in this order.
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
    """Return running text from the tokenised release of WikiText.

    Text is taken for it that has both a mark (` @-@ `, ` @,@ ` or ` @.@ `) and a heading on a line of its own, as the
    release writes it (` = Title = `). Other text is returned unchanged.
    """
    if not (re.search(_MARK, text) and re.search(_HEADING, text)):
        return text
    for pattern, replacement in _RULES:
        text = re.sub(pattern, replacement, text)
    return text


def read_text(source: str | Path, fields: Sequence[str] = ("text",)) -> str:
    """Read running text from a UTF-8 file, from a data set of the Hub or from the package.

    The tokenised release of WikiText is turned into running text (see `detokenised`), which is logged.

    Args:
        source: A file of plain text, of JSON Lines (`.jsonl`, `.ndjson`) or with one JSON list (`.json`); or
            `hf:ID:SPLIT:COLUMN` or `hf:ID:CONFIG:SPLIT:COLUMN`, a data set for the package `datasets`; or
            `wikipedia`, which is `wikipedia_text`.
        fields: Fields of a JSON object that hold the text. Those that an object has are joined by a line break.

    Raises:
        ValueError: The file is empty, not UTF-8 or not JSON, or an object has none of the fields; the message names the
            file and the place. Or there is no such data set.
        OSError: The file cannot be read.
        ImportError: `datasets` is not installed.
    """
    if str(source) == WIKIPEDIA:
        text = wikipedia_text()
    elif str(source).startswith(DATASET):
        text = _read_dataset(str(source))
    else:
        path = Path(source)
        text = _decoded(path)
        if path.suffix.lower() in (*_JSON_LINES, _JSON):
            text = "\n\n".join(_pieces(path, text, fields))
    if not text.strip():
        raise ValueError(f"{source} holds no text")
    running = detokenised(text)
    if running != text:
        logger.info("%s is the tokenised release of WikiText: it is turned into running text", source)
    return running


def is_named(source: str) -> bool:
    """Whether a source of text is not a file, but a data set of the Hub or the text that comes with the package."""
    return source == WIKIPEDIA or source.startswith(DATASET)


def read_texts(sources: Iterable[str | Path], fields: Sequence[str] = ("text",)) -> list[str]:
    """Read several texts; see `read_text`."""
    return [read_text(source, fields) for source in sources]


def fingerprints(sources: Sequence[str | Path], texts: Sequence[str]) -> dict[str, str]:
    """Return name -> SHA-256 of texts: of the bytes of a file, or of a text that comes from elsewhere.

    A file has its name, with as many of its folders as tell it from the other sources.
    """
    files = {source: _whole(Path(source)) for source in sources if not is_named(str(source)) and Path(source).is_file()}
    places = {*files.values(), *(Path(source) for source in sources if source not in files)}
    found: dict[str, str] = {}
    for source, text in zip(sources, texts, strict=True):
        name = _least_end(files[source], places) if source in files else str(source)
        content = files[source].read_bytes() if source in files else text.encode()
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def _whole(path: Path) -> Path:
    """Return the path of a file with all of its folders; a link to a file keeps its name."""
    return path.parent.resolve() / path.name


def _least_end(path: Path, places: Iterable[Path]) -> str:
    """Return the last parts of a path, as few as no other one of `places` ends with."""
    others = [place.parts for place in places if place != path]
    ends = (path.parts[start:] for start in reversed(range(len(path.parts))))
    return str(Path(*next(end for end in ends if not any(other[-len(end) :] == end for other in others))))


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # A byte order mark at the start is not counted.
        offset = error.start + (3 if content.startswith(b"\xef\xbb\xbf") else 0)
        raise ValueError(f"{path} is not UTF-8 text: byte 0x{content[offset]:02x} at offset {offset:,}") from None


def _pieces(path: Path, text: str, fields: Sequence[str]) -> Iterable[str]:
    """Yield the text of every JSON object of a file."""
    for place, row in _rows(path, text):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, {place} is not a JSON object")
        found = [row[name] for name in fields if row.get(name) is not None]
        if not found:
            given = ", ".join(name for name, value in row.items() if value is not None)
            wanted = f"no field {fields[0]!r}" if len(fields) == 1 else f"none of the fields {', '.join(fields)}"
            raise ValueError(f"{path}, {place} has {wanted}: its fields with a value are {given or 'none'}")
        if not all(isinstance(value, str) for value in found):
            raise ValueError(f"{path}, {place}: the text must be a string")
        piece = "\n".join(found)
        try:
            piece.encode()
        except UnicodeEncodeError as error:  # JSON can escape one half of a pair alone, which no tokenizer takes
            half = piece[error.start]
            raise ValueError(f"{path}, {place}: {half!r} is no character, but half of a surrogate pair") from None
        yield piece


def _rows(path: Path, text: str) -> Iterable[tuple[str, object]]:
    """Yield the place and value of every JSON row of a file."""
    if path.suffix.lower() == _JSON:
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
        if not isinstance(rows, list):
            raise ValueError(f"{path} must hold a JSON list of objects, found {type(rows).__name__}")
        yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))
        return
    # Not `splitlines`: JSON strings may hold other line separators.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None


def _read_dataset(source: str) -> str:
    identifier, *rest = source.removeprefix(DATASET).split(":")
    if len(rest) not in (2, 3) or not all([identifier, *rest]):
        raise ValueError(f"{source} is not of the form hf:ID:SPLIT:COLUMN or hf:ID:CONFIG:SPLIT:COLUMN")
    *config, split, column = rest
    try:
        from datasets import load_dataset
    except ImportError:
        raise ImportError(f"{source} needs the package datasets: pip install 'gluprune[eval]'") from None
    try:
        rows = load_dataset(identifier, *config, split=split)
    except Exception as error:  # the package passes on errors of many kinds
        raise ValueError(f"{source} cannot be loaded: {first_line(error)}") from error
    if column not in rows.column_names:
        raise ValueError(f"{source} has no column {column!r}: its columns are {', '.join(rows.column_names)}")
    return "\n".join(text for text in rows[column] if text)
