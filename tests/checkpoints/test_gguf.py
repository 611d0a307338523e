"""`export` to GGUF, with a script in the place of llama.cpp's converter."""

import importlib.util
import json
import subprocess
import sys
import textwrap

import pytest
from gguf import GGUFReader, GGUFValueType

from gluprune.checkpoints.export import export
from gluprune.checkpoints.gguf import CONVERTER, quantizations
from gluprune.cli import main
from tests.checkpoints.test_export import narrow

FAKE = """
    import json, pathlib, sys

    folder, option, file = sys.argv[1:]
    assert option == "--outfile"
    architecture = json.loads((pathlib.Path(folder) / "config.json").read_text())["architectures"][0]
    pathlib.Path(file).write_text(f"GGUF of {architecture}")
"""


@pytest.fixture
def converter(tmp_path):
    (tmp_path / "llama.cpp").mkdir()
    file = tmp_path / "llama.cpp" / CONVERTER
    file.write_text(textwrap.dedent(FAKE))
    return file


def test_one_width(converter, tmp_path, monkeypatch, capsys):
    """The converter is given, or found on the PATH; the formats that fit are printed."""
    narrow(tmp_path / "narrow", widths=(96, 96, 96))
    export(tmp_path / "narrow", tmp_path / "given", format="gguf", converter=converter)
    assert {path.name for path in (tmp_path / "given").iterdir()} == {"model.gguf"}
    assert (tmp_path / "given" / "model.gguf").read_text() == "GGUF of LlamaForCausalLM"
    converter.chmod(0o755)
    monkeypatch.setenv("PATH", str(converter.parent))
    command = ["export", str(tmp_path / "narrow"), "--format", "gguf", "--out"]
    assert main([*command, str(tmp_path / "found")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == ["fits down_proj: Q8_0, Q5_0, Q4_0, F16", "fits other projections: Q8_0, Q5_0, Q4_0, F16"]
    assert main([*command, str(tmp_path / "json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["quantizations"]["down_proj"] == ["Q8_0, Q5_0, Q4_0", "F16"]


@pytest.mark.parametrize(
    "rows, fitting", [([922], 0), ([1024], 2), ([1152], 1), ([1280], 2), ([896], 1), ([256, 1152], 1)]
)
def test_formats_that_fit_a_width(rows, fitting):
    assert quantizations(rows) == [*["K-quants", "Q8_0, Q5_0, Q4_0"][2 - fitting :], "F16"]


CONVERTING = """
    import pathlib, sys
    import numpy as np
    from gguf import GGUFWriter, GGMLQuantizationType
    from safetensors.numpy import load_file

    folder, _, file = sys.argv[1:]
    writer = GGUFWriter(file, "llama")
    writer.add_feed_forward_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_name("narrow")
    writer.add_token_list(["a", "b"])
    writer.add_token_types([1, 3])
    for name, tensor in load_file(pathlib.Path(folder) / "model.safetensors").items():
        writer.add_tensor(name, tensor)
    writer.add_tensor("bf16", np.arange(12, dtype=np.uint8).reshape(2, 6), raw_dtype=GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
"""


def contents(file):
    """Metadata, types and tensors of a GGUF file."""
    reader = GGUFReader(file)
    fields = {name: (field.types, field.contents()) for name, field in reader.fields.items() if "GGUF." not in name}
    tensors = {each.name: (each.tensor_type, each.shape.tolist(), each.data.tobytes()) for each in reader.tensors}
    return fields, tensors


@pytest.mark.parametrize("widths", [(101, 64, 101), (512, 256, 512)])
def test_layers_that_differ(converter, tmp_path, widths):
    """The architecture is `deci`, with a width and numbers of heads for each layer; all else is the converter's."""
    narrow(tmp_path / "narrow", widths=widths)
    converter.write_text(textwrap.dedent(CONVERTING))
    export(tmp_path / "narrow", tmp_path / "out", format="gguf", converter=converter)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"model.gguf"}
    subprocess.run([sys.executable, converter, tmp_path / "narrow", "--outfile", tmp_path / "stock"], check=True)
    (fields, tensors), (stock, expected) = contents(tmp_path / "out" / "model.gguf"), contents(tmp_path / "stock")
    assert tensors == expected and len(tensors) > 20
    numbers = [GGUFValueType.ARRAY, GGUFValueType.UINT32]
    changed = {
        "general.architecture": ([GGUFValueType.STRING], "deci"),
        "deci.feed_forward_length": (numbers, list(widths)),
        "deci.attention.head_count": (numbers, [4] * 3),
        "deci.attention.head_count_kv": (numbers, [2] * 3),
    }
    kept = {name.replace("llama.", "deci."): found for name, found in stock.items()}
    assert list(kept["tokenizer.ggml.tokens"][1]) == ["a", "b"]
    assert fields == kept | changed


def test_layers_that_differ_are_refused(converter, tmp_path, monkeypatch):
    """llama.cpp has no architecture for other families, and the package gguf may be missing."""
    narrow(tmp_path / "qwen", "qwen3", widths=(101, 64, 101))
    narrow(tmp_path / "llama", widths=(101, 64, 101))
    export(tmp_path / "llama", tmp_path / "served", format="nemotron-nas")
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name, message in (
        ("qwen", "llama.cpp reads for llama and mistral: it is qwen3; its attention normalises"),
        ("llama", "needs `pip install gguf`"),
        ("served", "`gluprune export --format hf` writes an export of gluprune back"),
    ):
        with pytest.raises(ValueError, match=message):
            export(tmp_path / name, tmp_path / "out", format="gguf", converter=converter)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "script, message",
    [
        ("import sys; print('INFO', file=sys.stderr); sys.exit('Model Mine is not supported')", "1: Model Mine is not"),
        ("open(__import__('sys').argv[3], 'w').write('half'); raise SystemExit(3)", "exit code 3: no message"),
        ("", "exit code 0: no message"),
    ],
)
def test_a_failing_converter_leaves_nothing(converter, script, message, tmp_path):
    narrow(tmp_path / "narrow", widths=(96, 96, 96))
    converter.write_text(script)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match=f"{CONVERTER} failed with .*{message}"):
        export(tmp_path / "narrow", tmp_path / "out", format="gguf", converter=converter)
    assert sorted(tmp_path.iterdir()) == before


def test_no_converter(tmp_path, monkeypatch, capsys):
    narrow(tmp_path / "narrow", widths=(96, 96, 96))
    monkeypatch.setenv("PATH", str(tmp_path))
    command = ["export", str(tmp_path / "narrow"), "--format", "gguf", "--out", str(tmp_path / "out")]
    assert main(command) == 2
    assert f"no {CONVERTER} on the PATH: clone llama.cpp, and give the file as --converter" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"no {CONVERTER} at absent"):
        export(tmp_path / "narrow", tmp_path / "out", format="gguf", converter="absent")
    with pytest.raises(ValueError, match="converter would be ignored: format='hf' needs none"):
        export(tmp_path / "narrow", tmp_path / "out", format="hf", converter="absent")
    assert not (tmp_path / "out").exists()
