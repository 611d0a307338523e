"""The timer of generation, on a model whose steps take a known time; the decoding methods give equal tokens."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import gluprune
from gluprune.measure import decoding
from gluprune.measure.decoding import (
    GenerationTiming,
    StaticGenerator,
    make_generator,
    time_generation,
    time_generator,
)
from gluprune.models.families import FAMILIES
from tests.helpers.marks import each_family

NEW_TOKENS = 7


@pytest.mark.parametrize("batch", [1, 3])
def test_prefill_and_decode_are_timed_separately(tiny_model, monkeypatch, batch):
    """Prefill takes 0.2 s and a decode step 0.02 s, by a scripted clock."""
    model, steps, now = tiny_model(), [], [0.0]
    original = model.forward
    monkeypatch.setattr(decoding, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def slow(*arguments, **options):
        tokens = options["input_ids"].shape[1]
        steps.append(tokens)
        now[0] += 0.2 if tokens > 1 else 0.02
        return original(*arguments, **options)

    monkeypatch.setattr(model, "forward", slow)
    timing = time_generation(model, torch.randint(3, 64, (batch, 9)), new_tokens=6, repeats=2)
    assert steps == [9, 1, 1, 1, 1, 1] * 3  # a warm-up and two repeats, each of exactly six tokens
    assert len(timing.ttfts) == len(timing.ttlts) == 2
    assert timing.ttfts == pytest.approx([0.2, 0.2]) and timing.tpots == pytest.approx([0.02, 0.02])
    assert timing.ttlt == pytest.approx(timing.ttft + 5 * 0.02)
    assert timing.ttlt == pytest.approx(timing.ttft + 5 * timing.tpot)
    assert timing.prefill_tokens_per_second == pytest.approx(9 * batch / timing.ttft)
    assert timing.decode_tokens_per_second == pytest.approx(batch / timing.tpot)


def test_medians_and_time_per_token():
    timing = GenerationTiming(2, 9, 5, ttfts=(1.0, 2.0, 6.0), ttlts=(5.0, 4.0, 7.0))
    assert timing.tpots == (1.0, 0.5, 0.25)
    assert (timing.ttft, timing.tpot, timing.ttlt) == (2.0, 0.5, 5.0)


def test_end_of_sequence_does_not_stop_it(tiny_model, monkeypatch):
    model = tiny_model()
    model.lm_head.weight.data[2] = 100 * model.lm_head.weight.data.abs().max()  # token 2 ends; it is likely
    calls = []
    original = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **o: calls.append(1) or original(*a, **o))
    assert time_generation(model, torch.randint(3, 64, (1, 4)), new_tokens=7, repeats=1).new_tokens == 7
    assert len(calls) == 14


def test_one_new_token_is_too_few(tiny_model):
    with pytest.raises(ValueError, match=r"at least 2 .*, got 1"):
        time_generation(tiny_model(), torch.tensor([[5, 6]]), new_tokens=1)


# --- all decoding methods give the same tokens ---


def generate(generator, prompt, new_tokens=NEW_TOKENS):
    """The tokens, and the number of calls of `on_token`."""
    calls = []
    tokens = generator(prompt, new_tokens, lambda: calls.append(1))
    return tokens.tolist(), len(calls)


def assert_same_tokens(model, generator):
    """The tokens of `generate` of a model, also in later runs, whose cache has values of an earlier one, and with fewer
    tokens than the cache has room.
    """
    for new_tokens in (NEW_TOKENS, NEW_TOKENS, 3, 1):
        prompt = torch.randint(3, 64, (2, 9), device=model.device)
        plain, count = generate(make_generator("generate", model, prompt, new_tokens), prompt, new_tokens)
        assert count == new_tokens
        assert [len(row) for row in plain] == [new_tokens] * 2 and not any(2 in row for row in plain)
        assert generate(generator, prompt, new_tokens) == (plain, new_tokens)


@pytest.mark.parametrize("family", each_family(name for name in FAMILIES if name not in ("gemma2", "gemma3_text")))
def test_the_static_step_gives_the_tokens_of_generate(tiny_model, family):
    model = tiny_model(family, seed=3, **({"sliding_window": None} if family in ("mistral", "phi3") else {}))
    assert_same_tokens(model, StaticGenerator(model, torch.ones(2, 9, dtype=torch.long), NEW_TOKENS, lambda step: step))


class HostTraffic(TorchDispatchMode):
    """Records operators that synchronise with the GPU or copy from host memory, which a CUDA graph cannot contain."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if name in {f"aten::{op}" for op in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "lift_fresh")}:
            self.seen.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_the_static_step_can_be_captured(tiny_model, family):
    prompt = torch.ones(2, 9, dtype=torch.long)
    model = tiny_model(family, **({"sliding_window": None} if family == "phi3" else {}))
    generator = StaticGenerator(model, prompt, NEW_TOKENS, lambda step: step)
    with torch.no_grad(), HostTraffic() as traffic:
        assert generator.position.item() == 0 and traffic.seen == ["aten::_local_scalar_dense"]  # it would show
        generator._prefill(prompt)
        traffic.seen.clear()
        generator.run_step()
    assert not traffic.seen


