"""`gluprune bench` on a tiny model: widths, tokens, bytes and joules in the records; errors."""

import dataclasses
import json

import pytest
import torch

import gluprune
from gluprune.checkpoints.load_save import build_empty
from gluprune.cli import main
from gluprune.measure import bench
from gluprune.measure.bench import BenchPlan, Workload
from gluprune.measure.energy import Energy, Meter, Unmetered
from gluprune.measure.random_models import CONFIGS, random_model
from gluprune.measure.records import read
from gluprune.models.glu import model_glus

TINY = BenchPlan((Workload(2, 5, 4),), ("generate",), ratios=(0.4,), repeats=3)


def run(model, plan=TINY):
    found = []
    bench.bench(model, "tiny", plan, torch.device("cpu"), found.append)
    return found


def measured(model, workload, meter, idle, decoding="generate", plan=TINY):
    common = bench.described(model, "tiny", "transformers", decoding, workload)
    return list(bench.measure(model, common, workload, plan=plan, meter=meter, idle=idle))


@pytest.mark.slow
def test_records_of_every_width(tiny_model):
    model = tiny_model(intermediate_size=256, seed=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = run(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    # dense, 256 - int(0.4 * 256), and the multiple of 128 nearest to that
    assert list(dict.fromkeys(record.shape["I"] for record in found)) == [256, 154, 128]
    by = {(record.shape["I"], record.what): record for record in found}
    for width in (256, 154, 128):
        assert by[width, "generation: TPOT"].repeats == 3
        first, each, whole = (by[width, f"generation: {what}"].p50 for what in ("TTFT", "TPOT", "TTLT"))
        assert whole == pytest.approx(first + 3 * each, rel=0.5)
        assert by[width, "generation: tokens per second"].p50 == pytest.approx(2 * 4 / whole)  # medians of three
        attention = 2 * 32 * 32 + 2 * 32 * 16
        layer = 3 * 32 * width + attention + 2 * 32
        assert by[width, "generation: TPOT"].nbytes == 4 * (
            3 * layer + 32 + 64 * 32
        )  # and the head, not the embeddings
        assert by[width, "generation: TPOT"].shape == {
            "model": "tiny",
            "H": 32,
            "I": width,
            "batch": 2,
            "prompt": 5,
            "new tokens": 4,
            "decoding": "generate",
        }
        weights = 4 * (3 * layer + 32 + 2 * 64 * 32)
        assert by[width, "generation: peak memory"].p50 >= weights
    assert {record.provider for record in found} == {"transformers"}


def test_tied_embeddings_are_read_as_the_head(tiny_model):
    tied, untied = (tiny_model(tie_word_embeddings=tied) for tied in (True, False))
    assert bench.weight_bytes(tied) == bench.weight_bytes(untied) == sum(p.nbytes for p in tied.parameters())


class ScriptedMeter(Meter):
    """Every window takes 2 s; a run takes 10 J plus 6 J for each new token. Idle power is 3 W."""

    def __init__(self):
        super().__init__(Unmetered(""))

    def repeat(self, work, seconds=5.0):
        tokens = work().shape[1]
        return Energy(4 * (10.0 + 6.0 * tokens), 2.0, "scripted"), 4


def test_joules(tiny_model):
    model = tiny_model(seed=1)
    found = measured(model, Workload(2, 5, 4), ScriptedMeter(), Energy(9.0, 3.0, "scripted"))
    by = {record.what: record for record in found}
    assert by["generation: energy"].p50 == (10 + 6 * 4) / (2 * 4)
    assert by["generation: energy"].method == "scripted"
    assert by["generation: energy above idle"].p50 == (4 * (10 + 6 * 4) - 3 * 2) / (4 * 2 * 4)
    assert by["generation: energy above idle"].method == "scripted, less 3 W at rest"
    assert by["generation: energy of the prefill"].p50 == 10 + 6


def test_energy_that_was_not_measured_has_a_reason_and_no_figure(tiny_model):
    meter = Meter(Unmetered("no counter"))
    found = measured(tiny_model(), Workload(1, 5, 2), meter, meter.idle())
    energy = [record for record in found if "energy" in record.what]
    assert [(record.p50, record.refusal) for record in energy] == [(None, "not measured: no counter")]


def test_energy_that_was_not_requested_has_no_record(tiny_model):
    plan = dataclasses.replace(TINY, energy_seconds=None)
    records = measured(tiny_model(), Workload(1, 5, 2), ScriptedMeter(), Energy(9.0, 3.0, ""), plan=plan)
    found = [record.what for record in records]
    assert "generation: TTLT" in found and not any("energy" in what for what in found)


def test_a_decoding_that_the_model_does_not_support_is_recorded(tiny_model):
    meter = Meter(Unmetered("no counter"))
    (missing,) = measured(tiny_model("gemma2"), Workload(1, 5, 2), meter, meter.idle(), decoding="compiled")
    assert (missing.what, missing.p50) == ("generation: TTLT", None) and "sliding window" in missing.refusal


def test_prompts_depend_only_on_the_seed(tiny_model):
    model = tiny_model()
    one, again, other = (bench.random_prompts(model, Workload(2, 5, 4), seed, 3) for seed in (1, 1, 2))
    assert len(one) == 3 and one[0].shape == (2, 5)
    assert all(map(torch.equal, one, again)) and not any(map(torch.equal, one, other))


def test_the_papers_preset():
    """Six workloads, three seeds, six widths in addition to the dense one, 30 s idle."""
    plan = bench.bench_plan("paper", torch.device("cpu"))
    lengths = {(w.batch, w.new_tokens) for w in plan.workloads}
    assert len(plan.workloads) == 6 and lengths == {(batch, new) for batch in (1, 8) for new in (20, 50, 150)}
    assert (plan.seeds, plan.idle_seconds, plan.decodings) == ((42, 123, 456), 30, ("generate",))
    glu = type("glu", (), {"intermediate_size": 8192, "hidden_size": 2048})
    exact, aligned = {8192, 7373, 6554, 5735, 4916, 4096, 3277}, {7424, 6528, 5760, 4864, 4096, 3328}
    assert set(bench.widths(glu, plan.ratios)) == exact | aligned


def test_default_plans_by_device():
    cuda, cpu = (bench.bench_plan(None, torch.device(name)) for name in ("cuda", "cpu"))
    assert cuda.decodings == ("generate", "static", "graph_decoding", "compiled", "graph")
    assert cpu.decodings == ("generate", "compiled")
    assert {(w.batch, w.prompt) for w in cuda.workloads} == {(1, 128), (1, 1024), (8, 128), (8, 1024)}


# --- random models ---


@pytest.mark.parametrize("name, parameters", [("llama-3.2-1b", 1_235_814_400), ("llama-3.2-3b", 3_212_749_824)])
def test_shapes_match_the_real_models(name, parameters):
    model = build_empty(CONFIGS[name])
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_random_weights(monkeypatch, tiny_model):
    """A new draw for every matrix, vectors of ones, tied head, rotary frequencies as in the stock class."""
    stock = tiny_model(tie_word_embeddings=True)
    monkeypatch.setitem(CONFIGS, "tiny", stock.config)
    model = random_model("tiny", torch.float32)
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in stock.named_parameters()}
    assert model.lm_head.weight is model.model.embed_tokens.weight and not model.training
    assert torch.equal(model.model.rotary_emb.inv_freq, stock.model.rotary_emb.inv_freq)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    assert all(p.std().item() == pytest.approx(0.02, rel=0.2) for p in matrices)
    assert not torch.equal(matrices[1].flatten()[:64], matrices[2].flatten()[:64])
    assert all((p == 1).all() for p in model.parameters() if p.dim() == 1)
    assert torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all()
    again = random_model("tiny", torch.float32).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


# --- the command ---

FAST = ["--batch", "1", "--prompt", "5", "--new-tokens", "3", "--decoding", "generate", "--device", "cpu"]


@pytest.mark.slow
def test_command(tiny_model, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    gluprune.save(tiny_model(dtype=torch.bfloat16, intermediate_size=256), tmp_path / "tiny")
    out = tmp_path / "out"
    assert main(["bench", str(tmp_path / "tiny"), *FAST, "--pruning-ratio", "0.1", "0.4", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "TPOT ms" in text and "not measured: " in text and f"{out / 'report.md'}: tables and plots" in text
    found = read(out / "model.jsonl")
    assert {record.shape["I"] for record in found} == {256, 231, 154, 128}
    assert {(record.shape["model"], record.dtype) for record in found} == {("tiny", "bfloat16")}
    assert "Where the difference comes from" in (out / "report.md").read_text()


@pytest.mark.slow
def test_command_with_random_weights_says_so(monkeypatch, tiny_model, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(CONFIGS, "tiny", tiny_model().config)
    arguments = ["bench", "--random", "tiny", *FAST, "--out", str(tmp_path), "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert {record["shape"]["model"] for record in found} == {"tiny, random weights"}
    assert {record["shape"]["I"] for record in found} == {101, 61}  # 128 would be wider than the model


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give exactly one of MODEL and --random NAME"),
        (["somewhere", "--random", "llama-3.2-1b"], "give exactly one of MODEL and --random NAME"),
        (
            ["--random", "llama-9"],
            "unknown model 'llama-9' for random weights; allowed: llama-3.2-1b, llama-3.2-3b, llama-3.1-8b",
        ),
        (["absent"], "absent is neither a model folder nor a reachable Hub id"),
        (["absent", "--decoding", "graph"], "decoding 'graph' needs a CUDA device, the device is cpu"),
        (["absent", "--new-tokens", "1"], "new tokens must be at least 2, got 1"),
        (["absent", "--batch", "0"], "batch must be at least 1, got 0"),
        (["absent", "--pruning-ratio", "1.5"], "pruning ratios lie between 0 and 1 (both excluded), got 1.5"),
        (["absent", "--preset", "paper", "--batch", "4"], "--preset paper has its own workloads: omit --batch"),
        (["absent", "--device", "abacus"], "abacus"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, arguments, message):
    device = [] if "--device" in arguments else ["--device", "cpu"]
    assert main(["bench", *arguments, *device, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("gluprune bench: error: ") and message in error
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the error on a machine without CUDA")
def test_no_cuda(tmp_path, capsys):
    assert main(["bench", "--random", "llama-3.2-1b", "--device", "cuda:1", "--out", str(tmp_path / "out")]) == 2
    assert "device 'cuda:1' is not available: torch does not find a CUDA device" in capsys.readouterr().err


@pytest.mark.cuda
def test_patched_and_not_through_every_decoding_on_a_gpu(tiny_model):
    model = tiny_model(dtype=torch.bfloat16, intermediate_size=256, seed=1)
    plan = BenchPlan((Workload(1, 5, 4),), ("generate", "compiled", "graph"), repeats=2, energy_seconds=None)
    found = []
    bench.bench(model, "tiny", plan, torch.device("cuda"), found.append)
    cells = {(r.shape["I"], r.provider, r.shape["decoding"]) for r in found if r.what == "generation: TPOT" and r.p50}
    assert len(cells) == 3 * 2 * 3
    assert {model_glus(model)[0].intermediate_size, 154, 128} == {width for width, _, _ in cells}
