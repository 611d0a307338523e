"""MLPs that are split over processes: by transformers' tensor parallelism (`tp_plan="auto"`), or by PyTorch's FSDP2.

transformers replaces the forward of each projection by a closure, which runs the projection on this rank's shard: gate
and up by columns, down by rows, and sums the output of down over the ranks. The shards alone are a GLU MLP with fewer
neurons. So the fused operator runs on them, and one all-reduce follows, as in transformers' own code.

Source: `ColwiseParallel` and `RowwiseParallel` in transformers/distributed/tensor_parallel.py (5.23). Where the code of
another version differs, no shards are found, and the MLP calls its projections.

FSDP2 (`fully_shard`) gathers a layer's weights for the time of its forward and again of its backward. They are plain
tensors then, each in memory of its own, which FSDP2 frees and fills again. So they must stay where they are, nothing
about them may be kept between calls, and the operator takes them as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_PLAIN = (torch.Tensor, nn.Parameter)
_CLOSURE = "TensorParallelLayer.install_forward.<locals>.tp_forward"


def local(tensor: Any) -> Any:
    """Return this rank's shard of a DTensor, and anything else as it is."""
    return getattr(tensor, "_local_tensor", tensor)


def is_under_fsdp(mlp: Any) -> bool:
    """Return whether FSDP owns the memory of an MLP's weights: it leaves this mark for torch.compile."""
    return mlp.__dict__.get("_is_fsdp_managed_module", False)


def movable_parameters(mlp: Any) -> list[torch.Tensor]:
    """Return the parameters of a patched MLP whose memory is its own.

    If its neurons are split over ranks, this rank's shards; if FSDP owns the memory, none.
    """
    parameters = [] if is_under_fsdp(mlp) else list(mlp.parameters())
    return parameters if group_of(mlp) is None else [local(parameter) for parameter in parameters]


def group_of(mlp: Any) -> Any:
    """Return the process group over which the neurons of a patched MLP are split; None if they are not, or otherwise.

    Args:
        mlp: An MLP whose class `patch` has set.
    """
    family, modules = mlp.family, mlp._modules
    weight = modules[family.down]._parameters.get("weight")
    if type(weight) in _PLAIN or type(weight).__name__ != "DTensor" or family.packed:
        return None
    if torch.compiler.is_compiling():  # which traces the projections
        return None
    from torch.distributed.tensor import DTensor, Replicate, Shard  # its import takes seconds

    expected = {
        family.gate: ("ColwiseParallel", (Replicate(), Shard(-1)), Shard(0), Shard(0)),
        family.up: ("ColwiseParallel", (Replicate(), Shard(-1)), Shard(0), Shard(0)),
        family.down: ("RowwiseParallel", (Shard(-1), Replicate()), Shard(1), Replicate()),
    }
    meshes = []
    for name, (style, layouts, *placements) in expected.items():
        projection = modules[name]
        found = _style(projection)
        if found is None or type(found[0]).__name__ != style or _layouts(found[0]) != (*layouts, True):
            return None
        meshes.append(found[1])
        for tensor, placement in zip(map(projection._parameters.get, ("weight", "bias")), placements, strict=True):
            if tensor is None:
                continue
            if type(tensor) is not DTensor or tensor.placements != (placement,):
                return None
            meshes.append(tensor.device_mesh)
    if meshes[0].ndim != 1 or any(mesh != meshes[0] for mesh in meshes):
        return None
    return meshes[0].get_group()


def sum_over_ranks(y: torch.Tensor, mlp: Any, group: Any) -> torch.Tensor:
    """Return the output of a split MLP: the sum over the ranks, and the bias of its down projection.

    Args:
        y: `[..., H]`, this rank's part; it is overwritten.
        mlp: The patched MLP.
        group: What `group_of` returned.
    """
    torch.distributed.all_reduce(y, group=group)
    bias = mlp._modules[mlp.family.down]._parameters["bias"]
    return y if bias is None else y + local(bias)


def _style(projection: nn.Module) -> tuple[Any, Any] | None:
    """Return the parallel style of a projection and its mesh; None if its forward is not transformers' closure."""
    forward: Any = projection.__dict__.get("forward")
    if getattr(forward, "__qualname__", "") != _CLOSURE or not forward.__module__.startswith("transformers."):
        return None
    held = dict(zip(forward.__code__.co_freevars, (cell.cell_contents for cell in forward.__closure__), strict=True))
    original = held.get("original_forward")
    # A copy of the module has the closure of the original, which runs the original's weights.
    if getattr(original, "__self__", None) is not projection:
        return None
    if getattr(original, "__func__", None) is not nn.Linear.forward or not {"self", "mesh"} <= held.keys():
        return None
    return held["self"], held["mesh"]


def _layouts(style: Any) -> tuple[Any, Any, Any]:
    """Return how a style takes its input, and how it returns its output."""
    names = ("input_layouts", "output_layouts", "use_local_output")
    return tuple(getattr(style, name, None) for name in names)  # pyright: ignore[reportReturnType]
