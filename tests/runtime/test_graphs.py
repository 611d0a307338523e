"""Graph decoding: what `generate` asks for, what is copied, captured, replayed and handed back.

Without a GPU, a stand-in for the capture runs the step again at each replay, on the buffers that a graph would read.
"""

import copy
import inspect
import logging
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import (
    CompileConfig,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
)

import gluprune
from gluprune.runtime import graphs
from tests.helpers.tiny_models import tiny_model

ON_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if ON_CUDA else "cpu"


@pytest.fixture
def captures(monkeypatch):
    """The number of captures so far."""
    counts = [0]
    genuine = graphs.capture

    def rerun(run, reset, device):
        """Run the captured step at each replay, on the tensors of the first cache, without keeping that cache."""
        place = run.__code__.co_freevars.index("cache")
        cache = copy.copy(run.__closure__[place].cell_contents)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        run.__closure__[place].cell_contents = cache
        with torch.no_grad():
            for _ in range(2):
                run()
                reset()
            outputs = run()
        reset()

        def replay():
            for kept, new in zip(tree_leaves(outputs), tree_leaves(run()), strict=True):
                if isinstance(kept, torch.Tensor):
                    kept.copy_(new)

        return replay, outputs

    def counting(*args):
        counts[0] += 1
        return (genuine if ON_CUDA else rerun)(*args)

    monkeypatch.setattr(graphs, "capture", counting)
    monkeypatch.setattr(graphs, "DEVICE_TYPES", (DEVICE,))
    return counts


@pytest.fixture
def model():
    model = tiny_model(width=128, device=DEVICE)
    model.generation_config.pad_token_id = 0
    return model


def prompt(batch=1, length=5, seed=0):
    return torch.randint(5, 60, (batch, length), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def generate(model, ids, **options):
    """Greedy generation of 6 tokens over a static cache; on a CPU, `generate` asks for a compiled call only so."""
    config = CompileConfig()
    config._compile_all_devices = True
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, **options}
    return model.generate(ids, compile_config=config, **options)


def stock(model, ids, **options):
    """The same by eager steps."""
    common = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "disable_compile": True}
    options = {**common, **options}
    return model.generate(ids, **options)


def test_the_same_tokens_and_one_capture(model, captures):
    expected = [stock(model, prompt(seed=seed)) for seed in range(3)]
    with gluprune.graph_decoding(model):
        assert [torch.equal(generate(model, prompt(seed=n)), each) for n, each in enumerate(expected)] == [True] * 3
    assert captures == [1]


def test_lengths_and_batches_are_captured_by_themselves(model, captures):
    padded = prompt(3, 7)
    mask = torch.ones_like(padded)
    mask[0, :4], mask[1, :1] = 0, 0
    cases = [
        (prompt(1, 9), {}),
        (prompt(1, 5), {}),  # in the cache of the longer one
        (padded, {"attention_mask": mask}),
        (prompt(2, 4), {"do_sample": True, "top_k": 5}),
        (prompt(1, 5), {"repetition_penalty": 1.3, "num_return_sequences": 1}),
    ]
    for ids, options in cases:
        torch.manual_seed(0)
        expected = stock(model, ids, **options)
        with gluprune.graph_decoding(model):
            for _ in range(2):
                torch.manual_seed(0)
                assert torch.equal(generate(model, ids, **options), expected), options
    assert captures[0] >= len(cases)
    with gluprune.graph_decoding(model):
        before = captures[0]
        for ids, _ in cases[:2]:
            generate(model, ids)
        assert captures[0] == before + 1, "a shorter prompt runs in the cache of a longer one"


def test_captured_on_the_stream_of_the_warm_up(monkeypatch):
    """Without a stream, torch takes one of the device on which the process captured first."""
    streams, given = [], []

    def make_stream():
        streams.append(SimpleNamespace(wait_stream=lambda other: None))
        return streams[-1]

    def graph(graph, stream=None):
        given.append(stream)
        return nullcontext()

    replaced = {"Stream": make_stream, "graph": graph, "CUDAGraph": SimpleNamespace, "current_stream": make_stream}
    for name, value in {**replaced, "stream": nullcontext, "device": nullcontext}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    calls = []
    graphs.capture(lambda: calls.append(1), lambda: None, torch.device("cuda", 1))
    assert given == streams[:1] and len(calls) == 3


@pytest.mark.parametrize("name", graphs.CACHE_NAMES)
@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated:FutureWarning")
def test_both_names_of_the_cache(model, captures, name):
    """transformers 5.24 renamed it."""
    if name == "cache" and name not in inspect.signature(model.forward).parameters:
        pytest.skip("this version of transformers calls it past_key_values")
    ids = prompt(length=1)
    with gluprune.graph_decoding(model), torch.no_grad():
        step = model.get_compiled_call(None)
        cache = StaticCache(config=model.config, max_cache_len=4)
        found = step(input_ids=ids, use_cache=True, **{name: cache})
        torch.testing.assert_close(found.logits, model(ids).logits, atol=1e-5, rtol=1e-5)
    assert captures == [1] and next(value for value in found.values() if isinstance(value, StaticCache)) is cache