def test_end_of_sequence_is_never_chosen(tiny_model):
    """Token 2 would be chosen: both methods must suppress it."""
    model = tiny_model(seed=3)
    model.lm_head.weight.data[2] = 100 * model.lm_head.weight.data.abs().max()
    assert_same_tokens(model, StaticGenerator(model, torch.ones(2, 9, dtype=torch.long), NEW_TOKENS, lambda step: step))


@pytest.mark.slow
def test_the_compiled_step_gives_the_tokens_of_generate(tiny_model):
    model = gluprune.patch(tiny_model(seed=3, num_hidden_layers=1))
    prompt = torch.randint(3, 64, (2, 9))
    generator = make_generator("compiled", model, prompt, NEW_TOKENS)
    assert_same_tokens(model, generator)
    assert time_generator(generator, [prompt] * 3, NEW_TOKENS).ttlt > 0


@pytest.mark.filterwarnings("error:.past_key_values. is deprecated:FutureWarning")
def test_the_static_step_calls_the_cache_as_this_version_of_transformers_does(tiny_model):
    StaticGenerator(tiny_model(seed=3), torch.ones(2, 9, dtype=torch.long), NEW_TOKENS, lambda step: step)


def test_a_static_cache_gives_the_tokens_of_generate(tiny_model):
    model, prompt = tiny_model(seed=3), torch.randint(3, 64, (2, 9))
    assert_same_tokens(model, make_generator("static", model, prompt, NEW_TOKENS))


@pytest.mark.cuda
def test_graph_decoding_is_on_as_long_as_its_generator(tiny_model):
    model = tiny_model(seed=3).cuda()
    eager = copy.deepcopy(model)  # while it is on, `generate` of the model uses graphs as well
    prompt = torch.randint(3, 64, (2, 9), device="cuda")
    for _ in range(2):
        generator = make_generator("graph_decoding", model, prompt, NEW_TOKENS)
        assert "get_compiled_call" in vars(model)
        assert_same_tokens(eager, generator)
        del generator
        assert "get_compiled_call" not in vars(model)


@pytest.mark.cuda
@pytest.mark.parametrize("width", [101, 128])
@pytest.mark.parametrize("is_patched", [False, True])
def test_the_graph_gives_the_tokens_of_generate(tiny_model, is_patched, width):
    model = tiny_model(seed=3, intermediate_size=width).cuda()
    if is_patched:
        gluprune.patch(model)
    prompt = torch.randint(3, 64, (2, 9), device="cuda")
    assert_same_tokens(model, make_generator("graph", model, prompt, NEW_TOKENS))


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the error on a machine without CUDA")
@pytest.mark.parametrize("decoding", ["graph", "graph_decoding"])
def test_a_graph_needs_cuda(tiny_model, decoding):
    with pytest.raises(ValueError, match=f"decoding '{decoding}' needs a CUDA device, the model is on cpu"):
        time_generation(tiny_model(), torch.tensor([[5, 6]]), new_tokens=2, decoding=decoding)


def test_unknown_decoding(tiny_model):
    with pytest.raises(
        ValueError, match="unknown decoding 'fast'; allowed: generate, static, graph_decoding, compiled, graph"
    ):
        time_generation(tiny_model(), torch.tensor([[5, 6]]), new_tokens=2, decoding="fast")


def test_sliding_windows_do_not_support_the_static_step(tiny_model):
    with pytest.raises(ValueError, match="this model has a sliding window"):
        make_generator("compiled", tiny_model("gemma2"), torch.tensor([[5, 6]]), 2)
