"""Calibration statistics compared with inputs of `down_proj` captured one sequence at a time."""

import copy
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from gluprune.calibration import statistics as calibration_module
from gluprune.calibration.collect import calibrate, calibrate_to_file
from gluprune.calibration.statistics import Statistics
from tests.helpers.calibrations import captured, random_batches
from tests.helpers.tiny_models import make_tiny_model


def batch_norms(model, batches):
    """Sum over batches of the norms within a batch, `[I]` of every layer."""
    per_batch = [[x.norm(dim=0) for x in captured(model, batch)] for batch in batches]
    return [sum(norms) for norms in zip(*per_batch)]


def close(found, expected, dtype):
    # bf16 activations differ in their last bit between batch shapes.
    tolerance = {"rtol": 2e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    scale = expected.abs().max()
    torch.testing.assert_close(found.double() / scale, expected / scale, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "phi3", "qwen2"])
def test_statistics(family, dtype):
    model, batches = make_tiny_model(family, dtype=dtype, seed=1), random_batches()
    found = calibrate(model, batches)
    assert found.tokens == sum(batch.numel() for batch in batches)
    assert list(found.layers) == [0, 1, 2]
    truth = captured(model, [sequence for batch in batches for sequence in batch])
    for statistics, x, norms in zip(found.layers.values(), truth, batch_norms(model, batches)):
        assert statistics.squares.dtype == statistics.batch_norms.dtype == statistics.gram.dtype == torch.float32
        close(statistics.squares, x.square().sum(0), dtype)
        close(statistics.norms, x.norm(dim=0), dtype)
        close(statistics.batch_norms, norms, dtype)
        close(statistics.gram, x.T @ x, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_calibrated_in_float32(family_name, dtype):
    """Gram matrices are close to those of the same weights in float32 (embeddings and rotary angles keep their dtype),
    and the weights are the same tensors as before."""
    tolerance = 5e-3 if family_name.startswith("gemma") else 5e-4  # Gemma scales its embeddings in their dtype
    model = make_tiny_model(family_name, dtype=dtype, seed=17)
    batches = [*random_batches(), padded((9, 4, 1, 12), "left")[:2]]
    before = {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()}
    found, expected = calibrate(model, batches), calibrate(copy.deepcopy(model).float(), batches)
    for layer, statistics in expected.layers.items():
        scale = statistics.gram.abs().max()
        torch.testing.assert_close(found.layers[layer].gram / scale, statistics.gram / scale, rtol=0, atol=tolerance)
    assert {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()} == before


@pytest.mark.parametrize("block", [40, 101, 1000])
def test_batches_larger_than_one_block(monkeypatch, block):
    monkeypatch.setattr(calibration_module, "_ROWS", 7)
    monkeypatch.setattr(calibration_module, "_BLOCK", block)
    model, batches = make_tiny_model(seed=2), random_batches()
    found = calibrate(model, batches)
    truth = captured(model, [sequence for batch in batches for sequence in batch])
    for statistics, x, norms in zip(found.layers.values(), truth, batch_norms(model, batches)):
        close(statistics.gram, x.T @ x, torch.float32)
        close(statistics.batch_norms, norms, torch.float32)


def padded(lengths, side, seed=3):
    """Ids and mask `[B, S]` of sequences of different lengths, and the sequences."""
    generator = torch.Generator().manual_seed(seed)
    sequences = [torch.randint(3, 64, (length,), generator=generator) for length in lengths]
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(0, len(sequence)) if side == "right" else slice(max(lengths) - len(sequence), None)
        ids[row, place], mask[row, place] = sequence, 1
    return ids, mask, sequences


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("form", ["dict", "tuple", "dataloader", "bool mask"])
def test_padding_is_ignored(form, side):
    model = make_tiny_model(seed=3)
    ids, mask, sequences = padded((9, 4, 1, 12), side)
    batches = {
        "dict": [{"input_ids": ids, "attention_mask": mask, "labels": ids}],
        "tuple": [(ids, mask)],
        "dataloader": DataLoader(TensorDataset(ids, mask), batch_size=4),
        "bool mask": [{"input_ids": ids, "attention_mask": mask.bool()}],
    }[form]
    found = calibrate(model, batches)
    assert found.tokens == 9 + 4 + 1 + 12
    for statistics, x in zip(found.layers.values(), captured(model, sequences)):
        close(statistics.squares, x.square().sum(0), torch.float32)
        close(statistics.gram, x.T @ x, torch.float32)


def test_batches_without_tokens_are_skipped():
    model, batches = make_tiny_model(seed=4), random_batches()
    empty = [torch.zeros(0, 5, dtype=torch.long), (torch.ones(2, 3, dtype=torch.long), torch.zeros(2, 3))]
    found, expected = calibrate(model, [*empty, *batches]), calibrate(model, batches)
    assert found.tokens == expected.tokens
    assert torch.equal(found.layers[1].gram, expected.layers[1].gram)


def test_without_gram_and_for_some_layers():
    model, batches = make_tiny_model(seed=5), random_batches()
    some, every = calibrate(model, batches, gram=False, layers=[2]), calibrate(model, batches)
    assert list(some.layers) == [2] and some.layers[2].gram is None
    assert torch.equal(some.layers[2].squares, every.layers[2].squares)

    chosen = calibrate(model, batches, layers=np.array([2, 0]))
    assert list(chosen.layers) == [0, 2] and torch.equal(chosen.layers[2].gram, every.layers[2].gram)


@pytest.mark.parametrize(
    "layers, error, message",
    [
        ([], ValueError, "layers is empty"),
        ([0, 3], ValueError, "layer index 3 is out of range: the model has layers 0 to 2"),
        ([-1], ValueError, "layer index -1 is out of range"),
        (0, TypeError, "layers must be a list of layer indices, got 0"),
        (["1"], TypeError, "layers must hold integers, got '1'"),
    ],
)
def test_layers_that_do_not_exist(layers, error, message):
    with pytest.raises(error, match=message):
        calibrate(make_tiny_model(seed=5), random_batches(), layers=layers)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_unchanged(fails):
    model = make_tiny_model(seed=6, dtype=torch.bfloat16).train()
    before = {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()}
    model.model.layers[1].mlp.eval()
    modes = [module.training for module in model.modules()]
    if fails:
        with torch.no_grad():
            model.model.layers[1].mlp.gate_proj.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match="layer 1 has NaN or Inf") if fails else nullcontext():
        calibrate(model, random_batches())
    assert [module.training for module in model.modules()] == modes
    assert {name: (p.data_ptr(), p.dtype) for name, p in model.named_parameters()} == before
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_dropout_is_off():
    model = make_tiny_model(seed=7, attention_dropout=0.5)
    expected = calibrate(model, random_batches()).layers[2].gram
    assert torch.equal(calibrate(model.train(), random_batches()).layers[2].gram, expected)


