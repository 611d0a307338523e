"""Which shapes a benchmark run measures, and where its records, tables and plots go.

pytest benchmarks/ --benchmark-only [--shapes NAME] [--records FOLDER]
"""

from pathlib import Path

import pytest
import torch

from benchmarks.shapes import SETS
from gluprune import records, report


def pytest_addoption(parser):
    parser.addoption(
        "--records",
        type=Path,
        default=Path("benchmark_output"),
        help="folder for the records, one JSON-lines file a module, and the report made from them; files there are"
        " appended to (default: %(default)s)",
    )
    parser.addoption(
        "--shapes",
        choices=SETS,
        default="full" if torch.cuda.is_available() else "reduced",
        help="set of shapes to measure (default here: %(default)s)",
    )


@pytest.fixture(scope="session")
def shapes(request):
    """The chosen set of shapes."""
    return SETS[request.config.getoption("--shapes")]


@pytest.fixture
def keep(request):
    """A function that keeps a record in the file of the running module."""
    name = Path(request.node.path).stem.removeprefix("test_")
    return lambda record: records.append(request.config.getoption("--records") / f"{name}.jsonl", record)


def pytest_sessionfinish(session):
    """Leave the tables and plots of what is in the folder of records."""
    folder = session.config.getoption("--records", default=None)
    if folder and folder.is_dir() and any(folder.glob("*.jsonl")):
        path = report.write(report.read_all([folder]), folder)
        session.config.get_terminal_writer().line(f"\nreport: {path}")