def test_streaming_and_stopping(model, captures):
    """Both belong to transformers and see every token."""

    class Streamer:
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.tokens.append("end")

    class After(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 8, device=input_ids.device)

    ids, streamer = prompt(), Streamer()
    with gluprune.graph_decoding(model):
        found = generate(model, ids, streamer=streamer, stopping_criteria=StoppingCriteriaList([After()]))
    assert found.shape[1] == 8 and streamer.tokens == [*found[0].tolist(), "end"] and captures == [1]


def test_scores_and_hidden_states_are_not_overwritten(model, captures):
    ids = prompt()
    options = {"return_dict_in_generate": True, "output_logits": True, "output_hidden_states": True}
    expected = stock(model, ids, **options)
    with gluprune.graph_decoding(model):
        found = generate(model, ids, **options)
    for name in ("logits", "hidden_states"):
        for ours, theirs in zip(tree_leaves(found[name]), tree_leaves(expected[name]), strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_cache_in_use_keeps_its_contents(model, captures, caplog):
    ids, other = prompt(), prompt(seed=1)
    with gluprune.graph_decoding(model):
        first = generate(model, ids, return_dict_in_generate=True)
        kept = [layer.keys.clone() for layer in first.past_key_values.layers]
        assert torch.equal(generate(model, other), stock(model, other))
        for layer, keys in zip(first.past_key_values.layers, kept, strict=True):
            assert torch.equal(layer.keys, keys)
        del first, layer
        assert torch.equal(generate(model, other), stock(model, other))
    assert captures == [1]


@pytest.mark.parametrize("change", ["prune", "patch", "weight", "hook"])
def test_a_changed_model_is_captured_again(model, captures, change):
    ids = prompt()
    with gluprune.graph_decoding(model):
        generate(model, ids)
        if change == "prune":
            gluprune.prune(model, intermediate_size=64, multiple_of=1)
        elif change == "patch":
            gluprune.patch(model)
        elif change == "weight":
            layer = model.model.layers[0].mlp.down_proj
            layer.weight = torch.nn.Parameter(-layer.weight.detach())
        else:
            model.model.layers[1].register_forward_hook(lambda module, inputs, output: 2 * output)
        assert torch.equal(generate(model, ids), stock(model, ids))
    assert captures == [2]


def test_the_number_of_graphs_is_bounded(model, captures, monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    with gluprune.graph_decoding(model) as decoding:
        for batch in (1, 2, 3, 1):
            assert torch.equal(generate(model, prompt(batch)), stock(model, prompt(batch)))
        assert len(decoding._steps) == 2
    assert captures == [4] and not decoding._steps


def test_what_cannot_be_captured_runs_as_usual(captures, caplog):
    sliding = MistralForCausalLM(
        MistralConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=6,
            eos_token_id=None,
        )
    )
    sliding = sliding.eval().to(DEVICE)
    sliding.generation_config.pad_token_id = 0
    with gluprune.graph_decoding(sliding), caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(generate(sliding, prompt()), stock(sliding, prompt()))
    lines = [record.getMessage() for record in caplog.records if record.name == "gluprune.runtime.graphs"]
    assert lines == ["decoding without a CUDA graph: the cache has a StaticSlidingWindowLayer"]
    assert captures == [0]


def test_an_error_while_capturing_is_reported_once(model, captures, caplog, monkeypatch):
    def refuse(run, reset, device):
        run()  # what counted is taken back
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(graphs, "capture", refuse)
    with gluprune.graph_decoding(model), caplog.at_level(logging.WARNING):
        assert torch.equal(generate(model, prompt()), stock(model, prompt()))
    lines = [record.getMessage() for record in caplog.records if record.name == "gluprune.runtime.graphs"]
    assert lines == ["decoding without a CUDA graph: operation not permitted when stream is capturing"]


def test_on_and_off(model, captures):
    before = dict(vars(model)), model.generation_config.to_dict()
    decoding = gluprune.graph_decoding(model)
    assert model.generation_config.cache_implementation == "static"
    with pytest.raises(ValueError, match="is graph decoding on already"):
        gluprune.graph_decoding(model)
    decoding.close()
    decoding.close()
    assert (dict(vars(model)), model.generation_config.to_dict()) == before
    with pytest.raises(TypeError, match="Linear has no `generate`"):
        gluprune.graph_decoding(torch.nn.Linear(2, 2))


@pytest.mark.skipif(ON_CUDA, reason="needs a model that is not on CUDA")
def test_no_effect_on_a_cpu(model, caplog):
    with caplog.at_level(logging.WARNING), gluprune.graph_decoding(model):
        assert model.generation_config.cache_implementation is None
        assert torch.equal(stock(model, prompt()), stock(model, prompt()))
    assert "graph decoding has no effect on cpu" in caplog.text
