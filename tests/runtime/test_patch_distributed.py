"""Patched models that are sharded over processes: tensor parallel and FSDP2, over gloo on the CPU."""

import copy
import os
import socket
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from csrc_triton.glu import backward
from gluprune.runtime import aligned, fusion, operator
from gluprune.runtime.classes import PREPARED
from gluprune.runtime.fusion import fusion_status
from gluprune.runtime.patching import patch, unpatch
from tests.helpers.tiny_models import logits, mlps, tiny_model, token_ids

pytestmark = pytest.mark.skipif(not operator.INTERPRETED, reason="runs on the CPU")


def run_on_ranks(ranks, function, *args):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_start, args=(ranks, port, function, args), nprocs=ranks)


def _start(rank, ranks, port, function, args):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        function(*args)
    finally:
        dist.destroy_process_group()


@contextmanager
def counted_sums():
    """Count the all-reduces of the block."""
    calls, real = [], dist.all_reduce
    dist.all_reduce = lambda *args, **options: calls.append(1) or real(*args, **options)
    try:
        yield calls
    finally:
        dist.all_reduce = real


def reasons(model):
    return [entry.reason for entry in fusion_status(model)]


def load_sharded(path):
    plan = DistributedConfig(tp_plan="auto")
    return AutoModelForCausalLM.from_pretrained(path, distributed_config=plan).eval()


def check_tensor_parallel(path):
    """The kernels run on each rank's shard, one all-reduce follows, and down's bias is added once."""
    ids = token_ids()
    reference, model = AutoModelForCausalLM.from_pretrained(path).eval(), load_sharded(path)
    expected, whole = logits(model, ids), logits(reference, ids)
    patch(model, "torch")
    assert torch.equal(logits(model, ids), expected)
    patch(model, "triton")
    width, rank, ranks = reference.config.intermediate_size, dist.get_rank(), dist.get_world_size()
    assert reasons(model) == ["" if -(-width // ranks) * rank < width else "it has no neurons"] * 2
    for _ in range(2):  # examined, then prepared
        with counted_sums() as sums:
            torch.testing.assert_close(logits(model, ids), whole, atol=1e-5, rtol=1e-5)
        assert len(sums) == 4  # attention and MLP of two layers
    assert all(mlp.__dict__[PREPARED].holds(mlp) for mlp in mlps(model) if reasons(model)[0] == "")
    mlp, stock = mlps(model)[0], mlps(reference)[0]
    for name, weight in mlp.named_parameters():
        assert torch.equal(weight.full_tensor(), stock.get_parameter(name)), name
    check_what_calls_the_projections(model, reference, ids)
    mlp._is_fsdp_managed_module = True  # FSDP2 on top
    with torch.no_grad():
        assert not fusion.is_fusible(mlp, torch.ones(2, 48))
    del mlp._is_fsdp_managed_module
    unpatch(model)
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-6, rtol=1e-6)  # products on memory aligned anew
    assert not any(aligned.is_view(weight.to_local()) for weight in mlp.parameters())


def check_what_calls_the_projections(model, reference, ids):
    """Gradients, hooks, and projections with the forward of another."""
    expected = logits(model, ids)
    model(ids, labels=ids).loss.backward()
    reference(ids, labels=ids).loss.backward()
    for ours, theirs in zip(mlps(model)[0].parameters(), mlps(reference)[0].parameters()):
        torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, atol=1e-5, rtol=1e-4)
    assert mlps(model)[0](torch.ones(2, 48)).requires_grad  # its input has no gradient
    gate, calls = mlps(model)[0].gate_proj, []
    handle = gate.register_forward_hook(lambda *_: calls.append(1))
    assert reasons(model)[0] == "gate_proj has a hook"
    torch.testing.assert_close(logits(model, ids), expected, atol=1e-5, rtol=1e-5)
    assert calls == [1]
    handle.remove()
    up = mlps(model)[0].up_proj
    gate.forward, up.forward = up.forward, gate.forward
    assert reasons(model)[0] == "gate_proj has a hook"
    gate.forward, up.forward = up.forward, gate.forward
    assert torch.equal(logits(model, ids), expected)


@contextmanager
def counted_kernels():
    """Note every forward and backward pass of the block through the operator, neither of which may run eager code."""
    noted, patches = [], pytest.MonkeyPatch()
    for owner, name in ((operator, "glu_mlp"), (backward, "glu_mlp_backward")):
        real = getattr(owner, name)
        patches.setattr(owner, name, lambda *args, name=name, real=real: noted.append(name) or real(*args))
    for name in ("eager_forward", "eager_gradients"):
        patches.setattr(operator, name, None)
    try:
        yield noted
    finally:
        patches.undo()


def shard(model, unit="layer", **options):
    for layer in model.model.layers:
        fully_shard(layer if unit == "layer" else layer.mlp, **options)
    return fully_shard(model, **options)


def loss_of(model, ids):
    return model(ids, labels=ids, use_cache=False).loss


