"""Fenced code blocks, links and tables of Markdown files, and a runner for the blocks."""

import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=indent)```", re.DOTALL | re.MULTILINE
)
_LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int


def blocks(path):
    """The fenced blocks of a file in order."""
    text = path.read_text(encoding="utf-8")
    return [
        Block(match["language"], match["code"], text.count("\n", 0, match.start()) + 2)
        for match in _FENCE.finditer(text)
    ]


def links(path):
    """Targets of the links and images of a file, without code."""
    text = _FENCE.sub("", path.read_text(encoding="utf-8"))
    return [match["target"] for match in _LINK.finditer(re.sub(r"`[^`]*`", "", text))]


def anchors(path):
    """Anchors of a file's headings, as GitHub and MkDocs write them."""
    text = _FENCE.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ +(.+?)\s*$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(path, root):
    """Links to files or headings that do not exist. Web links are not followed."""
    broken = []
    for target in links(path):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        outside = not file.exists() or root not in (file, *file.parents)
        if outside or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            broken.append(target)
    return broken


def run_python(block, source, variables):
    """Run a Python block; errors name the line in the source file."""
    exec(compile("\n" * (block.line - 1) + block.code, str(source), "exec"), variables)


def commands(block):
    """Lines of a shell block as lists of arguments, without comments."""
    code = re.sub(r"\\\n", " ", block.code)
    return [arguments for line in code.splitlines() if (arguments := shlex.split(line, comments=True))]


def run_gluprune(arguments):
    """`python -m gluprune ARGUMENTS` in this process, which has torch imported already; returns the exit code."""
    before = sys.argv
    sys.argv = ["gluprune", *arguments]
    try:
        runpy.run_module("gluprune", run_name="__main__", alter_sys=False)
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = before
    return 0


def run_block(block, source, variables):
    """Run a Python block, or the lines of a shell block that call gluprune."""
    if block.language == "python":
        run_python(block, source, variables)
    elif block.language == "sh":
        for name, *arguments in commands(block):
            if name == "gluprune":
                assert run_gluprune(arguments) == 0, f"{source}:{block.line}: gluprune {shlex.join(arguments)}"


def markdown_files(root):
    """README, CONTRIBUTING, CHANGELOG, and the pages of docs."""
    return [root / "README.md", root / "CONTRIBUTING.md", root / "CHANGELOG.md", *sorted((root / "docs").rglob("*.md"))]


def table(text, heading):
    """Rows of the first table after a heading, as lists of cells, without the header and the rule."""
    section = text.split(heading)[1]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]


def relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()
