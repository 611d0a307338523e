"""The docs describe the actual tree, and no file contains paths of a developer's machine."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def tracked():
    try:
        listed = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [Path(name) for name in listed]


def named_in_architecture():
    """Paths in the tree of docs/architecture.md with their descriptions; each level is indented by two spaces."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = page.split("## Modules")[1].split("```")[1].partition("\n")[2]
    named, folders = {}, []
    for line in tree.splitlines():
        entry, *purpose = line.split(maxsplit=1)
        depth = (len(line) - len(line.lstrip())) // 2
        assert depth <= len(folders), f"{entry} is indented too far"
        folders = [*folders[:depth], entry]
        named[Path(*folders)] = " ".join(purpose)
    return named


def test_tree_in_the_architecture_page_is_the_tree_on_disk():
    """The page describes every module and everything at the top level, and nothing that does not exist."""
    named = named_in_architecture()
    for path, purpose in named.items():
        assert (ROOT / path).exists(), f"docs/architecture.md names {path}"
        assert purpose or path.name == ".gitignore", f"{path} has no description"
    for path in tracked():
        if path.suffix == ".py" and path.name != "__init__.py" and path.parts[0] != "tests":
            assert path in named, f"docs/architecture.md does not name {path}"
        assert Path(path.parts[0]) in named, f"docs/architecture.md does not name {path.parts[0]}"


def test_linked_files_exist():
    """Every file that README and docs link to exists."""
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        assert "@@" not in text, page
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_text_files_name_no_machine():
    """No file contains a path of a developer's machine or the address of a package registry."""
    pattern = re.compile(r"/work/|/root/|/tmp/|file:///|pythonhosted|pypi\.org/simple")
    for path in tracked():
        if path.suffix in {".py", ".md", ".txt", ".toml", ".json", ".jsonl", ""} and path != Path(
            "tests/test_repository.py"
        ):
            found = pattern.search((ROOT / path).read_text(encoding="utf-8"))
            assert not found, f"{path}: {found.group()}"


def test_no_pickles():
    code = [path for path in tracked() if path.suffix == ".py" and path.parts[0] in ("gluprune", "csrc_triton")]
    for path in code:
        assert not re.search(r"torch\.(load|save)\(|import pickle", (ROOT / path).read_text(encoding="utf-8")), path
