"""Patched models that are sharded over two processes: tensor parallel and FSDP2, over gloo on the CPU."""

import copy
import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

from gluprune.runtime import operator
from gluprune.runtime.fusion import fusion_status
from gluprune.runtime.patching import patch, unpatch
from tests.helpers.tiny_models import logits, mlps, tiny_model, token_ids

pytestmark = pytest.mark.skipif(not operator.INTERPRETED, reason="runs on the CPU")


def run_on_two_ranks(function, *args):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_start, args=(port, function, args), nprocs=2)


def _start(rank, port, function, args):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        function(*args)
    finally:
        dist.destroy_process_group()


def check_tensor_parallel(path):
    ids = token_ids()
    reference = AutoModelForCausalLM.from_pretrained(path).eval()
    model = AutoModelForCausalLM.from_pretrained(path, tp_plan="auto").eval()
    expected = logits(model, ids)
    patch(model, "triton")
    assert [entry.reason for entry in fusion_status(model)] == ["gate_proj has a hook"] * 2, fusion_status(model)
    assert torch.equal(logits(model, ids), expected)
    torch.testing.assert_close(expected, logits(reference, ids), atol=1e-5, rtol=1e-5)
    model(ids, labels=ids).loss.backward()
    reference(ids, labels=ids).loss.backward()
    ours, theirs = (mlps(each)[0].down_proj.weight.grad for each in (model, reference))
    torch.testing.assert_close(ours.full_tensor(), theirs, atol=1e-5, rtol=1e-4)
    assert torch.equal(logits(unpatch(model), ids), expected)


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


def check_all(path):
    check_tensor_parallel(path)
    check_fsdp()


@pytest.mark.slow
def test_tensor_parallel_and_fsdp(tmp_path):
    tiny_model(width=78).save_pretrained(tmp_path)
    run_on_two_ranks(check_all, tmp_path)  # one start of two processes takes longer than either check