FSDP_CASES = {
    "aligned": {},
    "unaligned, with biases": dict(width=78, mlp_bias=True),
    "patched after": dict(width=101, patch_first=False),
    "not freed": dict(width=101, options=dict(reshard_after_forward=False)),
    "not freed, patched after": dict(options=dict(reshard_after_forward=False), patch_first=False),
    "packed": dict(family="phi3"),
    "packed, unaligned": dict(family="phi3", width=101),
    "the MLP alone": dict(width=78, unit="mlp"),
    "recomputed": dict(width=78, recompute=True),
    "fp16": dict(width=78, dtype=torch.float16, tolerance=3e-2),
}


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_fsdp(
    family="llama",
    width=128,
    unit="layer",
    patch_first=True,
    recompute=False,
    dtype=None,
    tolerance=1e-5,
    options=None,
    **config,
):
    """Two ranks train on halves of a batch by kernels, and have the logits and weights of one process.

    In mixed precision: those of two ranks that are not patched, since rounding changes more than patching.
    """
    ids, options = token_ids(batch=4), {"mp_policy": MixedPrecisionPolicy(param_dtype=dtype), **(options or {})}
    model = tiny_model(family, width, **config).train()  # in eval mode, rows of a padded down projection have gaps
    fresh, reference = copy.deepcopy(model), copy.deepcopy(model)
    part = ids[dist.get_rank() :: 2]
    if dtype is not None:
        shard(reference, **options)
    if patch_first:
        patch(model, "triton", norms=True)
    shard(model, unit, **options)
    if not patch_first:
        patch(model, "triton", norms=True)
    assert reasons(model) == ["FSDP has its weights; examined when they are gathered for a forward"] * 2
    if recompute:
        model.gradient_checkpointing_enable()
    near = dict(atol=tolerance, rtol=tolerance, check_dtype=False)
    seen, mlp = [], mlps(model)[1]
    handle = mlp.register_forward_pre_hook(lambda *_: seen.extend(reasons(mlp)))
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, reference)]
    for _ in range(3):  # gathered weights are freed, then gathered again with other values
        with counted_kernels() as noted:
            torch.testing.assert_close(logits(model.eval(), ids), logits(reference.eval(), ids), **near)
            assert noted == ["glu_mlp"] * 2
        patch(model.train(), "triton", norms=True)  # which must leave gathered weights where they are
        model.reshard()
        with counted_kernels() as noted:
            loss_of(model, part).backward()
            assert noted.count("glu_mlp") == (4 if recompute else 2) and noted.count("glu_mlp_backward") == 2
        reference.train()
        loss_of(reference, ids if dtype is None else part).backward()
        for (name, ours), theirs in zip(model.named_parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(whole(ours.grad), whole(theirs.grad), **near, msg=lambda m, name=name: name + m)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert set(seen) == {""}
    handle.remove()
    saved, expected = model.state_dict(), reference.state_dict()
    assert saved.keys() == expected.keys()
    for name, tensor in saved.items():
        assert type(tensor) is DTensor
        torch.testing.assert_close(whole(tensor), whole(expected[name]), **near)
    full = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, fresh.state_dict(), options=full)
    torch.testing.assert_close(logits(model.eval(), ids), logits(fresh.eval(), ids), **near)
    if unit == "layer":
        unpatch(model)
        with counted_kernels() as noted:
            torch.testing.assert_close(logits(model, ids), logits(fresh, ids), **near)
        assert noted == []


def check_fsdp_refusals():
    """What cannot be patched, rounded or unpatched while FSDP has the weights."""
    model = shard(tiny_model(), "mlp", reshard_after_forward=False)
    with pytest.raises(ValueError, match="FSDPLlamaMLP is a subclass of LlamaMLP"):
        patch(model, "triton")
    model = shard(patch(tiny_model(width=128), "triton"), "mlp")
    with pytest.raises(ValueError, match="became FSDPFusedLlamaMLP after it was patched"):
        unpatch(model)
    model, ids = shard(tiny_model(), reshard_after_forward=False), token_ids()
    for _ in range(2):  # sharded, and gathered
        with pytest.raises(ValueError, match="gate_proj cannot have fp8 weights: its weight is sharded"):
            patch(model, weights="fp8")
        expected = logits(model, ids)
    patch(model, "torch")
    assert torch.equal(logits(model, ids), expected)


def check_fsdp1(use_orig_params):
    """Patched models train as stock ones; fused where modules have their own parameters, else by their modules."""
    ids, trained = token_ids(), []
    options = {"use_orig_params": use_orig_params, "device_id": torch.device("cpu")}
    for patched in (False, True):
        model = tiny_model(width=128).train()
        if patched:
            patch(model, "triton")
        for index, layer in enumerate(model.model.layers):
            model.model.layers[index] = FullyShardedDataParallel(layer, **options)
        model = FullyShardedDataParallel(model, **options)
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
        with counted_kernels() as noted:
            for _ in range(3):
                losses.append(loss_of(model, ids))
                losses[-1].backward()
                optimizer.step()
                optimizer.zero_grad()
        assert len(noted) == (2 * 2 * 3 if patched and use_orig_params else 0)
        trained.append(torch.stack(losses).detach())
    torch.testing.assert_close(trained[1], trained[0], atol=1e-5, rtol=1e-5)


def check_two(path):
    check_tensor_parallel(path)
    for case in FSDP_CASES.values():
        check_fsdp(**case)
    check_fsdp_refusals()
    check_fsdp1(use_orig_params=True)
    check_fsdp1(use_orig_params=False)


def check_four(*paths):
    for path in paths:
        check_tensor_parallel(path)


# One start of processes takes longer than any of the checks.
@pytest.mark.slow
def test_two_ranks(tmp_path):
    tiny_model(width=78).save_pretrained(tmp_path)
    run_on_ranks(2, check_two, tmp_path)


@pytest.mark.slow
def test_four_ranks_whose_shards_differ(tmp_path):
    """26, 26, 26 and 23 neurons with biases; 2, 2, 1 and none."""
    paths = [tmp_path / name for name in ("some", "few")]
    for path, width in zip(paths, (101, 5)):
        tiny_model(width=width, num_key_value_heads=4, mlp_bias=True).save_pretrained(path)
    run_on_ranks(4, check_four, *paths)
