"""`gluprune bench`."""

from __future__ import annotations

import dataclasses
import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gluprune.cli.options import Device, Dtype, DtypeName, Json, Quiet, Verbose, require
from gluprune.io.hub import model_name

EXAMPLES = (
    "gluprune bench meta-llama/Llama-3.2-1B --pruning-ratio 0.2 0.4",
    "gluprune bench --random llama-3.2-1b --batch 1 --prompt 128 --new-tokens 32",
)
_WORKLOADS = "Workloads (without --preset)"


class Preset(StrEnum):
    """The presets of `bench`."""

    PAPER = "paper"


class Decoding(StrEnum):
    """The decoding methods; see `gluprune.measure.decoding`."""

    GENERATE = "generate"
    STATIC = "static"
    GRAPH_DECODING = "graph_decoding"
    COMPILED = "compiled"
    GRAPH = "graph"


OptionalModel = Annotated[
    str | None, typer.Argument(metavar="[MODEL]", help="Model folder or Hub id.", show_default=False)
]
Random = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Instead of MODEL: random weights in the shapes of llama-3.2-1b, llama-3.2-3b or llama-3.1-8b.",
    ),
]
PruningRatio = Annotated[
    list[float] | None,
    typer.Option(metavar="P...", help="Fractions of neurons to remove. By default 0.4."),
]
Decodings = Annotated[
    list[Decoding] | None,
    typer.Option(
        metavar="NAME...",
        help="generate: plain `generate`; static: `generate` over a static cache; graph_decoding: `generate` within"
        " `gluprune.graph_decoding`; compiled: a compiled decode step; graph: a CUDA graph of the step. By default all"
        " on a GPU, and generate and compiled on a CPU.",
    ),
]
OptionalPreset = Annotated[
    Preset | None,
    typer.Option(metavar="paper", help="The paper's workloads, widths, seeds and idle calibration."),
]
Batch = Annotated[
    list[int] | None,
    typer.Option(metavar="B...", help="Batch sizes. By default 1 8.", rich_help_panel=_WORKLOADS),
]
Prompt = Annotated[
    list[int] | None,
    typer.Option(metavar="N...", help="Prompt lengths in tokens. By default 128 1024.", rich_help_panel=_WORKLOADS),
]
NewTokens = Annotated[
    int | None,
    typer.Option(metavar="N", help="Forced output length. By default 64.", rich_help_panel=_WORKLOADS),
]
Out = Annotated[str, typer.Option(metavar="FOLDER", help="Folder in which records are appended.")]


def run(
    model: OptionalModel = None,
    *,
    random: Random = None,
    device: Device = "auto",
    dtype: Dtype = DtypeName.AUTO,
    pruning_ratio: PruningRatio = None,
    decoding: Decodings = None,
    preset: OptionalPreset = None,
    batch: Batch = None,
    prompt: Prompt = None,
    new_tokens: NewTokens = None,
    out: Out = "bench_output",
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Measure latency, memory and energy.

    Measures the dense model and models pruned to the paper's exact width and to the nearest multiple of 128, patched
    and not: TTFT, TPOT, TTLT, tokens/s, peak memory and J/token at a forced output length.
    """
    require("bench", "matplotlib")
    if (model is None) == (random is None):
        raise ValueError("give exactly one of MODEL and --random NAME")
    sizes = {"batches": batch, "prompts": prompt, "new_tokens": new_tokens}
    given = {name: value for name, value in sizes.items() if value}
    if preset and given:
        raise ValueError(f"--preset {preset.value} has its own workloads: omit --batch, --prompt and --new-tokens")

    import torch

    from gluprune.checkpoints.load_save import load
    from gluprune.measure import bench, records
    from gluprune.measure.random_models import random_model
    from gluprune.models.device import choose_device
    from gluprune.reports import report
    from gluprune.reports.terminal import bench_table

    target = choose_device(device)
    plan = bench.bench_plan(
        preset and preset.value,
        target,
        ratios=pruning_ratio or None,
        decodings=[name.value for name in decoding] if decoding else None,
        **given,
    )
    bench.check(plan, target)
    if model is None:
        weights = torch.bfloat16 if dtype is DtypeName.AUTO else getattr(torch, dtype.value)
        dense, name = random_model(random or "", weights), f"{random}, random weights"
    else:
        dense, name = load(model, dtype=dtype.value).eval(), model_name(model)
    path, measured = Path(out) / "model.jsonl", []

    def keep(record: records.Record) -> None:
        records.append(path, record)
        measured.append(record)

    bench.bench(dense, name, plan, target, keep)
    written = report.write(report.read_all([path]), out)
    if as_json:
        print(json.dumps([dataclasses.asdict(record) for record in measured]))
    else:
        print(bench_table(measured), "", f"{path}: the records", f"{written}: tables and plots", sep="\n")
