"""The GPU run: which cases its steps select, stopping, continuing, failing; and some steps in the interpreter."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from _pytest.mark.expression import Expression

from benchmarks import gpu
from benchmarks.gpu import main, run
from benchmarks.lib.gpu_steps import Step, rehearsal, steps
from benchmarks.lib.shapes import SETS, paper_widths
from benchmarks.test_model import CASES as MODEL_CASES

ROOT = Path(__file__).parents[2]
ENVIRONMENT = dict(os.environ, PYTHONPATH=str(ROOT))


def test_steps_are_named_once_and_short():
    for todo in (steps(), rehearsal()):
        assert len({step.name for step in todo}) == len(todo)
        assert all(0 < step.minutes <= (3 if todo == steps() else 8) for step in todo)
        for step in todo:
            for argument in step.arguments:
                assert not argument.endswith(".py") or (ROOT / argument).is_file(), argument


def selected(step, case):
    """Whether pytest's `-k` selects the case in this step."""
    expression = Expression.compile(step.arguments[step.arguments.index("-k") + 1])
    return expression.evaluate(lambda word, **_: word in case)


@pytest.mark.parametrize("part, prefixes", [("forward", ("all",)), ("backward", ("backward",))])
def test_the_parts_make_the_whole_grid(part, prefixes):
    """Every case of the full set is selected by exactly one step, not counting the steps that run some cases first."""
    full = SETS["full"]
    todo = [step for step in steps() if step.name.startswith(prefixes)]
    for case in [f"test_{part}[{model}-M{M:04}-I{I}]" for model, _, I, M in full.cases(full.tokens)]:
        assert sum(selected(step, case) for step in todo) == 1, case


def test_the_studys_widths_come_first_without_torch_compile():
    full = SETS["full"]
    todo = [step for step in steps() if step.name.startswith("forward")]
    for case in full.cases(full.tokens):
        model, _, I, M = case
        first = I in (8192, *paper_widths(8192))
        assert sum(selected(step, f"test_forward[{model}-M{M:04}-I{I}]") for step in todo) == first, case
    assert all("--without" in step.arguments for step in todo)


def test_the_parts_make_all_model_benchmarks():
    todo = [step for step in steps() if step.name.startswith("model")]
    for case in [f"test_llama[{name}-I{width}-{plan}]" for name, width, plan in MODEL_CASES]:
        assert sum(selected(step, case) for step in todo) == 1, case


def test_every_shape_of_the_tables_is_tuned():
    for name, (H, widths) in SETS["full"].models.items():
        (step,) = [step for step in steps() if step.name == f"tune-{name}"]
        words = " ".join(step.arguments)
        assert f"--hidden {H} " in words and "--missing" in step.arguments
        sizes, tokens = words.partition("--intermediate ")[2].partition(" --out")[0].split(" --tokens ")
        assert set(map(str, widths)) == set(sizes.split())
        assert set(map(str, SETS["full"].tokens)) == set(tokens.split())


def python(name, code, minutes=1.0):
    return Step(name, ("timeit", "-n1", "-r1", code), minutes)


def go(todo, out, seconds=600.0, **options):
    lines = []
    state = run(todo, out, out / "tuned.json", seconds, environment=ENVIRONMENT, report=lines.append, **options)
    return state, lines


@pytest.mark.slow
def test_a_second_call_continues(tmp_path):
    """Finished steps are not run again; failed and stopped ones are."""
    mark = tmp_path / "mark"
    good = python("good", f"open({str(mark)!r}, 'a').write('x')")
    bad = python("bad", "raise ValueError('no luck')")
    slow = python("slow", "import time; time.sleep(60)", minutes=0.05)
    state, _ = go([good, bad, slow], tmp_path)
    assert [outcome.status for outcome in state.outcomes.values()] == ["done", "failed", "stopped"]
    assert state.outcomes["bad"].last_line == "ValueError: no luck"
    assert "$ " in (tmp_path / "logs" / "bad.log").read_text()
    slow = python("slow", "pass")
    state, lines = go([good, bad, slow], tmp_path)
    assert mark.read_text() == "x" and lines[0] == "1 of 3 steps were done before"
    assert [outcome.status for outcome in state.outcomes.values()] == ["done", "failed", "done"]
    assert json.loads((tmp_path / "state.json").read_text())["slow"]["code"] == 0


