"""The oldest versions in pyproject.toml are tested, and the pinned ones are allowed."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW = (ROOT / ".github" / "workflows" / "ci.yml").read_text()


def test_ci_tests_both_ends():
    oldest = PROJECT["requires-python"].removeprefix(">=")
    (transformers,) = re.findall(r"transformers>=([\d.]+)", " ".join(PROJECT["dependencies"]))
    (job,) = re.findall(r"\n  oldest:\n(?:    .*\n)+", WORKFLOW)
    assert f'python-version: "{oldest}"' in job and f"transformers=={transformers}.0" in job
    (matrix,) = re.findall(r"python: \[(.*)\]", WORKFLOW)
    versions = [name.rsplit(" ", 1)[1] for name in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d", name)]
    assert matrix.replace('"', "").split(", ") == versions and versions[0] == oldest


def test_the_readme_names_the_oldest_versions():
    readme = (ROOT / "README.md").read_text()
    for package, label in (("torch", "PyTorch"), ("transformers", "transformers")):
        (version,) = re.findall(rf"{package}>=([\d.]+)", " ".join(PROJECT["dependencies"]))
        assert f"{label} {version}+" in readme
    assert f"Linux, Python {PROJECT['requires-python'].removeprefix('>=')}+" in readme
