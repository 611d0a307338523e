"""Kernel calls: the options they pass, and which of them share a compilation."""

from types import SimpleNamespace

import pytest
import torch

from csrc_triton.launch.call import KernelCall


@pytest.mark.parametrize("pdl", [False, True])
def test_call_passes_its_options(pdl):
    class Kernel(dict):
        def __getitem__(self, grid):
            return lambda **options: self.update(grid=grid, options=options)

    kernel = Kernel()
    KernelCall(kernel, (3, 2), dict(x=1), dict(BLOCK=16), num_warps=2, num_stages=5, launch_pdl=pdl).run()
    expected = dict(x=1, BLOCK=16, num_warps=2, num_stages=5) | (dict(launch_pdl=True) if pdl else {})
    assert dict(kernel) == dict(grid=(3, 2), options=expected)


def test_compilations_are_distinguished():
    """`KernelCall.run` reuses a compiled kernel exactly if Triton would compile the same one."""
    kernel = SimpleNamespace(fn=test_compilations_are_distinguished, do_not_specialize=["M"])
    memory = torch.zeros(64, dtype=torch.float16)
    args = dict(x=memory[:8], bias=None, M=3, H=32)

    def key(constants=(("BLOCK", 16),), num_warps=4, num_stages=2, launch_pdl=False, **changes):
        options = dict(num_warps=num_warps, num_stages=num_stages, launch_pdl=launch_pdl)
        return KernelCall(kernel, (1,), args | changes, dict(constants), **options)._key()

    same = [key(), key(M=1), key(M=16), key(H=64), key(x=memory[8:40])]
    assert len(set(same)) == 1
    others = [
        key(H=40),
        key(H=1),
        key(H=1 << 32),
        key(x=memory[1:9]),
        key(x=memory[:8].float()),
        key(x=memory[:8].to("meta")),
        key(bias=memory[:8]),
        key(constants=(("BLOCK", 32),)),
        key(num_warps=8),
        key(num_stages=3),
        key(launch_pdl=True),
    ]
    assert len({same[0], *others}) == 1 + len(others)
