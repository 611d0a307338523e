"""Training a student: losses and weights of a plain PyTorch loop, what changes, checkpoints, errors."""

import copy
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import gluprune
from gluprune.healing import training
from gluprune.healing.memory import training_memory
from gluprune.healing.student import TRAINED, as_student, check_trained, decoded, merged
from gluprune.healing.training import Settings, Windows, arguments, last_checkpoint, train
from tests.helpers.composite_models import COMPOSITES, composite_model
from tests.helpers.processes import ROOT
from tests.helpers.tiny_models import make_tiny_model, tiny_model

LENGTH, BATCH, STEPS = 12, 4, 7
WINDOWS = torch.randint(2, 61, (10, LENGTH), generator=torch.Generator().manual_seed(0))


def settings(**changes):
    given = dict(
        train="all",
        tokens=STEPS * BATCH * LENGTH,
        length=LENGTH,
        batch=BATCH,
        device_batch=2,
        learning_rate=3e-3,
        hidden_weight=0.0,
    )
    return Settings(**{**given, **changes})


def models(family="llama", **options):
    """A narrower student and its teacher."""
    shape = {"initializer_range": 0.3, "vocab_size": 61, **options}
    return make_tiny_model(family, seed=1, intermediate_size=48, **shape), make_tiny_model(family, seed=2, **shape)


def trained(student, teacher, folder, chosen):
    options = arguments(folder, chosen, processes=1, device="cpu", bf16=False)
    return train(
        as_student(student, chosen.train, chosen.hidden_weight), teacher, WINDOWS, settings=chosen, options=options
    )


def plain_loop(student, teacher, chosen):
    """The same training by PyTorch alone: all windows of a step at once, all logits at once."""
    parameters = list(student.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=chosen.learning_rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    order, generator = [], torch.Generator().manual_seed(0)
    while len(order) < STEPS * BATCH:
        order += torch.randperm(len(WINDOWS), generator=generator).tolist()
    losses = []
    for step in range(STEPS):
        ids = WINDOWS[order[step * BATCH : (step + 1) * BATCH]]
        with torch.no_grad():
            expected = teacher(ids, output_hidden_states=True)
        found = student(ids, output_hidden_states=True)
        p, q = (output.logits.log_softmax(-1) for output in (expected, found))
        loss = (p.exp() * (p - q)).sum(-1).mean()
        if chosen.hidden_weight:
            pairs = list(zip(found.hidden_states, expected.hidden_states, strict=True))[1:]
            errors = [((h - t).square().sum(-1) / t.square().sum(-1)).mean() for h, t in pairs]
            loss = loss + chosen.hidden_weight * sum(errors) / len(errors)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        rate = 0.5 * (1 + math.cos(math.pi * step / STEPS))  # so few steps have no warm-up
        optimizer.param_groups[0]["lr"] = chosen.learning_rate * rate
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("hidden_weight", [0.0, 0.5])
def test_equals_a_plain_loop(tmp_path, hidden_weight, capsys):
    student, teacher = models()
    chosen = settings(hidden_weight=hidden_weight)
    expected = copy.deepcopy(student)
    losses = plain_loop(expected, teacher, chosen)
    found, state = trained(student, teacher, tmp_path, chosen)
    assert found == pytest.approx(losses, rel=1e-5) and losses[-1] < 0.9 * losses[0]
    assert "Writing" not in capsys.readouterr().err  # the bars of transformers, at every checkpoint
    for name, weight in expected.state_dict().items():
        assert torch.allclose(state[name], weight, atol=1e-5), name


def test_how_many_windows_run_at_a_time_changes_nothing(tmp_path):
    student, teacher = models()
    curves = [trained(copy.deepcopy(student), teacher, tmp_path / str(n), settings(device_batch=n))[0] for n in (1, 4)]
    for curve in curves[1:]:
        assert curve == pytest.approx(curves[0], rel=1e-5)


@pytest.mark.parametrize("name", TRAINED)
def test_what_is_trained(tmp_path, name):
    if name == "lora":
        pytest.importorskip("peft")
    student, teacher = models(tie_word_embeddings=False)
    before = copy.deepcopy(student.state_dict())
    model = as_student(copy.deepcopy(student), name)
    chosen = settings(train=name)
    options = arguments(tmp_path, chosen, processes=1, device="cpu", bf16=False)
    losses, state = train(model, teacher, WINDOWS, settings=chosen, options=options)
    assert losses[-1] < losses[0]
    after = merged(model).state_dict() if name == "lora" else state
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    linear = {key for key in before if "_proj" in key}
    expected = {
        "all": set(before),
        "mlp": {key for key in before if ".mlp." in key or "norm" in key},
        "lora": linear,
    }[name]
    assert changed == expected and len(linear) == 21


@pytest.mark.parametrize("name", ["all", "lora"])
def test_padding_stays_zero(tmp_path, name):
    """Neurons whose weights are all zero."""
    student, teacher = models()
    for layer in student.model.layers:
        for weight in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight.T):
            weight.data[40:] = 0
    model, chosen = as_student(student, name), settings(train=name, tokens=3 * BATCH * LENGTH)
    options = arguments(tmp_path, chosen, processes=1, device="cpu", bf16=False)
    train(model, teacher, WINDOWS, settings=chosen, options=options)
    found = merged(model) if name == "lora" else model
    for layer in found.model.layers:
        assert layer.mlp.down_proj.weight[:, :40].abs().min() > 0
        for weight in (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight.T):
            assert not weight[40:].any()


