"""The steps of a GPU run, in order, and those of its rehearsal on a CPU; see `benchmarks.gpu`."""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.lib.shapes import MODELS, SETS, aligned, all_widths, paper_widths

PYTEST = ("pytest", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors")
RUNTIME_TESTS = tuple(
    f"tests/runtime/test_{name}.py"
    for name in ("ops", "gradients", "fp8", "prepared", "norms", "graphs", "patch_changes")
)
KERNEL_TESTS = ("tests/csrc_triton/glu", "tests/csrc_triton/scores", "tests/csrc_triton/test_norm.py")
# Where tests are marked cuda, besides those of the kernels.
CUDA_TESTS = (
    "tests/calibration/test_sensitivity_prune.py",
    "tests/pruning/test_reconstruct_input.py",
    "tests/pruning/test_scores.py",
    "tests/measure/test_generation.py",
    "tests/measure/test_bench.py",
)


@dataclass(frozen=True)
class Step:
    """One step of the run, executed in a separate process.

    Attributes:
        name: Unique name.
        arguments: Arguments of `python -m`; {records} stands for the step's folder of records, {tuned} for the table.
        minutes: Limit after which the step is stopped.
    """

    name: str
    arguments: tuple[str, ...]
    minutes: float


def _tests(name: str, *arguments: str, minutes: float) -> Step:
    workers = ("-n", "8") if installed("xdist") else ()  # they mostly wait for the compiler
    return Step(name, (*PYTEST, *workers, *arguments), minutes)


def _benchmarks(name: str, files: str, select: str | None = None, *options: str, minutes: float = 3) -> Step:
    chosen = ("-k", select) if select else ()
    common = ("--benchmark-only", "--resume", "--records", "{records}")
    return Step(name, (*PYTEST, *files.split(), *common, *options, *chosen), minutes)


def _tuner(name: str, model: str) -> Step:
    H, dense = MODELS[model]
    tokens = sorted(SETS["full"].tokens)
    sizes = ("--hidden", str(H), "--intermediate", *map(str, all_widths(dense)), "--tokens", *map(str, tokens))
    return Step(name, ("csrc_triton.tools.tune", "--missing", *sizes, "--out", "{tuned}"), minutes=3)


def _any(widths: Iterable[int]) -> str:
    """Return a `-k` expression that selects the benchmarks of these widths."""
    return f"({' or '.join(f'I{width}' for width in widths)})"


def steps() -> list[Step]:
    """Return the steps on a GPU, in order: the first nine minutes settle the most, all of them take some hours."""
    small, large, huge = MODELS
    exact = {name: (dense, *paper_widths(dense)) for name, (_, dense) in MODELS.items()}
    few = {name: [widths[0], widths[4], aligned(widths[4]), widths[6]] for name, widths in exact.items()}  # 0, 40, 60 %
    mlp, whole = "benchmarks/test_mlp.py", "benchmarks/test_model.py"

    def forward(name: str) -> Step:
        select = f"forward and {name} and {_any(exact[name])}"
        return _benchmarks(f"forward-{name}", mlp, select, "--without", "torch.compile")

    select = f"backward and {small} and M2048 and {_any(few[small])}"
    training = _benchmarks(f"training-{small}", mlp, select, "--without", "torch.compile")

    def model(name: str, plan: str, widths: Iterable[int]) -> Step:
        return _benchmarks(f"model-{name}-{plan}", whole, f"{name} and {plan} and {_any(widths)}")

    def user(plan: str, width: int) -> Step:
        return _benchmarks(f"model-{plan}-{width}", whole, f"{small} and {plan} and I{width}")

    def rest(name: str) -> Step:
        early = "energy or called or static" if name == small else "energy"
        done = f"(graph and {_any(exact[name])}) or (({early}) and {_any(few[name])})"
        return _benchmarks(f"model-{name}-rest", whole, f"{name} and not ({done})")

    called, static = ([user(plan, width) for width in few[small]] for plan in ("called", "static"))
    return [
        _tests("tests-runtime", *RUNTIME_TESTS, "-m", "not slow", minutes=3),
        _tuner(f"tune-{small}", small),
        # What users call, stock and patched, at the dense width and at 40 and 60 % pruned.
        *called[::2],  # dense, and 40 % at a multiple of 128
        _tests("tests-cuda", *CUDA_TESTS, "-m", "cuda", minutes=3),
        *called[1::2],
        *static[::2],
        _benchmarks("scores", "benchmarks/test_scores.py", minutes=1),
        _benchmarks("ceilings", "benchmarks/test_ceilings.py benchmarks/test_timer.py", minutes=2),
        forward(small),
        _benchmarks("recipe", "benchmarks/test_recipe.py", "test_large"),
        training,
        _benchmarks(f"backward-{small}", mlp, f"backward and {small}"),
        _tests("tests-kernels", *KERNEL_TESTS, "-m", "not slow", minutes=3),
        *static[1::2],
        *(model(small, plan, widths[small]) for plan, widths in (("graph", exact), ("energy", few))),
        _tuner(f"tune-{large}", large),
        forward(large),
        # torch.compile tunes for many seconds per shape: a few shapes now, the others after all other steps.
        _benchmarks(f"compile-{small}", mlp, f"forward and {small} and (M0001 or M2048) and {_any(few[small])}"),
        *(model(large, plan, widths[large]) for plan, widths in (("graph", exact), ("energy", few))),
        _tests("tests-patching", "tests/runtime/test_patching.py", "tests/runtime/test_patch_interop.py", minutes=3),
        _tests("tests-runtime-slow", *RUNTIME_TESTS, "-m", "slow", minutes=3),
        _tests("tests-kernels-slow", *KERNEL_TESTS, "-m", "slow", minutes=3),
        Step("tests-energy", (*PYTEST, "tests/measure/test_energy.py", "-m", "cuda"), minutes=1),  # nothing beside it
        _benchmarks(f"backward-{large}", mlp, f"backward and {large}"),
        *(rest(name) for name in (small, large)),
        *(_benchmarks(f"all-{name}", mlp, f"forward and {name}") for name in (small, large)),
        _tuner(f"tune-{huge}", huge),
    ]


def rehearsal() -> list[Step]:
    """Return the same kinds of steps with tiny shapes, for a CPU with the interpreter."""
    tiny = ("--shapes", "tiny")
    tuner = ("--hidden", "64", "--intermediate", "153", "256", "--dtype", "float16", "--device", "cpu", "--paths-only")
    picked = [
        _tests(
            "tests-kernels",
            "tests/csrc_triton/glu/test_forward.py",
            "-k",
            "test_bad or test_no_tokens or same_bits",
            minutes=5,
        ),
        _tests("tests-cuda", "-m", "cuda", "tests/csrc_triton/glu/test_forward.py", minutes=2),
        _benchmarks("ceilings", "benchmarks/test_ceilings.py", minutes=2),
        Step(
            "paths-tiny", ("csrc_triton.tools.tune", *tuner, "--tokens", "1", "16", "64", "--out", "{tuned}"), minutes=5
        ),
        _benchmarks("mlp-tiny-M0001", "benchmarks/test_mlp.py", "forward and M0001 and I153", minutes=5),
        _benchmarks("scores", "benchmarks/test_scores.py", minutes=3),
        _benchmarks("recipe", "benchmarks/test_recipe.py", "smollm2", minutes=8),
        _benchmarks("backward-tiny-M0016", "benchmarks/test_mlp.py", "backward and I153", minutes=5),
        _benchmarks("model-tiny", "benchmarks/test_model.py", "smollm2", minutes=8),
    ]
    return [
        dataclasses.replace(step, arguments=step.arguments + tiny) if "--records" in step.arguments else step
        for step in picked
    ]


def installed(module: str) -> bool:
    """Return whether a module can be imported."""
    return importlib.util.find_spec(module) is not None
