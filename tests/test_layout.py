"""Rules that linters do not check: sizes of modules and functions, and the direction of imports."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("csrc_triton", "gluprune", "evals/gluprune_evals")
MODULES = [path for package in (*PACKAGES, "benchmarks") for path in sorted((ROOT / package).rglob("*.py"))]


def own_lines(function):
    """Lines of a function without its docstring; for Typer commands, whose parameters contain the help, of the body."""
    docstring = function.body[0]
    has_docstring = isinstance(docstring, ast.Expr) and isinstance(docstring.value, ast.Constant)
    described = docstring.end_lineno - docstring.lineno + 1 if has_docstring else 0
    is_command = "typer.Option" in ast.unparse(function.args)
    first = docstring.lineno if is_command else function.lineno
    return function.end_lineno - first + 1 - described


def positional(function):
    arguments = [*function.args.posonlyargs, *function.args.args]
    return [argument.arg for argument in arguments if argument.arg not in ("self", "cls")]


def is_kernel(function):
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def is_flat_schema(function):
    """Whether torch derives a custom operator's schema from the parameters, or passes all of them by position."""
    return any("custom_op" in ast.unparse(d) or "register" in ast.unparse(d) for d in function.decorator_list)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_functions_are_small(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for function in ast.walk(ast.parse(text)):
        if isinstance(function, ast.FunctionDef):
            assert own_lines(function) <= 60, f"{function.name} has {own_lines(function)} lines"
            if not (is_kernel(function) or is_flat_schema(function) or function.name.startswith("test_")):
                assert len(positional(function)) <= 5, f"{function.name}{positional(function)}"


def test_the_library_contains_only_packages_and_two_modules():
    modules = {path.name for path in (ROOT / "gluprune").glob("*.py")}
    assert modules == {"__init__.py", "__main__.py"}
    for package in (path for path in (ROOT / "gluprune").iterdir() if (path / "__init__.py").is_file()):
        docstring = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8")))
        assert docstring, f"{package} has no docstring"


def test_no_package_hides_a_public_function():
    import gluprune

    packages = {path.name for path in (ROOT / "gluprune").iterdir() if path.is_dir()}
    assert not packages & set(gluprune.__all__)


@pytest.mark.parametrize(
    "module, line, contract",
    [
        (None, "", ""),
        ("gluprune/models/glu.py", "from gluprune.runtime import operator", "only the packages below them"),
        ("gluprune/measure/bench.py", "import gluprune_evals.tasks", "only the packages below them"),
        ("gluprune/runtime/patching.py", "import csrc_triton", "know the kernels"),
        ("csrc_triton/reference.py", "import gluprune", "only the packages below them"),
    ],
)
def test_a_wrong_import_breaks_the_contract(module, line, contract, tmp_path):
    pytest.importorskip("importlinter")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / Path(package).name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    if module:
        path = tmp_path / module
        if not path.is_file():  # moved
            path = next(path.parent.rglob(path.name))
        path.write_text(path.read_text(encoding="utf-8") + f"\n{line}\n", encoding="utf-8")
    code = (
        "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports_command; lint_imports_command()"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    if module is None:
        assert found.returncode == 0, found.stdout
    else:
        broken = [text for text in found.stdout.splitlines() if "BROKEN" in text]
        assert found.returncode == 1 and any(contract in text for text in broken), found.stdout
