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


def _target(page: Path, link: str) -> Path | None:
    """Return the file of the repository that a page links to; None for other links."""
    path = Path(os.path.normpath(page.parent / link))
    return path if ROOT in path.parents and path.is_file() else None


def _linked(page: Path) -> set[Path]:
    """Files outside docs/ that a page links to."""
    text = page.read_text(encoding="utf-8")
    targets = {_target(page, match[2]) for match in _LINK.finditer(text)}
    return {path for path in targets if path is not None and DOCS not in path.parents}


def _place(path: Path) -> Path:
    """Return where a file of the repository is among the sources of the site."""
    return path if DOCS in path.parents else DOCS / FOLDER / path.relative_to(ROOT)


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
        path = _target(source, match[2])
        if path is None:
            return match[0]
        return f"{match[1]}{os.path.relpath(_place(path), here)}{match[3]}"

    return _LINK.sub(replace, markdown)
