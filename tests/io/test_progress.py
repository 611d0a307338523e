"""Progress: bars in a terminal, plain lines in a log."""

import io
import sys

from gluprune.io import progress as module
from gluprune.io.progress import progress


def test_a_log_gets_a_plain_line_now_and_then(capsys, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_PER_LINE", 0.0)
    assert list(progress(range(3), desc="calibrating", unit="batch", disable=False)) == [0, 1, 2]
    printed = capsys.readouterr().err
    lines = printed.splitlines()
    assert [line.partition(",")[0] for line in lines] == [f"calibrating: batch {n} of 3" for n in (1, 2, 3)]
    assert "\r" not in printed and "%" not in printed


def test_quick_work_leaves_no_line(capsys):
    with progress(total=4, desc="pruning", unit="B", disable=False) as bar:
        for _ in range(4):
            bar.update()
    assert not capsys.readouterr().err


def test_quiet(capsys, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_PER_LINE", 0.0)
    list(progress(range(3), desc="calibrating", unit="batch", disable=True))
    assert not capsys.readouterr().err


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    list(progress(range(3), desc="calibrating", unit="batch", disable=False))
    assert "calibrating:   0%|" in capsys.readouterr().err


def test_a_notebook_gets_the_bar_of_notebooks(monkeypatch):
    stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})
    monkeypatch.setattr(sys, "stderr", stream())
    monkeypatch.setattr(module.auto, "tqdm", type("Bar", (module.auto.tqdm,), {}))
    bar = progress(range(3), desc="calibrating", unit="batch", disable=False)
    assert type(bar) is module.auto.tqdm and list(bar) == [0, 1, 2]
