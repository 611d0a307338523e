"""Patched models that are sharded over processes: tensor parallel and FSDP2, over gloo on the CPU."""

import copy
import os
import socket
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from gluprune.runtime import aligned, operator
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


def check_fsdp():
    mesh, ids = init_device_mesh("cpu", (2,)), token_ids()
    for patch_first in (True, False):
        for unit in ("layer", "mlp"):
            model = tiny_model(width=128)
            reference = copy.deepcopy(model)
            if patch_first:
                patch(model, "triton")
            for layer in model.model.layers:
                fully_shard(layer if unit == "layer" else layer.mlp, mesh=mesh)
            fully_shard(model, mesh=mesh)
            if not patch_first and unit == "mlp":
                with pytest.raises(ValueError, match="FSDPLlamaMLP is a subclass of LlamaMLP"):
                    patch(model, "triton")
                continue
            patch(model, "triton")
            optimizers = [torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, reference)]
            for _ in range(2):  # gathered weights are freed, then gathered again
                assert not any(entry.fused for entry in fusion_status(model))
                torch.testing.assert_close(logits(model, ids), logits(reference, ids), atol=1e-5, rtol=1e-5)
                for each, optimizer in zip((model, reference), optimizers):
                    optimizer.zero_grad()
                    each(ids, labels=ids).loss.backward()
                    optimizer.step()
                ours, theirs = (mlps(each)[0].up_proj.weight.grad for each in (model, reference))
                torch.testing.assert_close(ours.full_tensor(), theirs, atol=1e-5, rtol=1e-4)
            if unit == "layer":
                unpatch(model)
                torch.testing.assert_close(logits(model, ids), logits(reference, ids), atol=1e-4, rtol=1e-4)


def check_two(path):
    check_tensor_parallel(path)
    check_fsdp()


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