def test_few_tokens_are_logged(caplog):
    calibrate(make_tiny_model(seed=8), random_batches([(2, 9)]))
    assert "18 calibration tokens are too few for the 101 neurons of a layer: give at least 404" in caplog.text


def test_sums_are_in_float32_under_another_default_dtype():
    model, batches = make_tiny_model(seed=7), random_batches()
    expected = calibrate(model, batches, sensitivity=True)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = calibrate(model, batches, sensitivity=True)
    finally:
        torch.set_default_dtype(torch.float32)
    for name in ("squares", "batch_norms", "gram", "saliency", "costs"):
        assert torch.equal(getattr(found.layers[1], name), getattr(expected.layers[1], name)), name


def test_too_little_space_is_noticed_before_the_text_runs(tmp_path, monkeypatch):
    model, batches = make_tiny_model(seed=8), random_batches()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 10, 10))
    monkeypatch.setattr(type(model.model), "forward", lambda *_, **__: pytest.fail("the model ran"))
    needed = 3 * 4 * (101**2 + 2 * 101 + 16)
    with pytest.raises(OSError, match=f"{needed:,} bytes are needed, only 10 are free"):
        calibrate_to_file(model, batches, tmp_path / "statistics", gram=True, texts={})
    assert not list(tmp_path.iterdir())


def test_a_folder_where_statistics_are_expected(tmp_path):
    with pytest.raises(ValueError, match="is a folder, not a file of calibration statistics"):
        Statistics.load(tmp_path)
