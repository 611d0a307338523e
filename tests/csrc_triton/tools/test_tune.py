"""The tuner's search, ranking and table, with an injected timer. No test here needs a GPU or measures time."""

import dataclasses
import json
import os

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

from csrc_triton.glu.gate_up_decode import GateUpGemv
from csrc_triton.glu.gate_up_prefill import GateUpTma
from csrc_triton.launch import tables
from csrc_triton.launch.chooser import heuristic
from csrc_triton.launch.configs import Launch, Problem
from csrc_triton.launch.device import SHARED_MEMORY
from csrc_triton.launch.paths import PATH_KINDS, NoneType
from csrc_triton.tools import tune
from csrc_triton.tools.tune import search, variants
from tests.helpers.processes import run_without_interpreter

BF16 = torch.bfloat16


def problem(M, sm=90):
    return Problem(M, H=2048, I_padded=6656, dtype=BF16, sm=sm)


def yes(decision):
    return True


def halves(path, M, sm=90):
    return [variants(half, path, problem(M, sm)) for half in ("gate_up", "down")]


@pytest.mark.parametrize("sm", SHARED_MEMORY)
@pytest.mark.parametrize("path, M", [("gemv", 1), ("decode", 4), ("small", 128), ("prefill", 2048), ("cublas", 64)])
def test_variants_are_valid_distinct_and_of_the_path(path, M, sm):
    kinds = PATH_KINDS[path]
    for configs, kind in zip(halves(path, M, sm), (kinds[0], (kinds[1],)), strict=True):
        assert len(set(configs)) == len(configs)
        assert all(config.valid(problem(M, sm)) and type(config) in kind for config in configs)
        assert bool(configs) == (kind != (NoneType,))
    if path == "prefill":
        assert any(isinstance(config, GateUpTma) for config in halves(path, M, sm)[0]) == (sm >= 90)


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_search_finds_a_planted_best(data):
    """If the costs of the two halves are independent, the search is exact, within a path and across paths."""
    M = data.draw(st.sampled_from((1, 4, 64, 512)))
    path = data.draw(st.sampled_from(tune.paths(M)))
    gate_up, down = (data.draw(st.sampled_from(configs)) if configs else None for configs in halves(path, M))
    start = heuristic(path, problem(M))
    best = Launch(path, gate_up or start.gate_up, down or start.down)

    def time(decision):
        misses = (decision.path != path, decision.gate_up != best.gate_up, decision.down != best.down)
        return 10.0 + 5 * misses[0] + misses[1] + 2 * misses[2]

    assert search(problem(M), check=yes, time=time).best == (best, 10.0)


@pytest.mark.parametrize(
    "M, paths",
    [
        (1, ["gemv", "cublas"]),
        (16, ["decode", "cublas"]),
        (32, ["small", "cublas"]),
        (64, ["small", "prefill", "cublas"]),
        (256, ["small", "prefill", "cublas"]),
        (512, ["prefill", "cublas"]),
        (8192, ["prefill", "cublas"]),
    ],
)
def test_search_tries_every_candidate_path_once(M, paths):
    tried = []
    search(problem(M), check=yes, time=lambda decision: tried.append(decision) or 1.0)
    assert list(dict.fromkeys(decision.path for decision in tried)) == paths
    assert len(tried) == len(set(tried)), "nothing is timed twice"


@pytest.mark.parametrize("M", tables.M_BUCKETS)
def test_every_configuration_of_the_search_is_compiled_ahead(M):
    ahead = set(tune.launches(problem(M)))
    halves_ahead = {d.gate_up for d in ahead} | {d.down for d in ahead}
    found = search(problem(M), check=yes, time=lambda decision: hash(decision) % 1000 + 1.0)
    assert {half for decision in found.timed for half in (decision.gate_up, decision.down)} <= halves_ahead