def test_a_patched_student_trains_through_the_fused_forward(tmp_path, monkeypatch):
    """The losses are those of the unpatched one, and each MLP of an aligned width runs as one operator."""
    from gluprune.runtime import operator

    student, teacher = tiny_model(width=128, seed=1), tiny_model(seed=2)
    expected, _ = trained(copy.deepcopy(student), teacher, tmp_path / "a", settings(tokens=2 * BATCH * LENGTH))
    gluprune.patch(student, backend="triton")
    calls, real = [], operator.glu_mlp
    monkeypatch.setattr(operator, "glu_mlp", lambda *a, **k: calls.append(1) or real(*a, **k))
    found, _ = trained(student, teacher, tmp_path / "b", settings(tokens=2 * BATCH * LENGTH))
    assert found == pytest.approx(expected, rel=1e-4)
    assert len(calls) == 2 * 2 * 2  # layers, batches per step, steps


@pytest.mark.parametrize("steps, warmup", [(1, 0), (9, 0), (20, 1), (100, 5)])
def test_a_short_training_has_no_step_without_a_learning_rate(tmp_path, steps, warmup):
    chosen = settings(tokens=steps * BATCH * LENGTH)
    assert arguments(tmp_path, chosen, processes=1, device="cpu", bf16=False).warmup_steps == warmup


def test_a_single_step_changes_every_weight(tmp_path):
    student, teacher = models()
    before = copy.deepcopy(student.state_dict())
    _, state = trained(student, teacher, tmp_path, settings(tokens=BATCH * LENGTH))
    assert all(not torch.equal(state[name], weight) for name, weight in before.items() if name in state)


def test_every_pass_over_the_text_has_its_own_order():
    rows = torch.arange(10)[:, None]
    order = [int(item["input_ids"]) for item in Windows(rows, 25)]
    assert len(order) == 25 and sorted(order[:10]) == sorted(order[10:20]) == list(range(10))
    assert order[:10] != order[10:20] and order == [int(item["input_ids"]) for item in Windows(rows, 25)]


def test_steps_and_their_division():
    assert settings(tokens=1000, batch=4, length=10).steps == 25 and settings(tokens=1).steps == 1
    assert settings(batch=12, device_batch=5).division(1) == (4, 3)
    assert settings(batch=12, device_batch=5).division(3) == (4, 1)
    assert settings(batch=2, device_batch=5).division(2) == (1, 1)
    with pytest.raises(ValueError, match="batch=12 windows cannot be divided evenly among 5 processes"):
        settings(batch=12).division(5)


def test_a_loss_that_is_not_finite_is_an_error(tmp_path):
    student, teacher = models()
    student.model.norm.weight.data[0] = float("inf")
    with pytest.raises(RuntimeError, match="the loss became nan at step 1 of 7: use a lower learning_rate than 0.003"):
        trained(student, teacher, tmp_path, settings())


def test_a_loss_that_is_not_finite_stops_the_training(tmp_path, monkeypatch):
    """At once, so that the last checkpoint is of a step before."""
    calls, real = [], training._Distiller.compute_loss

    def spoiled(self, *args, **options):
        calls.append(loss := real(self, *args, **options))
        return loss * float("inf") if len(calls) > 2 * 3 else loss  # two calls for each step: in the fourth

    monkeypatch.setattr(training._Distiller, "compute_loss", spoiled)
    with pytest.raises(RuntimeError, match="the loss became inf at step 4 of 7"):
        trained(*models(), tmp_path, settings())
    assert len(calls) == 2 * 4 and last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")


def test_the_last_complete_checkpoint(tmp_path):
    for number, state in ((5, "{}"), (10, "{}"), (15, '{"half'), (20, None)):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10") and (tmp_path / "checkpoint-15").is_dir()
    assert last_checkpoint(tmp_path, remove=True) == str(tmp_path / "checkpoint-10")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-5"]
    assert last_checkpoint(tmp_path / "other") is None


def test_names_of_what_is_trained(monkeypatch):
    with pytest.raises(ValueError, match="unknown train 'head'; allowed: all, mlp, lora"):
        check_trained("head")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    check_trained("mlp")
    with pytest.raises(ImportError, match=r"pip install 'gluprune\[lora\]'"):
        check_trained("lora")


