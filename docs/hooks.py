"""MkDocs hook: what pages link to outside docs/ (records, reports, pictures, code) becomes part of the site.

So a relative link such as `../evals/results/quality.md` works in the repository and on the site.
"""

import os
import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FOLDER = "repository"  # where the linked files are on the site
_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")


def _outside(page: Path, target: str) -> Path | None:
    """Return the repository file outside docs/ that a page links to; None for other links."""
    path = Path(os.path.normpath(page.parent / target))
    inside = ROOT in path.parents and DOCS not in path.parents
    return path if inside and path.is_file() else None


def _linked(page: Path) -> set[Path]:
    text = page.read_text(encoding="utf-8")
    return {path for match in _LINK.finditer(text) if (path := _outside(page, match[2])) is not None}


def on_files(files: Files, config) -> Files:
    """Add every linked file, and what linked Markdown files link to."""
    waiting = {path for page in DOCS.rglob("*.md") for path in _linked(page)}
    done: set[Path] = set()
    while waiting:
        path = waiting.pop()
        done.add(path)
        if path.suffix == ".md":
            waiting |= _linked(path) - done
        files.append(File.generated(config, f"{FOLDER}/{path.relative_to(ROOT).as_posix()}", abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Point the links at where the files are on the site."""
    source = Path(page.file.abs_src_path)
    here = (DOCS / page.file.src_uri).parent

    def replace(match: re.Match) -> str:
        path = _outside(source, match[2])
        if path is None:
            return match[0]
        target = os.path.relpath(DOCS / FOLDER / path.relative_to(ROOT), here)
        return f"{match[1]}{target}{match[3]}"

    return _LINK.sub(replace, markdown)
