"""Random checkpoints of real models' shapes, written to disk: `python -m benchmarks.lib.checkpoints --help`."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from gluprune.checkpoints.load_save import build_empty
from gluprune.io.atomic import write_file
from gluprune.io.shards import INDEX_FILE, SINGLE_FILE, encode_header
from gluprune.measure.random_models import CONFIGS


def write_random_checkpoint(folder: Path, config: PreTrainedConfig, shard_bytes: int, seed: int = 0) -> int:
    """Write a checkpoint of bf16 weights in shards of at most `shard_bytes` (or one tensor), piece by piece.

    The weights are slices of a pool of 2**26 normal numbers (standard deviation 0.02), at a random offset each.

    Returns:
        Size of the shards in bytes.
    """
    generator = torch.Generator().manual_seed(seed)
    pool = (torch.randn(1 << 26, generator=generator) * 0.02).bfloat16()
    # Names as in the causal LM's state dict; a tied head is not stored.
    weights = [(name, tuple(parameter.shape)) for name, parameter in build_empty(config).named_parameters()]

    groups: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in weights:
        nbytes = 2 * math.prod(shape)
        if groups[-1] and filled + nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((name, shape))
        filled += nbytes

    def content(group: list[tuple[str, tuple[int, ...]]]) -> Iterator[bytes | memoryview]:
        yield encode_header([(name, "BF16", shape) for name, shape in group], {"format": "pt"})
        for _, shape in group:
            position, left = int(torch.randint(len(pool), (1,), generator=generator)), math.prod(shape)
            while left:
                piece = pool[position : position + left]
                yield memoryview(piece.view(torch.uint8).numpy())
                position, left = 0, left - len(piece)

    names = [SINGLE_FILE]
    if len(groups) > 1:
        names = [f"model-{index + 1:05d}-of-{len(groups):05d}.safetensors" for index in range(len(groups))]
    for name, group in zip(names, groups, strict=True):
        write_file(folder / name, content(group))
    if len(groups) > 1:
        weight_map = {weight: name for name, group in zip(names, groups, strict=True) for weight, _ in group}
        write_file(folder / INDEX_FILE, [json.dumps({"metadata": {}, "weight_map": weight_map}).encode()])
    config.save_pretrained(folder)
    return sum((folder / name).stat().st_size for name in names)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=CONFIGS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shard-gb", type=float, default=5.0)
    options = parser.parse_args()
    size = write_random_checkpoint(options.folder, CONFIGS[options.name], int(options.shard_gb * 1e9))
    print(f"{options.folder}: {size:,} bytes")
