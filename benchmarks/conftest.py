"""Options and fixtures of the benchmarks: the shapes to measure, and the folder for records, tables and plots.

pytest benchmarks/ --benchmark-only [--shapes NAME] [--records FOLDER] [-k PART]
"""

from pathlib import Path

import pytest
import torch

from benchmarks.lib import ceilings as ceilings_of_the_machine
from benchmarks.lib.providers import PROVIDERS
from benchmarks.lib.shapes import SETS
from gluprune.measure import records
from gluprune.reports import report


def pytest_addoption(parser):
    parser.addoption(
        "--records",
        type=Path,
        default=Path("benchmark_output"),
        help="folder for the records, one JSON-lines file per module, and their report; existing files are appended to"
        " (default: %(default)s)",
    )
    parser.addoption(
        "--shapes",
        choices=SETS,
        default="full" if torch.cuda.is_available() else "reduced",
        help="set of shapes to measure (default here: %(default)s)",
    )
    parser.addoption(
        "--without",
        action="append",
        choices=PROVIDERS,
        default=[],
        metavar="PROVIDER",
        help="exclude a provider from the MLP benchmarks, in which torch.compile takes most of the time; may be"
        f" repeated (one of {'; '.join(PROVIDERS)})",
    )
    parser.addoption(
        "--resume",
        action="store_true",
        help="skip benchmarks that an earlier run with --resume and the same --records finished, with any --without",
    )


class Resumption:
    """Stores the names of finished benchmarks next to the records, and deselects these benchmarks in the next run."""

    def __init__(self, path):
        self.path = path
        self.finished = set(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else set()

    def pytest_collection_modifyitems(self, config, items):
        left_out = [item for item in items if item.nodeid in self.finished]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.nodeid not in self.finished]

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as lines:
                lines.write(f"{report.nodeid}\n")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session, exitstatus):
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.finished:
            session.exitstatus = pytest.ExitCode.OK  # all were already finished


def pytest_configure(config):
    if config.getoption("--resume"):
        config.pluginmanager.register(Resumption(config.getoption("--records") / "finished.txt"))


def pytest_generate_tests(metafunc):
    """Parametrize by the selected set: `case` and `training_case` (model, H, I, M), `score_case` (model, H, I)."""
    shapes = SETS[metafunc.config.getoption("--shapes")]
    for name, tokens in (("case", shapes.tokens), ("training_case", shapes.training_tokens)):
        if name in metafunc.fixturenames:
            cases = shapes.cases(tokens)
            metafunc.parametrize(name, cases, ids=[f"{model}-M{M:04}-I{I}" for model, _, I, M in cases])
    if "score_case" in metafunc.fixturenames:
        cases = [case[:3] for case in shapes.cases((1,))]
        metafunc.parametrize("score_case", cases, ids=[f"{model}-I{I}" for model, _, I in cases])


@pytest.fixture(scope="session")
def shapes(request):
    """The selected set of shapes."""
    return SETS[request.config.getoption("--shapes")]


@pytest.fixture(scope="session")
def providers(request):
    """The providers of the MLP benchmarks, by name."""
    left_out = request.config.getoption("--without")
    return {name: build for name, build in PROVIDERS.items() if name not in left_out}


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def ceilings(request, shapes, device):
    """The rates of a copy and a large matrix product, measured once per run, on first use."""
    path = request.config.getoption("--records") / "ceilings.jsonl"
    return ceilings_of_the_machine.measure(device, shapes, lambda record: records.append(path, record))


@pytest.fixture
def keep(request):
    """A function that appends a record to the file of the current module."""
    name = Path(request.node.path).stem.removeprefix("test_")
    return lambda record: records.append(request.config.getoption("--records") / f"{name}.jsonl", record)


def pytest_collection_modifyitems(config, items):
    """Skip benchmarks marked `large`, which use checkpoints of real sizes, unless the set is large."""
    name = config.getoption("--shapes")
    if not SETS[name].is_large:
        skip = pytest.mark.skip(reason=f"not in the {name} set of shapes")
        for item in items:
            if item.get_closest_marker("large"):
                item.add_marker(skip)


def pytest_sessionfinish(session):
    """Write tables and plots to the folder of records."""
    folder = session.config.getoption("--records", default=None)
    if folder and folder.is_dir() and any(folder.glob("*.jsonl")):
        path = report.write(report.read_all([folder]), folder)
        session.config.get_terminal_writer().line(f"\nreport: {path}")
