"""`gluprune bench`: what narrowing and fusing buy in milliseconds and joules, at forced length.

A model is measured dense, pruned to the study's exact width and to the nearest multiple of 128, each as transformers runs
it and patched, through every way of decoding. Everything becomes records; nothing is judged here. On a CPU, where a patched
model runs the very same modules, only the stock one is measured.
"""

from __future__ import annotations

import copy
import gc
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from tqdm.auto import tqdm

from gluprune.measure.decoding import GenerationTiming, Generator, make_generator, time_generator
from gluprune.measure.energy import Energy, Meter, find_meter
from gluprune.measure.records import Record
from gluprune.models.glu import GLU, model_glus
from gluprune.pruning.prune import prune
from gluprune.pruning.widths import target_width
from gluprune.reports import plots
from gluprune.runtime.fusion import fusion_status
from gluprune.runtime.patching import patch, unpatch

PAPER_RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)  # those of arXiv 2512.22671
STOCK, OURS = "transformers", "gluprune"  # who runs the MLPs


@dataclass(frozen=True)
class Workload:
    """One way of using a model.

    batch: prompts at a time; prompt: tokens of each; new_tokens: tokens generated for each, at least 2.
    name: of a published workload.
    """

    batch: int
    prompt: int
    new_tokens: int
    name: str = ""

    @property
    def shape(self) -> dict[str, int | str]:
        named = {"workload": self.name} if self.name else {}
        return {**named, "batch": self.batch, "prompt": self.prompt, "new tokens": self.new_tokens}


@dataclass(frozen=True)
class Plan:
    """What is measured.

    ratios: shares of the neurons to remove, beside none. decodings: keys of `gluprune.measure.decoding.DECODINGS`.
    providers: who runs the MLPs, transformers or gluprune; gluprune where it has kernels alone.
    seeds: of the prompts, which are random; repeats: timed runs for each.
    energy_seconds: a window of energy at the least; None: energy is not measured. idle_seconds: the window before, with
        nothing running.
    """

    workloads: tuple[Workload, ...]
    decodings: tuple[str, ...]
    ratios: tuple[float, ...] = (0.4,)
    seeds: tuple[int, ...] = (0,)
    repeats: int = 5
    providers: tuple[str, ...] = (STOCK, OURS)
    energy_seconds: float | None = 5.0
    idle_seconds: float = 10.0


# The six workloads of the study: prompts of the median length of its three data sets (98, 24 and 42 tokens, counted with the
# tokenizer of SmolLM2), its limits on new tokens as forced lengths, its batches, its seeds, its idle calibration.
_STUDIED = (("hellaswag", 98, 20), ("mmlu", 24, 50), ("ifeval", 42, 150))
PAPER = Plan(
    workloads=tuple(
        Workload(batch, prompt, new_tokens, f"{name} b{batch}")
        for batch in (1, 8)
        for name, prompt, new_tokens in _STUDIED
    ),
    decodings=("generate",),
    ratios=PAPER_RATIOS,
    seeds=(42, 123, 456),
    repeats=3,
    idle_seconds=30.0,
)
PRESETS = {"paper": PAPER}


def check(plan: Plan, device: torch.device) -> None:
    """Raises ValueError for what cannot be measured on a device, before anything is."""
    if "graph" in plan.decodings and device.type != "cuda":
        raise ValueError(f"decoding 'graph' needs a CUDA device, the device is {device}")
    for workload in plan.workloads:
        for name, least in (("batch", 1), ("prompt", 1), ("new_tokens", 2)):
            if getattr(workload, name) < least:
                raise ValueError(f"{name.replace('_', ' ')} must be at least {least}, got {getattr(workload, name)}")
    if plan.repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {plan.repeats}")
    for ratio in plan.ratios:
        if not 0 < ratio < 1:
            raise ValueError(f"pruning ratios lie between 0 and 1 (both excluded), got {ratio}")


