"""The study folder: resuming, computing no result twice, not mixing two studies."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from gluprune_evals import study
from gluprune_evals.configuration import Configuration, grid
from gluprune_evals.folder import Folder, StudyModel, fingerprint
from gluprune_evals.harness import Result
from gluprune_evals.study import Settings, run
from gluprune_evals.tasks import Limits
from transformers import AutoModelForCausalLM, AutoTokenizer

from gluprune.calibration.batches import batches_from_text
from gluprune.cli import main
from gluprune.io import atomic
from gluprune.pruning.prune import prune
from gluprune.pruning.recipe import Recipe
from tests.helpers.study_cases import WORDS, save_tiny_model, write_data

TASKS = ["wikitext", "lambada_openai", "hellaswag", "arc_challenge"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model and data, which no test changes."""
    root = tmp_path_factory.mktemp("inputs")
    save_tiny_model(root / "tiny")
    write_data(root / "data", count=4)
    text = " ".join(WORDS[n * n % 60] for n in range(2000))
    (root / "text.txt").write_text(text)
    return root


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(study, "CALIBRATION_LENGTH", 16)


def arguments(inputs, out, *more, tasks=TASKS, ratios=("0.4",)):
    fixed = ["study", inputs / "tiny", "--data", inputs / "data", "--out", out, "--limit", 3]
    return [str(a) for a in [*fixed, "--tasks", *tasks, "--ratios", *ratios, *more]]


def contents(folder):
    """Results without the fields that differ from run to run."""
    found = {}
    for path in sorted(folder.glob("*/*/*.json")):
        result = json.loads(path.read_text())
        found[str(path.relative_to(folder))] = {
            key: value for key, value in result.items() if key not in ("seconds", "commit")
        }
    return found


