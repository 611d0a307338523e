"""Options of the tests of other programs: `make test-serving`, or `pytest serving`."""

import os
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
CONVERTER = Path(sys.prefix) / "llama-cpp" / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"  # of `make test-serving`


def pytest_addoption(parser):
    parser.addoption("--records", type=Path, help="folder to which records are appended (default: none are written)")
    parser.addoption(
        "--converter", type=Path, default=CONVERTER, help="llama.cpp's convert_hf_to_gguf.py (default: %(default)s)"
    )


@pytest.fixture(scope="session")
def work(tmp_path_factory):
    """A folder for exports."""
    return tmp_path_factory.mktemp("served")


@pytest.fixture
def keep(request):
    """A function that appends a record to the file of the test's module, if there is `--records`."""
    from gluprune.measure import records

    folder = request.config.getoption("--records")
    name = request.path.stem.removeprefix("test_")

    def append(record):
        if folder is not None:
            records.append(folder / f"{name}.jsonl", record)

    return append
