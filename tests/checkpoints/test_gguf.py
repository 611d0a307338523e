"""`export` to GGUF, with a script in the place of llama.cpp's converter."""

import json
import textwrap

import pytest

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


def test_layers_that_differ(converter, tmp_path):
    """The converter reads them only from an export, and only multiples of 256."""
    for name, widths in (("coarse", (512, 256, 512)), ("fine", (101, 64, 101))):
        narrow(tmp_path / name, widths=widths)
        with pytest.raises(
            ValueError, match="layers of different widths: export it as nemotron-nas, then that as gguf"
        ):
            export(tmp_path / name, tmp_path / "out", format="gguf", converter=converter)
        export(tmp_path / name, tmp_path / f"{name}-served", format="nemotron-nas")
    with pytest.raises(ValueError, match="widths are not multiples of 256"):
        export(tmp_path / "fine-served", tmp_path / "out", format="gguf", converter=converter)
    assert not (tmp_path / "out").exists()
    export(tmp_path / "coarse-served", tmp_path / "out", format="gguf", converter=converter)
    assert (tmp_path / "out" / "model.gguf").read_text() == "GGUF of DeciLMForCausalLM"


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