@pytest.mark.parametrize("name", TRAINED)
def test_memory(name):
    """Weights and optimizer are counted; activations are those that a real forward keeps, within a fifth."""
    student, teacher = models(hidden_size=64, num_hidden_layers=4, tie_word_embeddings=False)
    chosen = settings(train=name, length=64)
    found = training_memory(student.config, teacher.config, chosen, windows=2, bf16=False, sharded=1)
    model, kept = as_student(student.train(), name), {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        decoded(model, torch.zeros(2, 64, dtype=torch.long), False)
    parameters = list(model.parameters())
    weights = {parameter.data_ptr() for parameter in parameters}
    real = sum(tensor.untyped_storage().nbytes() for pointer, tensor in kept.items() if pointer not in weights)
    assert found.activations == pytest.approx(real, rel=0.2)
    assert found.student == 4 * sum(p.numel() for p in parameters)
    assert found.optimizer == 16 * sum(p.numel() for p in parameters if p.requires_grad)
    assert found.teacher == 4 * sum(p.numel() for p in teacher.parameters())
    halved = training_memory(student.config, teacher.config, chosen, windows=2, bf16=True, sharded=2)
    assert (halved.student, halved.optimizer) == (found.student // 2, found.optimizer // 2)
    assert halved.teacher == found.teacher // 4 and halved.activations < found.activations
    assert str(found).startswith("about 0.0 GB per process: student ")


@pytest.mark.parametrize("kind", COMPOSITES)
@pytest.mark.parametrize("name", TRAINED)
def test_memory_of_models_with_images(kind, name):
    model = composite_model(kind)
    chosen = settings(train=name, length=9)
    found = training_memory(model.config, model.config, chosen, windows=1, bf16=False, sharded=1)
    assert found.teacher == 4 * sum(p.numel() for p in model.parameters())
    assert 0 < found.activations < 10 * found.teacher


PEAK = """
import gc, sys, tempfile
from pathlib import Path
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from gluprune.healing.memory import training_memory
from gluprune.healing.student import as_student
from gluprune.healing.training import Settings, arguments, train
from gluprune.measure.memory import resident

torch.set_num_threads(1)
shape = dict(vocab_size=16000, hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4)
configs = [LlamaConfig(intermediate_size=width, **shape) for width in (1024, 1536)]
chosen = Settings("all", 3072, 512, 3, 1, 1e-4, 0.0)  # two steps of three batches
found = training_memory(*configs, chosen, windows=1, bf16=False, sharded=1).total
gc.collect()
before = resident("VmRSS")
student, teacher = map(LlamaForCausalLM, configs)
Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
with tempfile.TemporaryDirectory() as folder:
    options = arguments(Path(folder), chosen, processes=1, device="cpu", bf16=False)
    train(as_student(student, "all"), teacher, torch.zeros(2, 512, dtype=torch.long), settings=chosen, options=options)
print(found / (resident("VmHWM") - before))
"""


@pytest.mark.slow
def test_memory_is_that_of_a_training():
    """Of 35M parameters, in a process that has done nothing else."""
    command = [sys.executable, "-c", PEAK]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert float(done.stdout.splitlines()[-1]) == pytest.approx(1, abs=0.25), done.stderr[-2000:]


def test_a_tied_student_continues_without_a_warning(tmp_path, caplog):
    """Its checkpoints have one of the tied weights."""
    for _ in range(2):
        losses, _ = trained(*models(tie_word_embeddings=True), tmp_path, settings())
        assert len(losses) == STEPS
    assert "missing keys" not in caplog.text


def test_training_continues_from_a_checkpoint(tmp_path, monkeypatch):
    """Losses and weights of an interrupted training are those of one that was not interrupted, bit for bit."""
    student, teacher = models()
    monkeypatch.setattr(training, "_SAVES", 3)
    losses, expected = trained(copy.deepcopy(student), teacher, tmp_path / "a", settings())
    real, calls = training.answer, []

    def interrupted(*given):
        calls.append(1)
        if len(calls) > 9:  # in step 5, after the checkpoint of step 3
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(training, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trained(copy.deepcopy(student), teacher, tmp_path / "b", settings())
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["checkpoint-3"]
    monkeypatch.setattr(training, "answer", lambda *given: calls.append(1) or real(*given))
    calls.clear()
    again, state = trained(copy.deepcopy(student), teacher, tmp_path / "b", settings())
    assert again == losses and len(calls) == 2 * (STEPS - 3)
    assert all(torch.equal(state[name], weight) for name, weight in expected.items())
    calls.clear()
    again, state = trained(copy.deepcopy(student), teacher, tmp_path / "b", settings())
    assert again == losses and not calls and torch.equal(state["lm_head.weight"], expected["lm_head.weight"])
    saved = json.loads((tmp_path / "b" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    assert saved["global_step"] == STEPS
    assert F.mse_loss(state["lm_head.weight"], student.lm_head.weight) > 0
