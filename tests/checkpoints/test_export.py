"""`export`: there and back, what a format does not hold, and interruptions."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

import gluprune
from gluprune.checkpoints.export import export
from gluprune.checkpoints.stream import prune_checkpoint
from gluprune.cli import main
from gluprune.io.shards import INDEX_FILE, SINGLE_FILE
from gluprune.models import nemotron_nas
from gluprune.models.decilm.configuration_decilm import ffn_width
from gluprune.models.families import FAMILIES
from tests.helpers.composite_models import composite_model
from tests.helpers.marks import each_family
from tests.helpers.streaming import contents, reshard
from tests.helpers.tiny_models import make_tiny_model

LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "original_max_position_embeddings": 64},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
MODELS = {
    "llama": {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
    "mistral": {"sliding_window": None},
}
IDS = torch.arange(2, 50).view(2, 24)


def narrow(folder, family="llama", widths=(101, 64, 101), **config):
    """Save a random model with these widths, and return it."""
    dense = max(widths) + (min(widths) == max(widths))
    model = make_tiny_model(family, seed=0, intermediate_size=dense, **{**MODELS.get(family, {}), **config})
    for layer, width in enumerate(widths):
        if width < dense:
            gluprune.prune(model, intermediate_size=width, multiple_of=1, layers=[layer])
    gluprune.save(model, folder)
    return model


def edit(folder, **changes):
    entries = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(entries))


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("widths", [(101, 64, 101), (512, 256, 768), (96, 96, 96)], ids=str)
def test_there_and_back(family, widths, tmp_path):
    """Stock transformers computes the same logits from the export; what comes back is what was exported."""
    model = narrow(tmp_path / "narrow", family, widths)
    assert export(tmp_path / "narrow", tmp_path / "served", format="nemotron-nas") == tmp_path / "served"
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "served", trust_remote_code=True)
    assert type(served).__name__ == "DeciLMForCausalLM"
    assert [layer.mlp.down_proj.in_features for layer in served.model.layers] == list(widths)
    with torch.no_grad():
        assert torch.equal(served(IDS).logits, model(IDS).logits)
    entries = json.loads((tmp_path / "served" / "config.json").read_text())
    assert len(entries["block_configs"]) == 3 and entries["rope_theta"] == model.config.rope_parameters["rope_theta"]
    for block in entries["block_configs"]:
        assert ("ffn_mult" in block["ffn"]) == all(width % 256 == 0 for width in widths)
        assert ("intermediate_size" in block["ffn"]) != ("ffn_mult" in block["ffn"])
        assert block["attention"]["n_heads_in_group"] == 2

    export(tmp_path / "served", tmp_path / "back", format="hf")
    files = [f"{name}/{SINGLE_FILE}" for name in ("narrow", "served", "back")]
    assert len({os.stat(tmp_path / file).st_ino for file in files}) == 1
    again, before = contents(tmp_path / "back"), contents(tmp_path / "narrow")
    configs = [json.loads(files.pop("config.json")) for files in (again, before)]
    assert again == before and configs[0] == configs[1]
    with torch.no_grad():
        assert torch.equal(gluprune.load(tmp_path / "back")(IDS).logits, model(IDS).logits)


def test_a_saved_export_loads_again(tmp_path):
    """What transformers writes of it keeps the code and the widths."""
    model = narrow(tmp_path / "narrow")
    export(tmp_path / "narrow", tmp_path / "served", format="nemotron-nas")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "served", trust_remote_code=True)
    served.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_older_configs_leave_values_to_defaults(tmp_path):
    """Those of transformers are written out, since the readers have others."""
    model = make_tiny_model("mistral", seed=0, sliding_window=None, num_attention_heads=8, num_key_value_heads=8)
    model.save_pretrained(tmp_path / "narrow")
    entries = json.loads((tmp_path / "narrow" / "config.json").read_text())
    defaults = ("rms_norm_eps", "rope_parameters", "hidden_act", "tie_word_embeddings", "architectures")
    for name in (*defaults, "num_key_value_heads"):
        del entries[name]
    (tmp_path / "narrow" / "config.json").write_text(json.dumps(entries))
    expected = AutoConfig.from_pretrained(tmp_path / "narrow")
    export(tmp_path / "narrow", tmp_path / "served", format="nemotron-nas")
    found = AutoConfig.from_pretrained(tmp_path / "served", trust_remote_code=True)
    for name in ("rms_norm_eps", "rope_parameters", "hidden_act", "num_key_value_heads", "head_dim"):
        assert getattr(found, name) == getattr(expected, name), name
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "served", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(served(IDS).logits, model(IDS).logits)


def test_every_file_goes_along(tmp_path):
    """Shards, their index, tokenizer and licence; not other weights. The card says that there is code."""
    narrow(tmp_path / "narrow")
    reshard(tmp_path / "narrow", 3, seed=0)
    for name in ("tokenizer.json", "LICENSE", "pytorch_model.bin"):
        (tmp_path / "narrow" / name).write_text(f'"{name}"')
    export(tmp_path / "narrow", tmp_path / "served", format="nemotron-nas")
    before, after = contents(tmp_path / "narrow"), contents(tmp_path / "served")
    code = {"configuration_decilm.py", "modeling_decilm.py"}
    assert after.keys() == before.keys() - {"pytorch_model.bin"} | code and INDEX_FILE in after
    changed = {name for name in before.keys() & after.keys() if before[name] != after[name]}
    assert changed == {"config.json", "README.md"}
    card = after["README.md"].decode()
    assert "--trust-remote-code" in card and all(f"`{name}`" in card for name in code)
    assert b"import gluprune" not in b"".join(after[name] for name in code)
    for name in ("tokenizer.json", "LICENSE"):  # may be edited in place
        assert not (tmp_path / "served" / name).samefile(tmp_path / "narrow" / name)


def test_without_hard_links_weights_are_copied(tmp_path, monkeypatch):
    narrow(tmp_path / "narrow")

    def refuse(self, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(pathlib.Path, "hardlink_to", refuse)
    export(tmp_path / "narrow", tmp_path / "served", format="nemotron-nas")
    one, other = (tmp_path / name / SINGLE_FILE for name in ("narrow", "served"))
    assert one.read_bytes() == other.read_bytes() and not one.samefile(other)


def test_a_link_in_the_source_becomes_a_file(tmp_path):
    """The Hub's cache consists of links."""
    narrow(tmp_path / "narrow")
    (tmp_path / "narrow" / SINGLE_FILE).rename(tmp_path / "blob")
    (tmp_path / "narrow" / SINGLE_FILE).symlink_to("../blob")
    export(tmp_path / "narrow", tmp_path / "served", format="nemotron-nas")
    written = tmp_path / "served" / SINGLE_FILE
    assert not written.is_symlink() and written.samefile(tmp_path / "blob")


