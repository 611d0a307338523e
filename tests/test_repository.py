"""The README tells the truth about the tree, and the repository speaks of the project alone."""

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


def test_tree_in_the_readme_is_the_tree_on_disk():
    """Every module and folder of the packages is named with its purpose, and nothing that is not there."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = readme.split("## What is in the repository")[1].split("```")[1]
    named, folder = set(), Path()
    for line in block.strip().splitlines():
        entry = line.split()[0]
        if not line.startswith(" "):
            folder = Path(entry) if entry.endswith("/") else Path()
            path = Path(entry)
        else:
            path = folder / entry
        assert (ROOT / path).exists(), f"README names {path}"
        assert len(line.split(maxsplit=1)) == 2, f"{path} has no purpose"
        named.add(path)
    for path in tracked():
        if path.suffix == ".py" and path.name != "__init__.py" and path.parts[0] != "tests" and len(path.parts) == 2:
            assert path in named, f"README does not name {path}"
        assert path.parts[0].startswith(".git") or any(Path(path.parts[0]) in (n, *n.parents) for n in named), path


def test_no_figure_of_an_unmade_record():
    """Every record file that the README points to is there."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "@@" not in readme
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", readme):
        assert (ROOT / target).exists(), target


def test_text_files_name_no_machine():
    """No path of a developer's machine, no address of a package registry."""
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