@pytest.mark.slow
def test_failed_steps_run_after_steps_that_never_started(tmp_path, monkeypatch):
    """A failing step must not use up the time of every call; a step that ran out of time comes first."""
    slow = python("slow", "import time; time.sleep(60)")
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 1)
    times = iter((0.0, 10.0, 15.0, 598.0, 599.5))
    todo = [python("bad", "raise ValueError"), python("long", "import time; time.sleep(60)", minutes=0.03), slow]
    state, _ = go([*todo, python("last", "pass")], tmp_path, clock=lambda: next(times))
    assert [outcome.status for outcome in state.outcomes.values()] == ["failed", "stopped", "out of time"]
    assert [step.name for step in state.pending([*todo, python("last", "pass")])] == ["slow", "last", "bad", "long"]


def test_no_step_starts_without_time(tmp_path):
    times = iter((0.0, 10.0, 575.0))
    state, lines = go([python("one", "pass"), python("two", "pass")], tmp_path, clock=lambda: next(times))
    assert list(state.outcomes) == ["one"]
    assert lines[-1] == "[2/2] two: no time left; call again to continue"


@pytest.mark.slow
def test_children_of_a_stopped_step_are_stopped(tmp_path):
    """No process of a step keeps running and disturbs the timing of the next step."""
    child = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)']); "
    code = child + f"open({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid)); p.wait()"
    go([python("slow", code, minutes=0.05)], tmp_path)
    pid = int((tmp_path / "pid").read_text())
    status = Path(f"/proc/{pid}/stat")
    for _ in range(100):  # a killed process ends when it is scheduled next
        if not status.is_file() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the child still runs")


def test_the_table_is_copied_to_the_output(tmp_path):
    (tmp_path / "tuned.json").write_text("{}")
    go([python("one", "pass")], tmp_path)
    assert (tmp_path / "tuned" / "tuned.json").read_text() == "{}"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--rehearse", "--steps", "nothing"], "unknown step 'nothing'"),
        (["--rehearse", "--wheels", "."], "contains no wheel"),
        ([], "no CUDA device is available; --rehearse runs without one"),
    ],
)
def test_bad_input(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_a_rehearsal_leaves_the_state_of_a_run(tmp_path, monkeypatch):
    """They have steps of the same names."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu, "run", lambda todo, out, *_, **__: gpu.State(out / "state.json"))
    monkeypatch.setattr(gpu, "_tuned_table", lambda rehearse, out: out / "table.json")
    for arguments, folder in ([], "gpu_output"), (["--rehearse"], "gpu_output/rehearsal"):
        main(arguments)
        assert (tmp_path / folder / "summary.md").is_file()
        (tmp_path / folder / "summary.md").unlink()
    assert not (tmp_path / "gpu_output" / "summary.md").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tests-cuda", "tests-energy"])
def test_steps_collect_the_tests_that_need_cuda(name):
    (step,) = [step for step in steps() if step.name == name]
    command = [sys.executable, "-m", *step.arguments, "--collect-only"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "::test_" in done.stdout


def test_missing_packages(tmp_path, monkeypatch, capsys):
    """Missing required packages are an error; missing optional ones are reported and left out."""
    monkeypatch.setattr(gpu, "installed", lambda module: module not in ("liger_kernel", "pytest_benchmark"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--out", str(tmp_path)]) == 2
    assert "not installed: pytest_benchmark; pass a folder with their wheels" in capsys.readouterr().err
    monkeypatch.setattr(gpu, "installed", lambda module: module != "liger_kernel")
    main(["--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "not installed: liger_kernel; both of Liger's MLPs will be recorded as unsupported" in printed


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="process groups and the interpreter need Linux")
def test_rehearsal(tmp_path):
    """A complete step of benchmarks on a CPU, with the report and the summary of its records."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--rehearse", "--out", str(tmp_path), "--steps", "scores"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| scores | done |" in (tmp_path / "summary.md").read_text()
    assert "## scores" in (tmp_path / "report.md").read_text()
    finished = (tmp_path / "records" / "scores" / "finished.txt").read_text().split()
    assert len(finished) == 2 and all(
        line.startswith("benchmarks/test_scores.py::test_scores[tiny-I") for line in finished
    )
