"""Stock `generate` of patched, pruned models: decode steps compiled over a static cache, and continuous batching."""

import copy

import pytest
import torch
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig

import gluprune
from tests.helpers.marks import slow
from tests.helpers.tiny_models import DEVICE, tiny_model, token_ids

WINDOW = 6
CASES = {
    "llama": {"num_hidden_layers": 1},
    "phi3": {"num_hidden_layers": 1, "sliding_window": None},
    "mistral": {"num_hidden_layers": 1, "sliding_window": WINDOW},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW},
}


def pruned_model(family):
    """A model of an unaligned width."""
    model = tiny_model(family, device=DEVICE, **CASES[family])
    model.generation_config.pad_token_id = 0
    gluprune.prune(model, pruning_ratio=0.3, multiple_of=1)
    return model


def generate(model, ids, new=6, **options):
    """Greedy generation of `new` tokens; zeros in `ids` are padding."""
    mask = (ids != 0).long()
    return model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, **options)


def compiled(model, ids, backend, new=6):
    """The same where transformers compiles the decode step; on a CPU, it does so only for this private flag."""
    config = CompileConfig(fullgraph=True, backend=backend, mode="reduce-overhead" if backend == "inductor" else None)
    config._compile_all_devices = True
    return generate(model, ids, new, cache_implementation="static", compile_config=config)


class Graphs(list):
    """The graphs that torch.compile compiles; its method is the compiler."""

    def compile(self, graph, inputs):
        self.append(graph)
        return graph.forward

    def products(self):
        """The number of fused MLPs in each graph."""
        return [str(graph.graph).count("gluprune.glu_mlp") for graph in self]

    def __deepcopy__(self, memo):  # transformers copies the compile config
        return self


def padded(*lengths):
    ids = token_ids(len(lengths), max(lengths), seed=sum(lengths), device=DEVICE)
    for row, length in zip(ids, lengths, strict=True):
        row[: max(lengths) - length] = 0
    return ids


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", CASES)
def test_a_compiled_decode_step_serves_later_prompts(family, batch, kernel_calls):
    """The first call crosses the sliding window and allocates the longest cache; the later ones compile nothing."""
    torch.compiler.reset()
    model, graphs = pruned_model(family), Graphs()
    layers = model.config.num_hidden_layers
    prompts = [(4, 1, 2)[:batch], (4, 4, 3)[:batch], (9, 2, 7)[:batch], (3, 2, 1)[:batch]]
    news = 12, 6, 6, 6
    stock = copy.deepcopy(model)
    gluprune.patch(model, "cublas")
    for number, (lengths, new) in enumerate(zip(prompts, news, strict=True)):
        ids = padded(*lengths)
        expected = generate(stock, ids, new)
        kernel_calls.clear()
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            assert torch.equal(compiled(model, ids, graphs.compile, new), expected), lengths
        assert len(kernel_calls) == layers * new
        if number == 0:
            first = len(graphs)
    assert len(graphs) == first and set(graphs.products()) == {layers}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "cublas"])
def test_transformers_own_compile_options(backend):
    torch.compiler.reset()
    model = pruned_model("llama")
    stock = copy.deepcopy(model)
    gluprune.patch(model, backend)
    for number, length in enumerate((7, 7, 3)):
        ids = padded(length)
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            assert torch.equal(compiled(model, ids, "inductor"), generate(stock, ids))


@pytest.mark.slow
def test_patching_and_pruning_after_a_compiled_call_take_effect():
    torch.compiler.reset()
    model, ids = tiny_model(width=128, device=DEVICE, num_hidden_layers=1), padded(5)
    graphs = Graphs()
    model.generation_config.pad_token_id = 0
    for change, fused in (
        (lambda: None, 0),
        (lambda: gluprune.patch(model, "cublas"), 1),
        (lambda: gluprune.prune(model, pruning_ratio=0.5, multiple_of=1), 1),
        (lambda: gluprune.unpatch(model), 0),
    ):
        change()
        graphs.clear()
        assert torch.equal(compiled(model, ids, graphs.compile), generate(model, ids))
        assert graphs.products() == [fused]


@pytest.mark.parametrize("family", ["llama", *slow("phi3", "mistral", "gemma3_text")])
def test_continuous_batching(family, kernel_calls):
    """`generate_batch` packs the prompts into one row and runs the model in a thread."""
    model = pruned_model(family)
    prompts = [token_ids(1, length, seed=length, device=DEVICE) for length in (7, 3, 12)]
    expected = [generate(model, ids)[0, ids.shape[1] :].tolist() for ids in prompts]
    gluprune.patch(model, "cublas", norms=True)
    results = model.generate_batch(
        [ids[0].tolist() for ids in prompts],
        generation_config=GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=32),
        progress_bar=False,
    )
    assert [results[name].generated_tokens for name in sorted(results)] == expected
    assert kernel_calls.count("cublas") >= 6 * model.config.num_hidden_layers
