"""Which programs take which widths, in the table and in `info`."""

import json

import pytest
from transformers import LlamaConfig

from gluprune.checkpoints.info import info
from gluprune.cli import main
from gluprune.models.consumers import CONSUMERS, verdict
from gluprune.models.families import FAMILIES
from gluprune.models.nemotron_nas import FAMILIES as EXPRESSIBLE

OUTCOMES = {
    922: {
        **dict.fromkeys(["transformers", "vllm", "tp2", "llama.cpp"], "works slower"),
        **dict.fromkeys(["tp4", "tp8", "fp8", "awq", "gptq"], "refused"),
    },
    1024: {},
    1152: {"llama.cpp": "works slower"},
    1280: {},
}


@pytest.fixture
def folder_of(tmp_path):
    """Write the config of a Llama with one layer of a given width."""

    def write(width, heads=8):
        LlamaConfig(
            hidden_size=384, intermediate_size=width, num_hidden_layers=1, num_attention_heads=heads, vocab_size=8
        ).save_pretrained(tmp_path)
        return tmp_path

    return write


@pytest.mark.parametrize("width", OUTCOMES)
def test_info_says_where_a_width_runs(folder_of, width, capsys):
    """A line for each consumer; anything but "works" has a reason that names the width."""
    expected = dict.fromkeys(CONSUMERS, "works") | OUTCOMES[width]
    found = info(folder_of(width)).consumers
    assert {name: each.outcome for name, each in found.items()} == expected
    for each in found.values():
        assert (each.reason == "") == (each.outcome == "works")
        assert each.outcome == "works" or f"{width} is not a multiple of " in each.reason
    assert main(["info", str(folder_of(width))]) == 0
    text = capsys.readouterr().out
    assert all(line in text for line in (f"{name:<12}  {each}\n" for name, each in found.items()))
    assert main(["info", str(folder_of(width)), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["consumers"]
    assert printed == {name: {"outcome": each.outcome, "reason": each.reason} for name, each in found.items()}


def test_attention_heads_divide_among_ranks(folder_of):
    found = info(folder_of(1024, heads=12))
    assert found.tensor_parallel == {2: True, 4: True, 8: False}
    outcomes = {name: str(each) for name, each in found.consumers.items()}
    assert outcomes.pop("tp8") == "refused: 12 attention heads do not divide among 8 ranks"
    assert set(outcomes.values()) == {"works"}


@pytest.mark.parametrize("name", CONSUMERS)
@pytest.mark.parametrize("by_layer", [False, True])
def test_multiples_of_the_multiple_work(name, by_layer):
    """What `deploy=` rounds to is what the consumer takes; smaller powers of two are worse."""
    multiple = CONSUMERS[name].multiple
    widths = [3 * multiple, 5 * multiple if by_layer else 3 * multiple]
    assert verdict(CONSUMERS[name], widths, "llama").outcome == "works"
    worse = [3 * multiple // 2, *widths[1:]] if by_layer else [3 * multiple // 2] * 2
    assert verdict(CONSUMERS[name], worse, "llama").outcome != "works"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_layers_that_differ_need_an_export_that_holds_the_family(model_type):
    for entry in CONSUMERS.values():
        found = verdict(entry, [512, 1024], model_type)
        if model_type in EXPRESSIBLE:
            assert (found.outcome, "gluprune export" in found.reason) == ("works", True)
        else:
            assert found.outcome == "refused" and model_type in found.reason
        assert verdict(entry, [512, 512], model_type).outcome == "works"


def test_which_export_layers_that_differ_need():
    for name, entry in CONSUMERS.items():
        form = "gguf" if name == "llama.cpp" else "nemotron-nas"
        also = "; not tested: quantizing that export" if name in ("fp8", "awq", "gptq") else ""
        if name == "transformers":
            also = "; or with gluprune.load, as they are"
        assert verdict(entry, [512, 256 * 9], "llama").reason == f"after `gluprune export --format {form}`{also}"
    slower = verdict(CONSUMERS["llama.cpp"], [128, 256], "llama")
    assert slower.outcome == "works slower" and slower.reason.endswith("; after `gluprune export --format gguf`")


@pytest.mark.parametrize("name, refused", [("awq", True), ("gptq", True), ("fp8", False), ("vllm", False)])
def test_hidden_sizes_that_groups_of_weights_do_not_divide(name, refused):
    found = verdict(CONSUMERS[name], [1280, 1280], "llama", hidden_size=576)
    assert (found.outcome == "refused") == refused
    assert not refused or found.reason == "the hidden size 576 is not a multiple of 128"
    assert verdict(CONSUMERS[name], [1280, 1280], "llama", hidden_size=640).outcome == "works"