PRECOMPILE = """
import itertools, sys, torch
from pathlib import Path
from csrc_triton.launch.configs import Problem
from csrc_triton.tools import tune

def cubins():
    return {path: path.stat().st_mtime_ns for path in Path(sys.argv[1]).rglob("*.cubin")}

if __name__ == "__main__":
    # Unaligned and aligned widths, few tokens and many: all their kernels must come from one point of each kind.
    points = [
        tune.Point(problem, I, launch)
        for problem, I in itertools.product([Problem(M, 256, 384, torch.float16, 90) for M in (1, 2, 100)], (300, 384))
        for launch in itertools.islice(tune.launches(problem), 0, None, 100)
    ]
    distinct = tune.distinct(points)
    assert len(distinct) < len(points)
    tune.precompile(distinct, 2)
    compiled = cubins()
    keys = {compilation.key for point in points for compilation in point.compilations()}
    assert len(compiled) == len(keys), (len(compiled), len(keys))
    assert not any(point.compile() for point in points)
    assert cubins() == compiled, "something was compiled again"
    print("kernels:", len(keys))
"""


@pytest.mark.slow
def test_precompiled_kernels_are_those_of_the_launches(tmp_path):
    script, cache = tmp_path / "script.py", tmp_path / "cache"
    script.write_text(PRECOMPILE)
    done = run_without_interpreter(script, cache, TRITON_CACHE_DIR=str(cache))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 5 and "0 rejected" in done.stderr


def test_configs_with_wrong_results_are_never_timed():
    def wrong(decision):
        return decision.path == "gemv" and decision.gate_up.block_n == 2

    timed = []
    found = search(problem(1), check=lambda d: not wrong(d), time=lambda d: timed.append(d) or float(d.path != "gemv"))
    assert found.rejected and all(wrong(decision) for decision in found.rejected)
    assert timed == list(found.timed) and not any(wrong(decision) for decision in timed)
    assert len(found.rejected) == len(set(found.rejected))
    assert found.best[0].path == "gemv" and found.best[0].gate_up.block_n != 2


def test_without_correct_configs_there_is_no_best():
    found = search(problem(64), check=lambda decision: False, time=lambda decision: 1 / 0)
    assert found.best is None and not found.timed


def test_ties_are_won_by_the_heuristic_of_the_first_path():
    found = search(problem(1), check=yes, time=lambda decision: 7.0)
    assert found.best == (heuristic("gemv", problem(1)), 7.0)


KEY = problem(1)
ENTRY = heuristic("gemv", problem(1))


def test_table_is_written_and_read_back(tmp_path):
    path = tmp_path / "new" / "gpu.json"
    tune.write_table(path, "Some GPU", {KEY: (ENTRY, 12.34567)})
    assert tables.load_table(path) == {KEY: ENTRY}
    content = json.loads(path.read_text())
    assert content["gpu"] == "Some GPU" and content["torch"] == torch.__version__ and "triton" in content
    assert content["entries"][0]["microseconds"] == 12.346


def test_table_keeps_other_shapes_and_replaces_its_own(tmp_path):
    path = tmp_path / "gpu.json"
    other = Problem(1, 3072, 6656, BF16, 90)
    tune.write_table(path, "GPU", {KEY: (ENTRY, 1.0), other: (ENTRY, 2.0)})
    better = dataclasses.replace(ENTRY, gate_up=GateUpGemv(block_n=4, num_warps=8, pdl=False))
    tune.write_table(path, "GPU", {KEY: (better, 0.5)})
    assert tables.load_table(path) == {KEY: better, other: ENTRY}
    assert [entry["microseconds"] for entry in json.loads(path.read_text())["entries"]] == [2.0, 0.5]