@pytest.mark.slow
def test_killed_and_started_again(inputs, tmp_path, capsys):
    """`kill -9` in the middle: the same results and table as an undisturbed run, and no task is run twice."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(arguments(inputs, whole)) == 0
    capsys.readouterr()
    process = subprocess.Popen(
        [sys.executable, "-m", "gluprune", *arguments(inputs, killed)], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 300
    while len(contents(killed)) < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {path: path.stat().st_mtime_ns for path in killed.glob("*/*/*.json")}
    assert 2 <= len(before) < 8
    assert main(arguments(inputs, killed)) == 0
    assert all(path.stat().st_mtime_ns == time for path, time in before.items())
    assert contents(killed) == contents(whole) and len(contents(whole)) == 8
    tables = []
    for folder in (whole, killed):
        assert main(["report", str(folder)]) == 0
        text = (folder / "study.md").read_text()
        tables.append([line for line in text.splitlines() if line.startswith("|")])
    assert tables[0] == tables[1] and len(tables[0]) > 12


@pytest.mark.slow
def test_no_result_is_computed_twice(inputs, tmp_path, monkeypatch):
    """A second run evaluates nothing; with more ratios and tasks, only the new ones."""
    out, ran, evaluate = tmp_path / "out", [], study.evaluate

    def counted(lm, task, limits, **named):
        ran.append((named["configuration"]["ratio"], task))
        return evaluate(lm, task, limits, **named)

    monkeypatch.setattr(study, "evaluate", counted)
    assert main(arguments(inputs, out, tasks=TASKS[:1])) == 0
    assert ran == [(0.0, "wikitext"), (0.4, "wikitext")]
    assert main(arguments(inputs, out, tasks=TASKS[:1])) == 0 and len(ran) == 2
    assert main(arguments(inputs, out, tasks=TASKS[:2], ratios=("0.4", "0.6"))) == 0
    assert ran[2:] == [(0.0, "lambada_openai"), (0.4, "lambada_openai"), (0.6, "wikitext"), (0.6, "lambada_openai")]


def test_two_studies_do_not_mix(inputs, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(arguments(inputs, out, tasks=["wikitext"])) == 0
    before = contents(out)
    for more, message in [
        (["--dtype", "bfloat16"], "holds a study with dtype 'auto', but this one has 'bfloat16'"),
        (["--patch"], "holds a study with patched False, but this one has True"),
    ]:
        assert main(arguments(inputs, out, *more, tasks=["wikitext"])) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    other = arguments(inputs, out, tasks=["wikitext"])
    other[other.index("--limit") + 1] = "2"
    assert main(other) == 2
    assert "limits 'limit 3', but this one has 'limit 2': use another folder" in capsys.readouterr().err
    assert contents(out) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    assert main(arguments(inputs, tmp_path / "full")) == 2
    assert "is not empty and does not hold a study" in capsys.readouterr().err


def test_a_changed_model_is_rejected(inputs, tmp_path, capsys):
    save_tiny_model(tmp_path / "tiny", seed=1)
    folder = tmp_path / "out"
    command = [
        "eval",
        str(tmp_path / "tiny"),
        "--data",
        str(inputs / "data"),
        "--out",
        str(folder),
        "--tasks",
        "wikitext",
    ]
    assert main(command) == 0
    save_tiny_model(tmp_path / "tiny", seed=2)
    assert main(command) == 2
    assert "holds a study with revision of tiny" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_share_a_study(inputs, tmp_path):
    """A configuration that another process is evaluating is skipped."""
    folder = Folder(tmp_path / "out")
    source = StudyModel.find(inputs / "tiny")
    settings = Settings(limits=Limits(2), data=inputs / "data")
    configurations = grid([0.2, 0.4], [Recipe("maw", multiple_of=1)])
    taken = folder.file("tiny", configurations[1], "x").parent
    folder.path.mkdir()
    folder.claim(settings.identity(), {})
    taken.mkdir(parents=True)
    with atomic.locked(taken):
        found = run(folder, [source], configurations, ["wikitext"], settings)
    assert [result.configuration["ratio"] for result in found] == [0.0, 0.4]
    assert len(run(folder, [source], configurations, ["wikitext"], settings)) == 3


@pytest.mark.slow
def test_full_disk(inputs, tmp_path, monkeypatch, capsys):
    """The error is one line, finished results remain, and the study resumes when there is space again."""
    out, write = tmp_path / "out", atomic.write

    def full(descriptor, data):
        if len(contents(out)) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    monkeypatch.setattr(atomic, "write", full)
    assert main(arguments(inputs, out)) == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    kept = contents(out)
    assert len(kept) == 3
    monkeypatch.setattr(atomic, "write", write)
    assert main(arguments(inputs, out)) == 0
    assert len(contents(out)) == 8 and kept.items() <= contents(out).items()


def test_json_is_one_document(inputs, tmp_path, capsys, monkeypatch):
    """lm-eval and its backends print to stdout as they like."""

    def run(*_):
        print("noise of lm-eval")
        return []

    monkeypatch.setattr(study, "run", run)
    assert main(arguments(inputs, tmp_path / "out", "--json")) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == [] and "noise of lm-eval" in captured.err


def test_data_without_a_field_is_noticed_before_a_model_is_loaded(inputs, tmp_path, capsys):
    data = write_data(tmp_path / "data", count=4)
    (data / "arc_challenge" / "test.jsonl").write_text('{"question": "w1"}\n')
    command = ["eval", str(inputs / "tiny"), "--data", str(data), "--out", str(tmp_path / "out"), "--tasks", *TASKS]
    assert main(command) == 2
    assert "line 1 has no field 'choices'" in capsys.readouterr().err.splitlines()[-1]
    assert not list((tmp_path / "out").glob("*/*/*.json"))


def test_a_short_calibration_text_is_noticed_before_anything_is_scored(inputs, tmp_path, capsys):
    (tmp_path / "short.txt").write_text("too short")
    more = ["--scores", "maw", "hybrid", "--calibration", tmp_path / "short.txt"]
    assert main(arguments(inputs, tmp_path / "out", *more)) == 2
    assert "tokens: one window needs 16" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_tokenised_text_counts_as_running_text(inputs, tmp_path):
    """WikiText's tokenised release and the same text before tokenisation count as the same calibration."""
    words = (inputs / "text.txt").read_text()
    for name, end in (("tokenised", "\n = Title = \n well @-@ known"), ("running", "\n= Title =\nwell-known")):
        (tmp_path / name).write_text(words + end)
        more = ["--scores", "hybrid", "--calibration", tmp_path / name]
        assert main(arguments(inputs, tmp_path / "out", *more, tasks=["wikitext"])) == 0
    (tmp_path / "other").write_text(words + " unknown")
    more = ["--scores", "hybrid", "--calibration", tmp_path / "other"]
    assert main(arguments(inputs, tmp_path / "out", *more, tasks=["wikitext"])) == 2