def widths(glu: GLU, ratios: Sequence[float]) -> list[int]:
    """The dense width, and for each ratio the study's exact width and the nearest multiple of 128, wide to narrow."""
    dense = glu.intermediate_size
    found = {dense}
    for ratio in ratios:
        exact = target_width(dense, glu.hidden_size, pruning_ratio=ratio, multiple_of=1)
        found |= {exact, max(128, (2 * exact + 128) // 256 * 128)}
    return sorted((width for width in found if width <= dense), reverse=True)


def weight_bytes(model) -> int:
    """Bytes of all weights that a decode step reads: all but a table of embeddings that is not the head, too."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    table = 0 if embedding is head else embedding.nbytes
    return sum(parameter.nbytes for parameter in model.parameters()) - table


def bench(dense, name: str, plan: Plan, device: torch.device, keep: Callable[[Record], None]) -> None:
    """Measure a model at every width of a plan; `keep` is given every record as it is made.

    Args:
        dense: a causal LM in eval mode on the CPU, where it stays as it is: copies of it are pruned and moved.
        name: what the records call it; it says so there if the weights are random.
        device: where to measure.

    Raises:
        ValueError: a plan that cannot be measured on the device, or a model of an unsupported family.
    """
    device = torch.device(device)
    check(plan, device)
    all_widths = widths(model_glus(dense)[0], plan.ratios)
    meter, idle = calibrated_meter(device, plan)
    with tqdm(total=len(all_widths) * len(_cells(plan, device)), unit="cell", disable=None) as progress:
        for width in all_widths:
            progress.set_description(f"{width} neurons")
            for made in bench_model(narrowed(dense, width).to(device), name, plan, meter, idle):
                for record in made:
                    keep(record)
                progress.update()


def calibrated_meter(device: torch.device, plan: Plan) -> tuple[Meter, Energy]:
    """The device's meter, and what it measures at rest."""
    torch.zeros(1, device=device)  # a GPU with a context on it uses more at rest
    meter = find_meter(device)
    return meter, meter.idle(plan.idle_seconds)


def _cells(plan: Plan, device: torch.device) -> list[tuple[str, str, Workload]]:
    providers = [provider for provider in plan.providers if provider == STOCK or device.type == "cuda"]
    return list(product(providers, plan.decodings, plan.workloads))


def bench_model(model, name: str, plan: Plan, meter: Meter, idle: Energy) -> Iterator[list[Record]]:
    """Measure a model where it is: the records of each provider, way of decoding and workload in turn."""
    for provider, decoding, workload in _cells(plan, model.device):
        patch(model) if provider == OURS else unpatch(model)  # both are idempotent
        yield list(measure(model, name, provider, decoding, workload, plan, meter, idle))


def narrowed(dense, width: int):
    """A copy of a model with MLPs of `width` neurons."""
    model = copy.deepcopy(dense)
    if width < model_glus(model)[0].intermediate_size:
        prune(model, intermediate_size=width, multiple_of=1)
    return model


def measure(
    model, name: str, provider: str, decoding: str, workload: Workload, plan: Plan, meter: Meter, idle: Energy
) -> Iterator[Record]:
    """The records of one model, way of decoding and workload: TTFT, TPOT, TTLT, tokens/s, peak memory, joules.

    What the device or the decoding refuses becomes a record that says so.
    """
    common = described(model, name, provider, decoding, workload)
    prompts = [prompt for seed in plan.seeds for prompt in random_prompts(model, workload, seed, plan.repeats)]
    memory = _PeakMemory(model)
    try:
        generator = make_generator(decoding, model, prompts[0], workload.new_tokens)
        timing = time_generator(generator, prompts, workload.new_tokens)
    except (torch.OutOfMemoryError, ValueError) as error:
        words = "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error)
        yield Record.refused("generation: TTLT", *common, "s", words)
        return
    yield from timing_records(timing, common, weight_bytes(model))
    peak, method = memory.read(lambda: generator(prompts[0], workload.new_tokens, _nothing))
    yield _record_or_words("generation: peak memory", common, "B", peak, method)
    if plan.energy_seconds is not None:
        yield from _energy(generator, prompts[0], common, workload, plan, meter, idle)


Description = tuple[str, dict[str, int | str], torch.dtype]  # provider, shape and dtype, as a record has them


def described(model, name: str, provider: str, decoding: str, workload: Workload) -> Description:
    """What the records of one model, way of decoding and workload have in common."""
    glu = model_glus(model)[0]
    shape = {"model": name, "H": glu.hidden_size, "I": glu.intermediate_size, **workload.shape, "decoding": decoding}
    fused = [entry.fused for entry in fusion_status(model)]
    if provider == OURS and not all(fused):
        provider = f"{OURS}, {sum(fused)} of {len(fused)} MLPs fused"
    return provider, shape, model.dtype


def timing_records(timing: GenerationTiming, common: Description, nbytes: int) -> Iterator[Record]:
    """The records of a timing; `nbytes` are those of the weights that a decode step reads."""
    rates = [timing.batch * timing.new_tokens / seconds for seconds in timing.ttlts]
    yield Record.of("generation: TTFT", *common, "s", timing.ttfts, nbytes=nbytes)
    yield Record.of("generation: TPOT", *common, "s", timing.tpots, nbytes=nbytes)
    yield Record.of("generation: TTLT", *common, "s", timing.ttlts)
    yield Record.of("generation: tokens per second", *common, "tokens/s", rates)


def _energy(
    generator: Generator,
    prompt: torch.Tensor,
    common: Description,
    workload: Workload,
    plan: Plan,
    meter: Meter,
    idle: Energy,
) -> Iterator[Record]:
    """Joules of whole generations, a token, gross and above idle; and those of the prefill alone."""
    whole, runs = meter.repeat(lambda: generator(prompt, workload.new_tokens, _nothing).cpu(), plan.energy_seconds)
    tokens = runs * workload.batch * workload.new_tokens
    if whole.joules is None:
        yield Record.refused("generation: energy", *common, "J/token", whole.method)
        return
    yield Record.of("generation: energy", *common, "J/token", [whole.joules / tokens], method=whole.method)
    above = whole.above(idle)
    if above is not None:
        told = f"{whole.method}, less {idle.joules / idle.seconds:.4g} W at rest"
        yield Record.of("generation: energy above idle", *common, "J/token", [above / tokens], method=told)
    prefill, runs = meter.repeat(lambda: generator(prompt, 1, _nothing).cpu(), plan.energy_seconds)
    joules = None if prefill.joules is None else prefill.joules / runs
    yield _record_or_words("generation: energy of the prefill", common, "J", joules, prefill.method)


def _record_or_words(what: str, common: Description, unit: str, value: float | None, method: str) -> Record:
    if value is None:
        return Record.refused(what, *common, unit, method)
    return Record.of(what, *common, unit, [value], method=method)


def _nothing() -> None:
    pass


def random_prompts(model, workload: Workload, seed: int, count: int) -> list[torch.Tensor]:
    """Random token ids: at a forced length, time and energy do not depend on what is said."""
    generator = torch.Generator().manual_seed(seed)
    size, vocabulary = (count, workload.batch, workload.prompt), model.config.get_text_config().vocab_size
    return list(torch.randint(vocabulary, size, generator=generator).to(model.device))


class _PeakMemory:
    """Memory that a model and its work take at most.

    On CUDA what the allocator held at most since this was made. On a CPU the weights, and by how much the process grew at
    most in one more run; what it had taken before for other things, such as compiling, cannot be told from that.
    """

    def __init__(self, model):
        self.model, self.device = model, model.device
        torch.compiler.reset()  # compiled steps, and cycles with them, hold models and caches that were measured before
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def read(self, work: Callable[[], object]) -> tuple[int | None, str]:
        """Bytes, or None, and the method."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device), "most that torch's CUDA allocator held"
        try:
            before = _resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
            work()
            grown = max(0, _resident("VmHWM") - before)
        except OSError as error:
            return None, f"not measured: the peak of the process cannot be read ({error.strerror})"
        weights = sum(parameter.nbytes for parameter in self.model.parameters())
        return weights + grown, "weights, and growth of resident memory in a run"


def _resident(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def table(records: Sequence[Record]) -> str:
    """The records of `bench` for a terminal: a line a model, way of decoding and workload."""
    columns = {
        "TTFT ms": ("generation: TTFT", 1e3),
        "TPOT ms": ("generation: TPOT", 1e3),
        "TTLT ms": ("generation: TTLT", 1e3),
        "tokens/s": ("generation: tokens per second", 1),
        "peak GB": ("generation: peak memory", 1e-9),
        "J/token": ("generation: energy", 1),
        "above idle": ("generation: energy above idle", 1),
    }
    rows: dict[tuple, dict[str, Record]] = {}
    for record in records:
        shape = record.shape
        place = shape.get("workload", f"batch {shape['batch']}, {shape['prompt']}+{shape['new tokens']} tokens")
        rows.setdefault((shape["I"], record.provider, shape["decoding"], place), {})[record.what] = record
    head = f"{'neurons':>8}  {'provider':<13}{'decoding':<10}{'workload':<26}" + "".join(
        f"{name:>11}" for name in columns
    )
    lines, words = [head], []
    for (width, provider, decoding, place), row in rows.items():
        cells = []
        for what, scale in columns.values():
            value = row[what].p50 if what in row else None
            cells.append("–" if value is None else plots.number(value * scale))
        lines.append(f"{width:>8}  {provider:<13}{decoding:<10}{place:<26}" + "".join(f"{cell:>11}" for cell in cells))
        words += [
            f"{record.what.removeprefix('generation: ')}: {record.refusal}" for record in row.values() if record.refusal
        ]
    return "\n".join([*lines, *(["", *dict.fromkeys(words)] if words else [])])


def plan_of(
    preset: str | None,
    device: torch.device,
    *,
    ratios: Sequence[float] | None = None,
    decodings: Sequence[str] | None = None,
    batches: Sequence[int] = (1, 8),
    prompts: Sequence[int] = (128, 1024),
    new_tokens: int = 64,
) -> Plan:
    """The plan of a preset, or of batches, prompt lengths and forced lengths; ways of decoding that the device has."""
    if preset is not None:
        plan = PRESETS[preset]
    else:
        workloads = tuple(Workload(batch, prompt, new_tokens) for batch in batches for prompt in prompts)
        on_cuda = torch.device(device).type == "cuda"
        plan = Plan(workloads, ("generate", "compiled", "graph") if on_cuda else ("generate", "compiled"))
    changes = {"ratios": ratios, "decodings": decodings}
    return replace(plan, **{name: tuple(value) for name, value in changes.items() if value is not None})
