"""Launch configurations: which are valid for a problem. No test here runs a kernel."""

import dataclasses

import pytest
import torch

from csrc_triton.glu.down_decode import DownGemv, DownSplitK
from csrc_triton.glu.gate_up_decode import GateUpGemv, GateUpSwap
from csrc_triton.glu.gate_up_prefill import GateUpTile, GateUpTma
from csrc_triton.launch.configs import Problem

BF16 = torch.bfloat16

VALID = {
    "gemv": GateUpGemv(block_n=2, num_warps=4, pdl=True),
    "swap": GateUpSwap(block_m=16, block_n=32, block_k=128, num_warps=4, num_stages=4, pdl=True),
    "tile": GateUpTile(block_m=128, block_n=128, block_k=32, num_warps=8, num_stages=3),
    "tma": GateUpTma(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3),
    "down gemv": DownGemv(block_n=4, block_k=256, num_warps=4, pdl=True),
    "split": DownSplitK(block_m=16, block_n=64, block_k=128, split_k=8, num_warps=4, num_stages=4, pdl=True),
}


@pytest.mark.parametrize(
    "name, change, where",
    [
        ("gemv", dict(block_n=256), {}),  # more neurons than one unit of padding
        ("gemv", dict(num_warps=3), {}),
        ("gemv", dict(pdl=True), dict(sm=89)),
        ("gemv", {}, dict(M=2)),
        ("swap", dict(block_m=8), {}),
        ("swap", dict(block_n=8), {}),
        ("swap", dict(block_n=48), {}),
        ("swap", dict(block_n=256), {}),
        ("swap", dict(num_stages=0), {}),
        ("swap", dict(num_stages=12), {}),  # 12 x 20 KB
        ("swap", dict(pdl=True), dict(sm=86)),
        ("tile", dict(num_stages=6), dict(sm=86)),  # 5 x 24 KB
        ("tma", {}, dict(sm=89)),
        ("tma", {}, dict(sm=120)),  # 2 x 48 + 32 KB
        ("tma", {}, dict(H=2056)),  # ragged K
        ("tma", dict(num_stages=5), {}),
        ("down gemv", {}, dict(M=2)),
        ("split", dict(split_k=0), {}),
        ("split", dict(split_k=65), {}),  # 64 steps
        ("split", dict(block_k=256), {}),  # steps beyond the padding
    ],
    ids=str,
)
def test_invalid_configurations(name, change, where):
    def valid(config, M=1, H=2048, sm=90):
        return config.valid(Problem(M, H, 8192, BF16, sm))

    assert valid(VALID[name])
    assert not valid(dataclasses.replace(VALID[name], **change), **where)


def test_shared_memory_limit_is_exact():
    fits = GateUpSwap(
        block_m=128, block_n=32, block_k=64, num_warps=4, num_stages=4, pdl=False
    )  # a stage is 24 KB; four on sm_90, three of four elsewhere
    assert fits.shared_memory(Problem(128, 2048, 8192, BF16, 90)) == 96 << 10
    assert fits.shared_memory(Problem(128, 2048, 8192, BF16, 89)) == 72 << 10
    assert GateUpSwap(block_m=128, block_n=32, block_k=64, num_warps=4, num_stages=5, pdl=False).valid(
        Problem(128, 2048, 8192, BF16, 89)
    )
    assert not GateUpSwap(block_m=128, block_n=32, block_k=64, num_warps=4, num_stages=6, pdl=False).valid(
        Problem(128, 2048, 8192, BF16, 89)
    )
    assert GateUpSwap(block_m=128, block_n=32, block_k=64, num_warps=4, num_stages=9, pdl=False).valid(
        Problem(128, 2048, 8192, BF16, 90)
    )
    assert not GateUpSwap(block_m=128, block_n=32, block_k=64, num_warps=4, num_stages=10, pdl=False).valid(
        Problem(128, 2048, 8192, BF16, 90)
    )
    assert not GateUpSwap(block_m=128, block_n=32, block_k=64, num_warps=4, num_stages=6, pdl=False).valid(
        Problem(128, 2048, 8192, BF16, 87)
    )  # unknown architecture: the smallest limit