@pytest.mark.parametrize("hidden_size", [32, 576, 896, 2048, 3072, 4096, 5120, 8192])
def test_ffn_mult_is_inverted_by_its_readers(hidden_size):
    """Also after rounding to six digits, as MLX does."""
    for width in range(256, 65537, 256):
        for mult in (found := nemotron_nas.ffn_mult(width, hidden_size), round(found, 6)):
            assert ffn_width({"ffn_mult": mult}, hidden_size) == width


def assert_refused(folder, reason):
    """The export is refused with this reason, and neither the destination nor anything next to it is written."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises(ValueError, match=reason):
        export(folder, folder.parent / "out", format="nemotron-nas")
    assert sorted(folder.parent.iterdir()) == before


@pytest.mark.parametrize("family", each_family(sorted(FAMILIES.keys() - nemotron_nas.FAMILIES)))
def test_families_that_the_format_does_not_hold(family, tmp_path):
    make_tiny_model(family).save_pretrained(tmp_path / "narrow")
    assert_refused(
        tmp_path / "narrow", f"which holds llama and mistral: it is {family}; {nemotron_nas.obstacle(family)}"
    )
    assert nemotron_nas.obstacle(family) != nemotron_nas.obstacle("unknown")


@pytest.mark.parametrize(
    "family, changes, reason",
    [
        ("mistral", {"sliding_window": 4096}, "its attention uses a sliding window"),
        ("llama", {"hidden_act": "gelu"}, "its MLP uses gelu instead of silu"),
        ("llama", {"mlp_bias": True}, "its projections have biases, which readers other than vLLM drop"),
        ("llama", {"attention_bias": True}, "its projections have biases"),
        ("llama", {"rope_parameters": {**LLAMA3, "partial_rotary_factor": 0.5}}, "rotates only a part of each head"),
    ],
)
def test_models_of_these_families_that_it_does_not_hold(family, changes, reason, tmp_path):
    make_tiny_model(family, **changes).save_pretrained(tmp_path / "narrow")
    assert_refused(tmp_path / "narrow", f"it is {family}; .*{reason}")


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "it is quantized"),
        ({"auto_map": {"AutoConfig": "mine.Config"}}, r"it has code of its own \(auto_map\)"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "its class is LlamaForSequenceClassification, not Llama",
        ),
        ({"intermediate_size": 100}, "has shape .* the config says"),
        ({"model_type": "mixtral"}, "its MLPs are routed experts"),
    ],
)
def test_configs_that_it_does_not_hold(changes, reason, tmp_path):
    narrow(tmp_path / "narrow", widths=(64, 64, 64))
    edit(tmp_path / "narrow", **changes)
    assert_refused(tmp_path / "narrow", reason)


def test_vision_language_models_are_refused(tmp_path):
    composite_model("llava").save_pretrained(tmp_path / "narrow")
    assert_refused(tmp_path / "narrow", "it has other parts than text")


def test_what_cannot_be_written_back(tmp_path):
    """A checkpoint that is no export, and exports that were changed."""
    narrow(tmp_path / "narrow")
    with pytest.raises(ValueError, match="only an export in the format nemotron-nas can be written back, not 'llama'"):
        export(tmp_path / "narrow", tmp_path / "out", format="hf")
    export(tmp_path / "narrow", tmp_path / "served", format="nemotron-nas")
    with pytest.raises(ValueError, match="'nemotron-nas' is not supported: `gluprune export --format hf` writes"):
        export(tmp_path / "served", tmp_path / "out", format="nemotron-nas")
    entries = json.loads((tmp_path / "served" / "config.json").read_text())
    for changes, reason in (
        ({"block_configs": entries["block_configs"][:2]}, "holds the MLPs of 3 layers, its config says 2"),
        ({"block_configs": [{"ffn": {"no_op": True}}] * 3}, "is not as `gluprune export` wrote it: KeyError"),
        ({"block_configs": None}, "is not as `gluprune export` wrote it: TypeError"),
        ({"gluprune_model_type": "qwen3"}, "only an export in the format nemotron-nas"),
        ({"hidden_size": 31}, "the config says"),
    ):
        edit(tmp_path / "served", **(entries | changes))
        with pytest.raises(ValueError, match=reason):
            export(tmp_path / "served", tmp_path / "out", format="hf")
    assert not (tmp_path / "out").exists()


def test_bad_arguments(tmp_path):
    narrow(tmp_path / "narrow")
    with pytest.raises(ValueError, match="unknown format 'onnx'; allowed: nemotron-nas, hf, gguf"):
        export(tmp_path / "narrow", tmp_path / "out", format="onnx")
    with pytest.raises(ValueError, match="must lie outside the source"):
        export(tmp_path / "narrow", tmp_path / "narrow" / "out", format="nemotron-nas")
    with pytest.raises(ValueError, match="exists and is not empty"):
        export(tmp_path / "narrow", tmp_path, format="nemotron-nas")
    with pytest.raises(ValueError, match="absent is neither a model folder nor"):
        export(tmp_path / "absent", tmp_path / "out", format="nemotron-nas")
    assert not (tmp_path / "out").exists()


def test_other_commands_point_to_the_way_back(tmp_path):
    """Without running the code in the export."""
    narrow(tmp_path / "narrow")
    export(tmp_path / "narrow", tmp_path / "served", format="nemotron-nas")
    for command in (
        gluprune.info,
        gluprune.load,
        lambda folder: gluprune.load(folder, trust_remote_code=True),
        lambda folder: prune_checkpoint(folder, tmp_path / "out", intermediate_size=32, multiple_of=1, layers=[1]),
    ):
        with pytest.raises(ValueError, match="`gluprune export --format hf` writes an export of gluprune back"):
            command(tmp_path / "served")


@pytest.mark.parametrize("command", [["perplexity"], ["calibrate", "--out", "new"]])
def test_commands_refuse_an_export_before_they_read_its_tokenizer(command, tmp_path, capsys, monkeypatch):
    """For the tokenizer, transformers would ask whether to run the code in the export."""
    narrow(tmp_path / "narrow")
    export(tmp_path / "narrow", tmp_path / "served", format="nemotron-nas")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: pytest.fail("read"))
    monkeypatch.chdir(tmp_path)
    assert main([command[0], str(tmp_path / "served"), "--text", __file__, *command[1:]]) == 2
    assert "`gluprune export --format hf` writes an export of gluprune back" in capsys.readouterr().err


@pytest.mark.parametrize("widths, warned", [((101, 64, 101), True), ((512, 256, 512), False), ((256,) * 3, False)])
def test_command_line(widths, warned, tmp_path, capsys, caplog):
    narrow(tmp_path / "narrow", widths=widths)
    arguments = ["export", str(tmp_path / "narrow"), "--out", str(tmp_path / "served"), "--format", "nemotron-nas"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'served'}: nemotron-nas\n"
    assert ("vLLM reads them, other servers do not" in caplog.text) == warned
    assert ("all layers have one width" in caplog.text) == (len(set(widths)) == 1)
    arguments = ["export", str(tmp_path / "served"), "--out", str(tmp_path / "back"), "--format", "hf", "--json"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == {"format": "hf", "folder": str(tmp_path / "back")}
    assert main(["export", str(tmp_path / "narrow"), "--out", str(tmp_path / "x"), "--format", "onnx"]) == 2
    assert "'nemotron-nas', 'hf', 'gguf'" in capsys.readouterr().err


KILL_SCRIPT = """
    import os, pathlib, signal, sys

    import torch

    torch.set_num_threads(1)  # a process that has used more cannot fork
    from gluprune.checkpoints.export import export
    from gluprune.io import atomic

    source, work = map(pathlib.Path, sys.argv[1:])


    def contents(folder):
        return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


    def killing(function, rest):
        def call(*arguments):
            if not rest[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            rest[0] -= 1
            return function(*arguments)

        return call


    export(source, work / "expected", format="nemotron-nas")
    before, kills = contents(source), 0
    while not (work / "out").exists():
        child = os.fork()
        if not child:
            rest = [kills]
            atomic.fsync = lambda descriptor: None  # slow, and a killed process loses nothing that it has written
            atomic.write, atomic.rename = killing(atomic.write, rest), killing(atomic.rename, rest)
            pathlib.Path.hardlink_to = killing(pathlib.Path.hardlink_to, rest)
            export(source, work / "out", format="nemotron-nas")
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert contents(source) == before
        if os.WIFSIGNALED(status):
            kills += 1
            assert not (work / "out").exists()
        else:
            assert status == 0
            assert (work / "out").exists()
    assert contents(work / "out") == contents(work / "expected")
    print(kills)
"""


@pytest.mark.slow
def test_a_kill_leaves_nothing_half(tmp_path):
    """Killed before each write, link and rename in turn, until one run completes."""
    narrow(tmp_path / "narrow")
    (tmp_path / "work").mkdir()
    arguments = [sys.executable, "-c", textwrap.dedent(KILL_SCRIPT), tmp_path / "narrow", tmp_path / "work"]
    done = subprocess.run(arguments, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


def test_an_output_in_what_was_downloaded(tiny_model, tmp_path, monkeypatch):
    gluprune.save(tiny_model(), tmp_path / "snapshot")
    monkeypatch.setattr("gluprune.checkpoints.export.local_folder", lambda source: tmp_path / "snapshot")
    with pytest.raises(ValueError, match="must lie outside the source .*snapshot"):
        gluprune.export("me/model", tmp_path / "snapshot" / "out", format="nemotron-nas")
    assert not (tmp_path / "snapshot" / "out").exists()
