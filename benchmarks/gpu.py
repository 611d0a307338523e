"""A GPU run in steps of at most three minutes: `make gpu`, or `python -m benchmarks.gpu --help`.

Runs the steps below in order, the most important first: tests, ceilings, tuner, kernel benchmarks with the peers, model
benchmarks with energy. Every step is a separate process, which is stopped at its limit; measurements made until then
are kept. A second call continues where the first stopped. All output is in one folder, to be copied from the machine.
`--rehearse` does the same on a CPU, in Triton's interpreter, with tiny shapes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.lib.gpu_steps import Step, installed, rehearsal, steps

ROOT = Path(__file__).parent.parent
_print_now = functools.partial(print, flush=True)
LEAST_SECONDS = 30  # no step is started with less time left
REQUIRED = (
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "matplotlib",
    "pynvml",
    "pytest",
    "pytest_benchmark",
    "tqdm",
)
OPTIONAL = {
    "liger_kernel": "both of Liger's MLPs will be recorded as unsupported",
    "flash_swiglu_mlp": "its MLP will be recorded as unsupported",
    "hypothesis": "the tests that use it cannot be collected",
}


@dataclass
class Outcome:
    """The result of a step: "done", "failed" (exit code not 0), "stopped" (at its limit) or "out of time" (before)."""

    status: str
    code: int | None
    seconds: float
    last_line: str


def execute(command: Sequence[str], log: Path, seconds: float, environment: dict[str, str]) -> Outcome:
    """Run a command in the repository root, with output to `log`; stop it and its children after `seconds`."""
    start = time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        output.write(f"\n$ {shlex.join(command)}\n".encode())
        output.flush()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(seconds)
        except BaseException as stopped:
            for number in (signal.SIGINT, signal.SIGKILL):  # an interrupted pytest still writes its report
                try:
                    os.killpg(process.pid, number)
                    process.wait(20)
                    break
                except subprocess.TimeoutExpired:
                    pass
                except ProcessLookupError:
                    break
            if not isinstance(stopped, subprocess.TimeoutExpired):
                raise
            code = None
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    status = "stopped" if code is None else "failed" if code else "done"
    return Outcome(status, code, round(time.monotonic() - start, 1), lines[-1][:200])


class State:
    """Outcomes of the steps, stored in `state.json`; finished steps are not run again."""

    def __init__(self, path: Path):
        self._path = path
        known = json.loads(path.read_text()) if path.is_file() else {}
        self.outcomes = {name: Outcome(**outcome) for name, outcome in known.items()}

    def status(self, step: Step) -> str:
        return self.outcomes[step.name].status if step.name in self.outcomes else "not run"

    def pending(self, todo: Sequence[Step]) -> list[Step]:
        """Return the unfinished steps: first those that did not run or had no time, then failed and stopped ones."""
        had_chance = ("failed", "stopped")
        left = [step for step in todo if self.status(step) != "done"]
        return sorted(left, key=lambda step: self.status(step) in had_chance)

    def add(self, step: Step, outcome: Outcome) -> None:
        self.outcomes[step.name] = outcome
        content = {name: dataclasses.asdict(outcome) for name, outcome in self.outcomes.items()}
        unfinished = self._path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(content, indent=1) + "\n")
        unfinished.replace(self._path)


def run(
    todo: Sequence[Step],
    out: Path,
    tuned: Path,
    seconds: float,
    *,
    environment: dict[str, str],
    report: Callable[[str], object] = _print_now,
    clock: Callable[[], float] = time.monotonic,
) -> State:
    """Run the unfinished steps until the time is used up; the last one gets the remaining time."""
    state, start = State(out / "state.json"), clock()
    pending = state.pending(todo)
    if len(pending) < len(todo):
        report(f"{len(todo) - len(pending)} of {len(todo)} steps were done before")
    for number, step in enumerate(pending, 1):
        left = seconds - (clock() - start)
        label = f"[{number}/{len(pending)}] {step.name}"
        if left < LEAST_SECONDS:
            report(f"{label}: no time left; call again to continue")
            break
        report(f"{label} (at most {min(step.minutes, left / 60):.1f} min)")
        places = {"{records}": str(out / "records" / step.name), "{tuned}": str(tuned)}
        command = [sys.executable, "-m", *(places.get(argument, argument) for argument in step.arguments)]
        outcome = execute(command, out / "logs" / f"{step.name}.log", min(step.minutes * 60, left), environment)
        if outcome.status == "stopped" and left < step.minutes * 60:
            outcome.status = "out of time"
        state.add(step, outcome)
        report(f"    {outcome.status} after {outcome.seconds:.0f} s: {outcome.last_line}")
        if tuned.is_file():
            (out / "tuned").mkdir(exist_ok=True)
            shutil.copy(tuned, out / "tuned")
    return state


def summarize(todo: Sequence[Step], state: State, out: Path, absent: dict[str, str]) -> str:
    """Write the report of all records and a summary of the steps to the folder; return the summary."""
    from gluprune.reports import report

    folders = [folder for folder in sorted((out / "records").glob("*")) if any(folder.glob("*.jsonl"))]
    lines = ["# GPU run", ""]
    lines += [f"- not installed: {name}; {consequence}" for name, consequence in absent.items()]
    lines += ["", "| step | outcome | seconds | last line |", "|---|---|--:|---|"]
    for step in todo:
        outcome = state.outcomes.get(step.name)
        row = (
            (outcome.status, f"{outcome.seconds:.0f}", outcome.last_line.replace("|", "/"))
            if outcome
            else ("not run", "–", "–")
        )
        lines.append(f"| {step.name} | {' | '.join(row)} |")
    if folders:
        path = report.write(report.read_all(folders), out)
        lines += ["", f"Tables and plots: [{path.name}]({path.name})"]
    text = "\n".join(lines) + "\n"
    (out / "summary.md").write_text(text, encoding="utf-8")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=(__doc__ or "").split("\n\n")[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: gpu_output, with --rehearse gpu_output/rehearsal"
    )
    parser.add_argument("--minutes", type=float, default=9, help="total time (default: %(default)s)")
    parser.add_argument("--steps", nargs="+", metavar="NAME", help="run only these steps, in this order")
    parser.add_argument(
        "--wheels",
        type=Path,
        metavar="FOLDER",
        help="folder of wheels to install into the output folder, for a machine without network",
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="run on a CPU, in Triton's interpreter, with tiny shapes"
    )
    parser.add_argument("--list", action="store_true", help="list the steps with their limits and commands, and exit")
    return parser


def _chosen(todo: list[Step], names: Sequence[str] | None) -> list[Step]:
    """Return the named steps in the given order, or all for None. Raises ValueError for an unknown name."""
    if not names:
        return todo
    by_name = {step.name: step for step in todo}
    if unknown := [name for name in names if name not in by_name]:
        raise ValueError(f"unknown step {unknown[0]!r}: --list shows all")
    return [by_name[name] for name in names]


def _install(wheels: Path, folder: Path) -> None:
    """Install the wheels of a folder, also for this process. Raises ValueError if there are none or pip fails."""
    files = [str(wheel) for wheel in sorted(wheels.glob("*.whl"))]
    if not files:
        raise ValueError(f"{wheels} contains no wheel")
    offline = ("install", "--quiet", "--no-index", "--no-deps", "--upgrade", "--target", str(folder))
    if subprocess.run([sys.executable, "-m", "pip", *offline, *files], check=False).returncode:
        raise ValueError(f"the wheels in {wheels} cannot be installed")
    sys.path.append(str(folder))
    importlib.invalidate_caches()


def _tuned_table(rehearse: bool, out: Path) -> Path:
    """Return the path of the table that the tuner writes. Raises ValueError if there is no CUDA device."""
    if rehearse:
        return out / "interpreter.json"
    import torch

    from csrc_triton.launch.tables import table_path

    if not torch.cuda.is_available():
        raise ValueError("no CUDA device is available; --rehearse runs without one")
    return table_path(torch.cuda.get_device_name())


def _run_all(options: argparse.Namespace, todo: list[Step]) -> int:
    """Run the steps and write the summary; return the exit code. Raises ValueError if nothing can run."""
    todo = _chosen(todo, options.steps)
    default = Path("gpu_output/rehearsal" if options.rehearse else "gpu_output")
    out = (options.out or default).resolve()
    out.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    if options.wheels:
        _install(options.wheels, out / "peers")
        paths.append(str(out / "peers"))
    environment = dict(os.environ, HF_HUB_OFFLINE="1", PYTHONUNBUFFERED="1", PYTHONPATH=os.pathsep.join(paths))
    if missing := [module for module in REQUIRED if not installed(module)]:
        raise ValueError(f"not installed: {', '.join(missing)}; pass a folder with their wheels as --wheels")
    absent = {module: consequence for module, consequence in OPTIONAL.items() if not installed(module)}
    for name, consequence in absent.items():
        print(f"not installed: {name}; {consequence}")
    tuned = _tuned_table(options.rehearse, out)
    if options.rehearse:
        environment.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    state = run(todo, out, tuned, options.minutes * 60, environment=environment)
    print(summarize(todo, state, out, absent))
    print(f"all output is in {out}")
    return 1 if state.pending(todo) else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    options = _parser().parse_args(arguments)
    todo = rehearsal() if options.rehearse else steps()
    if options.list:
        print("\n".join(f"{step.name}: at most {step.minutes:g} min: {shlex.join(step.arguments)}" for step in todo))
        return 0
    try:
        return _run_all(options, todo)
    except ValueError as error:
        print(f"benchmarks.gpu: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
