"""Where the records of a benchmark run go: `pytest benchmarks/ --benchmark-only --records FOLDER`."""

from pathlib import Path

import pytest

from gluprune import records


def pytest_addoption(parser):
    parser.addoption(
        "--records",
        type=Path,
        default=Path("benchmark_output"),
        help="folder for the records, one JSON-lines file a module; files there are appended to (default: %(default)s)",
    )


@pytest.fixture
def keep(request):
    """A function that keeps a record in the file of the running module."""
    name = Path(request.node.path).stem.removeprefix("test_")
    return lambda record: records.append(request.config.getoption("--records") / f"{name}.jsonl", record)