def test_interrupted_write_leaves_the_old_table(tmp_path, monkeypatch):
    path = tmp_path / "gpu.json"
    tune.write_table(path, "GPU", {KEY: (ENTRY, 1.0)})
    before = path.read_text()

    def fail(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        tune.write_table(path, "GPU", {KEY: (ENTRY, 2.0)})
    assert path.read_text() == before


def test_malformed_table_is_not_overwritten(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text('{"entries": [1]}')
    with pytest.raises((ValueError, TypeError)):
        tune.write_table(path, "GPU", {KEY: (ENTRY, 1.0)})
    assert path.read_text() == '{"entries": [1]}'


def test_without_a_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "gpu.json"
    assert tune.main(["--hidden", "64", "--intermediate", "100", "--dtype", "bfloat16", "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "error: tuning needs a CUDA device, and none is available\n"
    assert not out.exists()


@pytest.mark.parametrize("arguments", [[], ["--hidden", "64"], ["--hidden", "x", "--intermediate", "100"]])
def test_bad_arguments(arguments):
    with pytest.raises(SystemExit) as stop:
        tune.main(arguments)
    assert stop.value.code == 2


def test_paths_only_tries_only_the_heuristics():
    for M in (1, 64, 512):
        tried = []
        search(problem(M), check=yes, time=lambda d, tried=tried: tried.append(d) or 1.0, halves=())
        assert tried == [heuristic(path, problem(M)) for path in tune.paths(M)]
        assert tried == list(tune.launches(problem(M), ()))


ARGUMENTS = ["--device", "cpu", "--paths-only", "--hidden", "64", "--intermediate", "100", "--dtype", "float16"]


@pytest.mark.slow
@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="runs in the interpreter")
def test_rehearsal_in_the_interpreter(tmp_path, capsys):
    """A complete run without a GPU: every path is run, checked and written to the table."""
    out = tmp_path / "table.json"
    assert tune.main([*ARGUMENTS, "--out", str(out), "--tokens", "1", "64"]) == 0
    assert {key.M for key in tables.load_table(out)} == {1, 64}
    out = capsys.readouterr().out
    # gemv and cublas; small, prefill and cublas
    assert out.count(", 0 rejected)") == 2 and "(2 timed" in out and "(3 timed" in out
    assert tune.main(ARGUMENTS) == 2
    assert capsys.readouterr().err == "error: --device cpu needs TRITON_INTERPRET=1 and --out\n"


@pytest.mark.slow
@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="runs in the interpreter")
def test_missing_shapes_only(tmp_path, capsys):
    """A tuner that was stopped continues where it was."""
    out = tmp_path / "table.json"
    tune.write_table(out, "GPU", {Problem(1, 48, 128, torch.float16, 90): (ENTRY, 1.0)})
    arguments = ["--hidden", "48", "--intermediate", "100", "--dtype", "float16", "--device", "cpu", "--paths-only"]
    arguments += ["--missing", "--tokens", "1", "8", "--out", str(out)]
    for found in (["H 48, I 100, M 8"], []):
        assert tune.main(arguments) == 0
        assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == found
    assert {key.M for key in tables.load_table(out)} == {1, 8}


@pytest.mark.slow
@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="runs in the interpreter")
def test_widths_of_one_padding_are_tuned_once(tmp_path, capsys):
    arguments = [
        "--hidden",
        "48",
        "--intermediate",
        "140",
        "130",
        "100",
        "--device",
        "cpu",
        "--paths-only",
        "--tokens",
        "1",
    ]
    assert tune.main([*arguments, "--dtype", "float16", "--out", str(tmp_path / "table.json")]) == 0
    lines = [line.partition(", M")[0] for line in capsys.readouterr().out.splitlines()]
    assert lines == ["H 48, I 140", "H 48, I 100"]


@pytest.mark.cuda
def test_tune_a_small_shape(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tune, "variants", lambda *arguments: [])  # only the heuristics, on every path
    out = tmp_path / "gpu.json"
    assert tune.main(["--hidden", "256", "--intermediate", "300", "--tokens", "1", "64", "--out", str(out)]) == 0
    assert {key.M for key in tables.load_table(out)} == {1, 64}
    assert "0 rejected" in capsys.readouterr().out
