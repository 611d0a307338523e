"""Where commands run, and the texts they read: `--device`, `--dtype`, `--windows`, `--length`, `--field`."""

import json
import subprocess
import sys

import pytest
import torch

import gluprune
from gluprune.calibration.statistics import Statistics
from gluprune.cli import app, main

LOADING = ("shrink", "prune", "calibrate", "sample", "reconstruct", "perplexity", "bench", "eval", "study", "demo")


@pytest.fixture
def checkpoint(tiny_model, smollm2_tokenizer, tmp_path):
    path = tmp_path / "source"
    gluprune.save(tiny_model(dtype=torch.bfloat16, vocab_size=len(smollm2_tokenizer)), path, smollm2_tokenizer)
    return str(path)


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text("\n".join(json.dumps({"body": f"Sentence {number} of the text."}) for number in range(200)))
    return str(file)


@pytest.fixture
def loaded(monkeypatch, tiny_model, smollm2_tokenizer):
    """The options with which models were loaded, where torch finds a GPU; the model itself stays on the CPU."""
    seen = []

    def load(path, **options):
        seen.append(options)
        return tiny_model(vocab_size=len(smollm2_tokenizer))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("gluprune.cli.calibration.load", load)
    return seen


@pytest.mark.parametrize("command", LOADING)
def test_every_command_that_loads_a_model_takes_device_and_dtype(command):
    parameters = {p.name: p for p in app.typer.main.get_command(app.app).commands[command].params}
    assert parameters["device"].default == "auto" and parameters["device"].opts == ["--device"]
    assert parameters["dtype"].default == "auto" and parameters["dtype"].opts == ["--dtype"]


@pytest.mark.parametrize(
    "flags, options",
    [
        ([], {"dtype": "auto", "device_map": "cuda"}),
        (["--device", "cpu"], {"dtype": "auto"}),
        (["--device", "cuda:0", "--dtype", "float32"], {"dtype": "float32", "device_map": "cuda:0"}),
    ],
)
def test_calibrate_loads_onto_the_gpu(loaded, checkpoint, text, tmp_path, flags, options):
    out = tmp_path / "statistics"
    command = ["calibrate", checkpoint, "--text", text, "--field", "body", "--out", str(out), "-q"]
    assert main([*command, "--windows", "3", "--length", "40", *flags]) == 0
    assert loaded == [options]
    assert Statistics.load(out).tokens == 120


def test_reconstruct_loads_both_models_onto_the_gpu(loaded, checkpoint, text, tmp_path, monkeypatch):
    monkeypatch.setattr("gluprune.pruning.reconstruct.reconstruct", lambda pruned, dense, batches: None)
    command = ["reconstruct", checkpoint, "--dense", checkpoint, "--text", text, "--field", "body"]
    assert main([*command, "--out", str(tmp_path / "out"), "--length", "64", "-q"]) == 0
    assert loaded == [{"dtype": "auto", "device_map": "cuda"}] * 2


@pytest.mark.parametrize("flags, dtype", [([], "auto"), (["--device", "cpu"], "float32")])
def test_sample_runs_on_the_gpu_and_in_float32_on_a_cpu(loaded, checkpoint, tmp_path, flags, dtype, monkeypatch):
    monkeypatch.setattr("gluprune.calibration.sample.sample_text", lambda *a, **o: "text")
    assert main(["sample", checkpoint, "--out", str(tmp_path / "own.txt"), *flags]) == 0
    assert loaded == [{"dtype": dtype, **({} if flags else {"device_map": "cuda"})}]


@pytest.mark.parametrize("flags, dtype", [([], "auto"), (["--device", "cpu"], "float32")])
def test_perplexity_runs_on_the_gpu_and_in_float32_on_a_cpu(loaded, checkpoint, text, flags, dtype):
    command = ["perplexity", checkpoint, "--text", text, "--field", "body", "--length", "40", "--windows", "2"]
    assert main([*command, *flags]) == 0
    assert loaded == [{"dtype": dtype, **({} if flags else {"device_map": "cuda"})}]


@pytest.mark.parametrize(
    "command", [["calibrate", "--out", "out"], ["reconstruct", "--dense", "o/m", "--out", "out"], ["perplexity"]]
)
@pytest.mark.parametrize(
    "flags, message",
    [
        (["--device", "cuda"], "device 'cuda' is not available: torch does not find a CUDA device"),
        (["--device", "gpu"], "unknown device 'gpu'; allowed: auto, cpu, cuda"),
        (["--dtype", "int8"], "Invalid value for '--dtype'"),
        (["--field", "page"], "line 1 has no field 'page': its fields with a value are body"),
        (["--text", "absent.txt"], "absent.txt"),
    ],
)
def test_bad_input_is_noticed_before_a_model_is_loaded(
    command, flags, message, checkpoint, text, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("gluprune.cli.calibration.load", lambda *a, **o: pytest.fail("loaded"))
    given = ["--text", text, *([] if "--field" in flags else ["--field", "body"]), *flags]
    assert main([command[0], checkpoint, *command[1:], *given, "--length", "64"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"gluprune {command[0]}: error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_mistyped_text_is_noticed_before_torch_is_imported(tmp_path):
    code = (
        "import sys\nfrom gluprune.cli import main\nmain(sys.argv[1:])\n"
        "print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    command = ["calibrate", "o/m", "--text", "absent.txt", "--out", str(tmp_path / "out")]
    result = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "set()" and "absent.txt" in result.stderr
