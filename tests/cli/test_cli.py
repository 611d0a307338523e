"""The command line from outside: output, exit codes, one-line errors on bad input."""

import copy
import json
import shutil
import subprocess
import sys
from importlib.resources import files

import pytest
import torch
from transformers import AutoModelForCausalLM

import gluprune
from gluprune.calibration.batches import batches_from_text
from gluprune.calibration.statistics import Statistics
from gluprune.cli import main
from tests.helpers.streaming import contents


@pytest.fixture
def checkpoint(tiny_model, smollm2_tokenizer, tmp_path):
    path = tmp_path / "source"
    gluprune.save(tiny_model(dtype=torch.bfloat16, seed=1), path, smollm2_tokenizer)
    return path


def run(*arguments):
    command = [sys.executable, "-m", "gluprune", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["shrink"],
        ["prune"],
        ["sample"],
        ["calibrate"],
        ["reconstruct"],
        ["info"],
        ["perplexity"],
        ["bench"],
        ["report"],
        ["eval"],
        ["study"],
        ["demo"],
    ],
)
def test_help(command, capsys):
    assert main([*command, "--help"]) == 0
    assert "Usage: gluprune" in capsys.readouterr().out


def test_prune_writes_the_same_as_pruning_in_memory(checkpoint, tiny_model, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--pruning-ratio", "0.4", "--multiple-of", "1", "--score", "maw_gud", "--json"]
    assert main(["prune", str(checkpoint), "--out", str(tmp_path / "short"), *arguments]) == 0
    assert "kept" not in json.loads(capsys.readouterr().out)
    assert main(["prune", str(checkpoint), "--out", str(out), *arguments, "--kept"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["intermediate_size"], report["score"]) == (61, "maw_gud")
    model = tiny_model(dtype=torch.bfloat16, seed=1)
    expected = gluprune.prune(model, pruning_ratio=0.4, multiple_of=1, score="maw_gud")
    assert report["kept"] == {str(layer): kept.tolist() for layer, kept in expected.kept.items()}
    again = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again[name]), name
    assert (out / "tokenizer.json").is_file()


def test_prune_some_layers_and_info(checkpoint, tmp_path, capsys, caplog):
    out = tmp_path / "out"
    arguments = ["--intermediate-size", "64", "--multiple-of", "64", "--layers", "0,2"]
    assert main(["prune", str(checkpoint), "--out", str(out), *arguments]) == 0
    assert "101 -> 64 neurons in 2 layers" in capsys.readouterr().out
    assert "`gluprune.load` loads the result, stock transformers does not" in caplog.text
    assert main(["info", str(out)]) == 0
    text = capsys.readouterr().out
    assert "64 to 101 neurons (layers differ: load with gluprune.load)" in text
    assert main(["info", str(out), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    assert described["widths"] == [64, 101, 64]
    assert described["aligned_to"] == 1
    assert described["tensor_parallel"] == {"2": False, "4": False, "8": False}
    caplog.clear()
    arguments[-1] = "1"  # the rest: all layers have one width again
    assert main(["prune", str(out), "--out", str(tmp_path / "all"), *arguments]) == 0
    assert "stock transformers does not" not in caplog.text
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "all").config.intermediate_size == 64


@pytest.mark.slow
def test_prune_with_calibration(smollm2_path, smollm2_tokenizer, tmp_path, capsys):
    """The command line writes the same weights as the library with the same text."""
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text((files("gluprune.demo") / "data" / "demo_text.txt").read_text())
    arguments = [
        "--expansion-ratio",
        "2",
        "--score",
        "hybrid",
        "--calibration",
        str(text),
        "--compensate",
        "--json",
        "--kept",
    ]
    assert main(["prune", str(smollm2_path), "--out", str(out), *arguments]) == 0
    report = json.loads(capsys.readouterr().out)
    model = gluprune.load(smollm2_path)
    batches = batches_from_text(smollm2_tokenizer, text.read_text())
    expected = gluprune.prune(model, expansion_ratio=2, score="hybrid", calibration=batches, compensate=True)
    assert report["kept"] == {str(layer): kept.tolist() for layer, kept in expected.kept.items()}
    again = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_prune_with_the_statistics_of_a_text(tiny_model, smollm2_tokenizer, tmp_path, capsys):
    """Pruning shards with statistics equals pruning in memory with the text; a text is rejected as statistics."""
    source, text, statistics = tmp_path / "source", tmp_path / "text.txt", tmp_path / "statistics"
    gluprune.save(
        tiny_model(dtype=torch.bfloat16, seed=1, vocab_size=len(smollm2_tokenizer)), source, smollm2_tokenizer
    )
    text.write_text((files("gluprune.demo") / "data" / "demo_text.txt").read_text()[:20_000])
    calibrating = ["calibrate", str(source), "--text", str(text), "--out", str(statistics), "--gram", "--json"]
    assert main(calibrating) == 0
    output = json.loads(capsys.readouterr().out)
    assert (output["layers"], output["gram"], output["file"]) == (3, True, str(statistics)) and output["tokens"] >= 512
    assert main(calibrating) == 2 and "must be a new file" in capsys.readouterr().err

    arguments = [
        "--pruning-ratio",
        "0.4",
        "--multiple-of",
        "1",
        "--score",
        "hybrid",
        "--compensate",
        "--json",
        "--kept",
    ]
    reports, tensors = [], []
    for how in (["--calibration", str(text)], ["--statistics", str(statistics)]):
        out = tmp_path / how[0]
        assert main(["prune", str(source), "--out", str(out), *arguments, *how]) == 0
        reports.append(json.loads(capsys.readouterr().out))
        tensors.append(AutoModelForCausalLM.from_pretrained(out).state_dict())
    assert reports[0]["kept"] == reports[1]["kept"]
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    assert main(["prune", str(source), "--out", str(tmp_path / "out"), *arguments, "--statistics", str(text)]) == 2
    assert f"{text} is not a complete safetensors file" in capsys.readouterr().err


@pytest.mark.slow
def test_prune_by_sensitivity_from_text(tiny_model, smollm2_tokenizer, tmp_path, capsys):
    """Text does what its statistics do, and all files of the source come along."""
    source, text, statistics = (tmp_path / name for name in ("source", "text.txt", "statistics"))
    model = tiny_model(seed=1, vocab_size=len(smollm2_tokenizer))
    gluprune.save(model, source, smollm2_tokenizer)
    for name in ("LICENSE", "tokenizer.model", "modeling_mine.py"):
        (source / name).write_text(name)
    text.write_text((files("gluprune.demo") / "data" / "demo_text.txt").read_text()[:5_000])
    assert main(["calibrate", str(source), "--text", str(text), "--out", str(statistics), "--sensitivity"]) == 0
    arguments = ["--pruning-ratio", "0.4", "--multiple-of", "1", "--score", "surgeon", "--allocation", "sensitivity"]
    for how in (["--calibration", str(text)], ["--statistics", str(statistics)]):
        assert main(["prune", str(source), "--out", str(tmp_path / how[0]), *arguments, *how]) == 0
    first, second = (contents(tmp_path / how) for how in ("--calibration", "--statistics"))
    assert first == second and {"LICENSE", "tokenizer.model", "modeling_mine.py", "gluprune.json"} <= first.keys()


@pytest.mark.slow
def test_prune_by_sensitivity(tiny_model, smollm2_tokenizer, tmp_path, capsys):
    """Statistics with sensitivities; layers get the same widths as in the library."""
    source, text, statistics, out = (tmp_path / name for name in ("source", "text.txt", "statistics", "out"))
    model = tiny_model(seed=1, vocab_size=len(smollm2_tokenizer))
    gluprune.save(model, source, smollm2_tokenizer)
    text.write_text((files("gluprune.demo") / "data" / "demo_text.txt").read_text()[:5_000])
    assert (
        main(["calibrate", str(source), "--text", str(text), "--out", str(statistics), "--sensitivity", "--json"]) == 0
    )
    output = json.loads(capsys.readouterr().out)
    assert output["gram"] and output["sensitivity"]
    arguments = ["--pruning-ratio", "0.4", "--multiple-of", "1", "--score", "surgeon", "--allocation", "sensitivity"]
    assert main(["prune", str(source), "--out", str(out), *arguments, "--statistics", str(statistics), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    expected = gluprune.prune(
        model,
        pruning_ratio=0.4,
        multiple_of=1,
        score="surgeon",
        allocation="sensitivity",
        calibration=Statistics.load(statistics),
    )
    assert report["widths"] == {str(layer): width for layer, width in expected.widths.items()}
    assert len(set(report["widths"].values())) > 1
    again = gluprune.load(out).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_reconstruct(tiny_model, smollm2_tokenizer, tmp_path, capsys):
    """The command line equals the library with the same number of windows per text, also with different widths."""
    text, other = tmp_path / "text.txt", tmp_path / "other.txt"
    content = (files("gluprune.demo") / "data" / "demo_text.txt").read_text()
    text.write_text(3 * content)
    other.write_text(content[::-1])
    dense = tiny_model(seed=1, vocab_size=len(smollm2_tokenizer), dtype=torch.bfloat16)
    gluprune.save(dense, tmp_path / "dense", smollm2_tokenizer)
    pruned = copy.deepcopy(dense)
    gluprune.prune(pruned, pruning_ratio=0.4, multiple_of=1, layers=[0, 2])
    gluprune.save(pruned, tmp_path / "pruned", smollm2_tokenizer)
    for name in ("LICENSE", "tokenizer.model"):
        (tmp_path / "pruned" / name).write_text(name)
    where = ["--dense", str(tmp_path / "dense"), "--text", str(text), str(other), "--windows", "3"]
    command = ["reconstruct", str(tmp_path / "pruned"), *where, "--out", str(tmp_path / "out"), "--json"]
    assert main(command) == 0
    output = json.loads(capsys.readouterr().out)
    batches = batches_from_text(smollm2_tokenizer, [text.read_text(), other.read_text()], 3)
    windows = sum(map(len, batches))
    assert output == {"windows": windows, "tokens": 512 * windows, "folder": str(tmp_path / "out")} and windows > 3
    before = pruned.state_dict()["model.layers.2.mlp.down_proj.weight"].clone()
    gluprune.reconstruct(pruned, dense, batches)
    assert not torch.equal(pruned.state_dict()["model.layers.2.mlp.down_proj.weight"], before)
    again = gluprune.load(tmp_path / "out").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in pruned.state_dict().items())
    assert {path.name for path in (tmp_path / "pruned").iterdir()} == {
        path.name for path in (tmp_path / "out").iterdir()
    }
    steps = json.loads((tmp_path / "out" / "gluprune.json").read_text())["steps"]
    assert [step["step"] for step in steps] == ["prune", "reconstruct"]
    assert main(command) == 2 and "is not empty" in capsys.readouterr().err
    command[-2] = str(tmp_path / "new")
    command[command.index("--windows") + 1] = "0"
    assert main(command) == 2 and "windows must be at least 1, got 0" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_dry_run_writes_nothing(checkpoint, tmp_path, capsys):
    arguments = ["--pruning-ratio", "0.4", "--multiple-of", "1", "--dry-run"]
    assert main(["prune", str(checkpoint), "--out", str(tmp_path / "out"), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "101 -> 61 neurons in 3 layers" in printed and "nothing was written" in printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_clean_removes_what_interrupted_runs_left(checkpoint, tmp_path, capsys):
    left = tmp_path / ".out.0123456789abcdef.partial"
    other = tmp_path / ".other.0123456789abcdef.partial"
    for folder in (left, other):
        (folder / "checkpoint").mkdir(parents=True)
        (folder / "checkpoint" / "model.safetensors").write_text("12345")
    arguments = ["prune", str(checkpoint), "--pruning-ratio", "0.4", "--multiple-of", "1", "--out"]
    assert main([*arguments, str(tmp_path / "out")]) == 0 and left.is_dir()
    shutil.rmtree(tmp_path / "out")
    assert main([*arguments, str(tmp_path / "out"), "--clean"]) == 0
    assert not left.exists() and other.is_dir() and (tmp_path / "out" / "config.json").is_file()


def test_info_counts(checkpoint, capsys):
    assert main(["info", str(checkpoint), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert described["parameters"] == sum(p.numel() for p in model.parameters())
    assert described["bytes"] == sum(p.nbytes for p in model.parameters())
    assert described["mlp_parameters"] == 3 * 3 * 32 * 101
    assert described["mlp_bytes"] == 2 * 3 * 3 * 32 * 101
    assert described["dtype"] == "bfloat16"
    assert described["expansion_ratios"] == [101 / 32] * 3


def test_info_of_the_real_model(smollm2_path, capsys):
    assert main(["info", str(smollm2_path)]) == 0
    text = capsys.readouterr().out
    assert "llama, 30 layers, hidden size 576" in text
    assert "1536 neurons, expansion ratio 2.667" in text
    assert "every width is a multiple of 128" in text
    assert "2: no, 4: no, 8: no" in text  # 9 attention heads
    assert "30 of 30 MLPs by gluprune.patch_llama on a GPU" in text


@pytest.mark.parametrize("activation, fusible", [("silu", 3), ("relu", 0)])
def test_info_says_what_can_be_fused(tiny_model, tmp_path, capsys, activation, fusible):
    gluprune.save(tiny_model("phi3", hidden_act=activation), tmp_path / "packed")
    assert main(["info", str(tmp_path / "packed"), "--json"]) == 0
    described = json.loads(capsys.readouterr().out)
    reason = "activation ReLU is not supported (allowed: silu and gelu_pytorch_tanh)"
    assert described["fusible"] == fusible
    assert described["not_fusible"] == ({} if fusible else {reason: 3})


def test_info_of_an_activation_that_cannot_be_fused(tiny_model, tmp_path, capsys):
    gluprune.save(tiny_model(hidden_act="relu"), tmp_path / "relu")
    assert main(["info", str(tmp_path / "relu")]) == 0
    text = capsys.readouterr().out
    assert "0 of 3 MLPs" in text and "3 x activation ReLU is not supported" in text


def test_perplexity_on_text_of_the_calibration(tiny_model, smollm2_tokenizer, tmp_path, caplog):
    """A warning, since a model that was pruned on a text does better on it than on others."""
    gluprune.save(tiny_model(seed=1, vocab_size=len(smollm2_tokenizer)), tmp_path / "dense", smollm2_tokenizer)
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for number, path in enumerate(texts):
        path.write_text(f"Text number {number}. " * 300)
    prune = ["prune", f"{tmp_path / 'dense'}", "--pruning-ratio", "0.4", "--score", "hybrid", "--multiple-of", "1"]
    calibration = ["--calibration", f"{texts[0]}", "--out", f"{tmp_path / 'out'}"]
    assert main([*prune, *calibration]) == 0
    caplog.clear()
    command = ["--text", *map(str, texts), "--length", "32", "--windows", "2"]
    assert main(["perplexity", f"{tmp_path / 'out'}", *command]) == 0
    warned = [message for message in caplog.messages if "was used to prune or train" in message]
    assert len(warned) == 1 and warned[0].startswith(f"{texts[0]} was used")
    caplog.clear()
    assert main(["perplexity", f"{tmp_path / 'dense'}", *command]) == 0
    assert "was used" not in caplog.text


def test_perplexity(tiny_model, smollm2_tokenizer, tmp_path, capsys):
    """Of a checkpoint whose layers differ, on two texts."""
    model, texts = tiny_model(seed=1, vocab_size=len(smollm2_tokenizer)), ["One text. " * 60, "Another one, " * 50]
    gluprune.prune(model, pruning_ratio=0.4, multiple_of=1, layers=[1])
    gluprune.save(model, tmp_path / "pruned", smollm2_tokenizer)
    files = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    files[0].write_text(texts[0])
    files[1].write_text(json.dumps({"text": texts[1]}))
    command = ["perplexity", str(tmp_path / "pruned"), "--text", *map(str, files), "--length", "32"]
    assert main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    for row, file, text in zip(record["texts"], files, texts, strict=True):
        ids = torch.tensor(smollm2_tokenizer(text, add_special_tokens=False).input_ids)
        assert row["perplexity"] == pytest.approx(gluprune.perplexity(model, ids, 32), rel=1e-5)
        assert row["text"] == str(file) and row["tokens"] == len(ids) - 1
        assert row["windows"] == -(-row["tokens"] // 32)
    assert main([*command, "--windows", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].startswith(f"{files[1]}: perplexity ")
    assert lines[1].endswith("on 64 tokens, in 2 windows of 32")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--pruning-ratio", "1.5"], "--pruning-ratio must lie between 0 and 1 (both excluded), got 1.5"),
        (
            ["--pruning-ratio", "20"],
            "--pruning-ratio must lie between 0 and 1 (both excluded), got 20.0: did you mean 0.2?",
        ),
        (["--expansion-ratio", "64"], "got 64.0: did you mean --intermediate-size 64?"),
        ([], "give exactly one of --expansion-ratio, --pruning-ratio, --intermediate-size; got none"),
        (["--pruning-ratio", "0.4", "--intermediate-size", "64"], "got --pruning-ratio 0.4 and --intermediate-size 64"),
        (["--intermediate-size", "40"], "rounds to 0 with --multiple-of 128"),
        (["--pruning-ratio", "0.4", "--score", "best"], "unknown score 'best'"),
        (["--pruning-ratio", "0.4", "--score", "hybrid"], "score hybrid needs --calibration FILE or --statistics"),
        (["--pruning-ratio", "0.4", "--compensate"], "--compensate needs --calibration FILE"),
        (
            ["--pruning-ratio", "0.4", "--allocation", "sensitivity"],
            "--allocation sensitivity needs --calibration FILE or --statistics FILE",
        ),
        (
            ["--pruning-ratio", "0.4", "--multiple-of", "1", "--score", "hybrid", "--calibration", "absent.txt"],
            "absent.txt",
        ),
        (["--pruning-ratio", "0.4", "--calibration", "absent.txt"], "--calibration would be ignored: --score maw_gud"),
        (
            ["--pruning-ratio", "0.4", "--score", "l2", "--statistics", "absent"],
            "--statistics would be ignored: --score l2 uses no calibration data. Remove it, or use one of the scores"
            " activation, hybrid, surgeon, --compensate or --allocation sensitivity",
        ),
        (["--pruning-ratio", "0.4", "--dry-run", "--clean"], "--clean"),
        (["--pruning-ratio", "0.4", "--kept"], "--kept needs --json"),
        (["--pruning-ratio", "0.4", "--dry-run", "--resume"], "--dry-run writes nothing"),
        (["--pruning-ratio", "0.4", "--calibration", __file__, "--resume"], "work only without --calibration"),
        (["--pruning-ratio", "0.4", "--calibration", __file__, "--statistics", "x"], "work only without --calibration"),
        (
            ["--intermediate-size", "64", "--multiple-of", "1", "--compensate", "--statistics", "absent.file"],
            "absent.file",
        ),
        (["--pruning-ratio", "0.4", "--layers", "1,7", "--multiple-of", "1"], "layer index 7 is out of range"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(checkpoint, tmp_path, capsys, arguments, message):
    out = tmp_path / "out"
    assert main(["prune", str(checkpoint), "--out", str(out), *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("gluprune prune: error: ") and message in error
    assert not out.exists()


@pytest.mark.slow
def test_bad_paths(checkpoint, tmp_path):
    for arguments, message in [
        (["info", tmp_path / "absent"], "absent is neither a model folder nor a Hub id (owner/name)"),
        (["info", "./absent"], "./absent is neither a model folder nor a Hub id (owner/name)"),
        (["eval", "o/m", "--tasks", "absent"], "; or a list: base, instruct"),
        (["prune", tmp_path / "absent", "--out", tmp_path / "out", "--pruning-ratio", "0.4"], "absent"),
        (["prune", checkpoint, "--out", checkpoint, "--pruning-ratio", "0.4"], "source"),
    ]:
        result = run(*arguments)
        assert result.returncode == 2, result.stderr
        assert message in result.stderr.strip().splitlines()[-1]
        assert "Traceback" not in result.stderr


def test_a_missing_file_is_named_with_the_reason(checkpoint, tmp_path, capsys):
    text = tmp_path / "absent.txt"
    assert main(["calibrate", str(checkpoint), "--text", str(text), "--out", str(tmp_path / "statistics")]) == 2
    assert capsys.readouterr().err == f"gluprune calibrate: error: {text}: No such file or directory\n"


@pytest.mark.parametrize("layers", ["a", "1-", "-1", "1,,2", ""])
def test_bad_layer_list(layers, capsys):
    assert main(["prune", "owner/x", "--out", "y", f"--layers={layers}"]) == 2
    assert "is not a list of layers such as 0,2,5-7" in capsys.readouterr().err