@pytest.mark.slow
@pytest.mark.parametrize("score", ["hybrid", "surgeon"])
def test_calibrated_recipe_prunes_like_the_library(inputs, tmp_path, capsys, score):
    """The evaluated model equals the one that `prune` returns for the same texts; statistics are collected once."""
    recipe, out = f"{score}+compensate", tmp_path / "out"
    texts = [(inputs / "text.txt").read_text(), " ".join(reversed((inputs / "text.txt").read_text().split()))]
    (tmp_path / "second.txt").write_text(texts[1])
    more = ["--scores", recipe, "--calibration", inputs / "text.txt", tmp_path / "second.txt"]
    assert main(arguments(inputs, out, *more, tasks=["wikitext"], ratios=("0.4", "0.6"))) == 0
    model = AutoModelForCausalLM.from_pretrained(inputs / "tiny").eval()
    tokenizer = AutoTokenizer.from_pretrained(inputs / "tiny")
    batches = batches_from_text(tokenizer, texts, study.CALIBRATION_WINDOWS, 16)
    prune(model, pruning_ratio=0.4, multiple_of=1, score=score, compensate=True, calibration=batches)
    lm = study.model_in_memory(model, tokenizer)
    expected = study.evaluate(
        lm, "wikitext", Limits(3), data=inputs / "data", model="m", revision="r", configuration={}, dtype="float32"
    )
    found = Result.from_json((out / "tiny" / f"{recipe}-0.4" / "wikitext.json").read_text())
    assert found.value == pytest.approx(expected.value, rel=1e-6)
    assert found.configuration["intermediate_size"] == 61 and found.configuration["recipe"] == recipe
    assert len(list((tmp_path / "cache" / "gluprune").glob("study-tiny-*"))) == 1
    more += ["--calibration-windows", 4]
    assert main(arguments(inputs, out, *more, tasks=["wikitext"])) == 2
    assert "with calibration 'text " in capsys.readouterr().err
    more = ["--scores", recipe, "--calibration", inputs / "text.txt"]
    assert main(arguments(inputs, out, *more, tasks=["wikitext"])) == 2
    assert main(arguments(inputs, out, tasks=["wikitext"])) == 0  # not relevant for MAW


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [("auto", 1e-5), ("bfloat16", 0.1)])
def test_checkpoint_in_a_backend(inputs, tmp_path, dtype, tolerance):
    """A configuration's checkpoint gets the same scores in lm-eval's hf backend as the model in memory."""
    assert main(arguments(inputs, tmp_path / "memory", tasks=TASKS[:2])) == 0
    more = ["--backend", "hf", "--dtype", dtype]
    assert main(arguments(inputs, tmp_path / "backend", *more, tasks=TASKS[:2])) == 0
    for name, result in contents(tmp_path / "memory").items():
        other = contents(tmp_path / "backend")[name]
        assert other["configuration"] == result["configuration"] and other["backend"] == "hf"
        assert other["dtype"] == ("float32" if dtype == "auto" else dtype)
        for metric, value in result["metrics"].items():
            assert other["metrics"][metric]["value"] == pytest.approx(value["value"], rel=tolerance)
        if result["task"] == "lambada_openai" and dtype != "auto":  # the dtype was passed to the backend
            assert other["per_document"] != pytest.approx(result["per_document"], rel=1e-5)


@pytest.mark.slow
def test_samples_and_lengths(inputs, tmp_path):
    out = tmp_path / "out"
    command = ["eval", inputs / "tiny", "--data", inputs / "data", "--out", out, "--tasks", "gsm8k", "--limit", 2]
    assert main([*map(str, command), "--log-samples"]) == 0
    place = out / "tiny" / "unchanged"
    lines = [json.loads(line) for line in (place / "gsm8k.samples.jsonl").read_text().splitlines()]
    result = Result.from_json((place / "gsm8k.json").read_text())
    assert len(lines) == 2 and result.lengths == [line["generated_tokens"] for line in lines]
    for line in lines:
        assert len(line["resps"][0][0].split()) == line["generated_tokens"] > 0
        assert "exact_match" in line and line["doc"]["question"] in line["arguments"][0][0]


@pytest.mark.slow
def test_patched_scores_equal_unpatched_scores(smollm2_path, tmp_path):
    """SmolLM2, patched and unpatched: equal accuracies, perplexity within 0.1 %."""
    data = write_data(tmp_path / "data", count=2)
    command = [
        "eval",
        smollm2_path,
        "--data",
        data,
        "--dtype",
        "float32",
        "--tasks",
        "wikitext",
        "arc_challenge",
        "--out",
    ]
    assert main([str(a) for a in [*command, tmp_path / "stock"]]) == 0
    assert main([str(a) for a in [*command, tmp_path / "patched", "--patch"]]) == 0
    stock, patched = (contents(tmp_path / name) for name in ("stock", "patched"))
    for name, result in stock.items():
        assert patched[name]["patched"] and not result["patched"]
        for metric, value in result["metrics"].items():
            other = patched[name]["metrics"][metric]["value"]
            assert other == pytest.approx(value["value"], rel=1e-3 if "perplexity" in metric else 0)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--scores", "best"], "unknown recipe 'best': give a score (maw"),
        (["--scores", "maw+compensates"], "unknown recipe 'maw+compensates'"),
        (["--scores", "hybrid"], "calibrated scores and +compensate need --calibration FILE"),
        (["--scores", "maw+compensate"], "need --calibration FILE"),
        (["--backend", "nonesuch"], "backend 'nonesuch' cannot be used"),
        (["--backend", "hf", "--patch"], "give one of them"),
        (["--model-args", "a=1"], "--model-args needs --backend"),
        (["--data", "nowhere"], "data folder nowhere does not exist"),
        (["--scores", "hybrid", "--calibration", "nowhere.txt"], "nowhere.txt"),
        (["--calibration", __file__], "--calibration would be ignored"),
        (["--calibration-windows", "3"], "--calibration-windows needs --calibration FILE"),
        (["--tasks", "mmlu_pro"], "unknown task 'mmlu_pro'"),
        (["--ratios", "20"], "got 20.0: did you mean 0.2?"),
        (["--ratios", "1.5"], "pruning ratios must lie between 0 and 1 (both excluded), got 1.5"),
    ],
)
def test_bad_input_is_one_line(inputs, tmp_path, capsys, more, message):
    assert main(arguments(inputs, tmp_path / "out", *more)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("gluprune study: error: ") and message in last
    assert not contents(tmp_path / "out")


@pytest.mark.parametrize("more", [["--scores", "l2"], ["--multiple-of", "8"], ["--calibration", __file__]])
def test_what_only_pruning_uses_is_refused_without_ratios(tmp_path, capsys, more):
    assert main(["study", "owner/absent", "--ratios", *more, "--out", str(tmp_path / "out")]) == 2
    assert f"{more[0]} would be ignored: --ratios has no value" in capsys.readouterr().err


def test_without_lm_eval(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(arguments(inputs, tmp_path / "out")) == 2
    assert "lm-eval is not installed: pip install 'gluprune[eval]'" in capsys.readouterr().err


def test_names():
    recipes = [Recipe.parse(name, multiple_of=1) for name in ("maw", "hybrid+compensate")]
    assert [str(c) for c in grid([0.1, 0.25], recipes)] == [
        *("unchanged", "maw-0.1", "maw-0.25", "hybrid+compensate-0.1", "hybrid+compensate-0.25")
    ]
    assert str(Configuration(Recipe("l2", multiple_of=128), 0.4)) == "l2-0.4-multiple-of-128"
    with pytest.raises(ValueError, match=r"the study takes SCORE or SCORE\+compensate, got maw\+sensitivity"):
        grid([0.1], [Recipe.parse("maw+sensitivity")])


def test_fingerprint(tmp_path):
    """A different weight or config changes the revision; a different folder name does not."""
    first, second = save_tiny_model(tmp_path / "a", seed=1), save_tiny_model(tmp_path / "b", seed=1)
    assert fingerprint(first) == fingerprint(second)
    model = AutoModelForCausalLM.from_pretrained(second)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[3, 4] += 1
    model.save_pretrained(second)
    assert fingerprint(first) != fingerprint(second)


def test_a_context_too_short_for_the_task(inputs, tmp_path, capsys):
    save_tiny_model(tmp_path / "short", max_position_embeddings=128)
    command = ["eval", tmp_path / "short", "--data", inputs / "data", "--out", tmp_path / "out", "--tasks", "gsm8k"]
    assert main([str(a) for a in command]) == 2
    assert "gsm8k cannot be run: Invalid configuration" in capsys.readouterr().err


def test_statistics_of_another_version_are_not_read_from_the_cache(monkeypatch):
    batches = [torch.arange(8).view(2, 4)]
    names = {study.statistics_file("model", batches, sensitivity) for sensitivity in (False, True)}
    monkeypatch.setattr(study, "VERSION", study.VERSION + 1)
    names |= {study.statistics_file("model", batches, sensitivity) for sensitivity in (False, True)}
    assert len(names) == 4
