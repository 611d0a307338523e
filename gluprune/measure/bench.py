"""`gluprune bench`: milliseconds, joules and bytes of a model at several widths, at a forced output length.

A model is measured dense, pruned to the paper's exact width and to the nearest multiple of 128, each as transformers
runs it and patched, with every decoding method. Every figure becomes a record. On a CPU, where a patched model runs
the same modules, only the stock one is measured.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

import torch

from gluprune.io.progress import progress
from gluprune.measure import paper
from gluprune.measure.decoding import DECODINGS, GenerationTiming, Generator, make_generator, time_generator
from gluprune.measure.energy import Energy, Meter, find_meter
from gluprune.measure.memory import PeakMemory
from gluprune.measure.records import Record
from gluprune.models.glu import GLU, check_head, model_glus
from gluprune.pruning.prune import prune
from gluprune.pruning.widths import percent_hint, target_width
from gluprune.runtime.fusion import fusion_status
from gluprune.runtime.patching import patch, unpatch

STOCK, OURS = "transformers", "gluprune"  # which library runs the MLPs


@dataclass(frozen=True)
class Workload:
    """One workload for a model.

    Attributes:
        batch: Prompts per batch.
        prompt: Tokens per prompt.
        new_tokens: Tokens generated for each prompt, at least 2.
        name: Name of a published workload.
    """

    batch: int
    prompt: int
    new_tokens: int
    name: str = ""

    @property
    def shape(self) -> dict[str, int | str]:
        """The workload as it appears in the shape of a record."""
        named = {"workload": self.name} if self.name else {}
        return {**named, "batch": self.batch, "prompt": self.prompt, "new tokens": self.new_tokens}


Description = tuple[str, dict[str, int | str], torch.dtype]  # provider, shape and dtype of a record


@dataclass(frozen=True)
class BenchPlan:
    """What is measured.

    Attributes:
        workloads: Workloads to measure.
        decodings: Keys of `gluprune.measure.decoding.DECODINGS`.
        ratios: Fractions of neurons to remove; the dense model is always measured.
        seeds: Seeds of the random prompts.
        repeats: Timed runs for each seed.
        providers: Library that runs the MLPs, transformers or gluprune; gluprune only on devices for which it has
            kernels.
        energy_seconds: Shortest window for measuring energy. None: energy is not measured.
        idle_seconds: Length of the preceding window, with nothing running.
    """

    workloads: tuple[Workload, ...]
    decodings: tuple[str, ...]
    ratios: tuple[float, ...] = (0.4,)
    seeds: tuple[int, ...] = (0,)
    repeats: int = 5
    providers: tuple[str, ...] = (STOCK, OURS)
    energy_seconds: float | None = 5.0
    idle_seconds: float = 10.0


# The six workloads of the paper: prompts of the median length in its three data sets (98, 24 and 42 tokens with the
# tokenizer of SmolLM2), its limits on new tokens as forced lengths, its batches, seeds and idle calibration.
_STUDIED = (("hellaswag", 98, 20), ("mmlu", 24, 50), ("ifeval", 42, 150))
PAPER = BenchPlan(
    workloads=tuple(
        Workload(batch, prompt, new_tokens, f"{name} b{batch}")
        for batch in (1, 8)
        for name, prompt, new_tokens in _STUDIED
    ),
    decodings=("generate",),
    ratios=paper.RATIOS,
    seeds=(42, 123, 456),
    repeats=3,
    idle_seconds=30.0,
)
PRESETS = {"paper": PAPER}


def check(plan: BenchPlan, device: torch.device) -> None:
    """Check that a plan can be measured on a device.

    Raises:
        ValueError: It cannot.
    """
    for decoding in ("graph", "graph_decoding"):
        if decoding in plan.decodings and device.type != "cuda":
            raise ValueError(f"decoding {decoding!r} needs a CUDA device, the device is {device}")
    for workload in plan.workloads:
        for name, least in (("batch", 1), ("prompt", 1), ("new_tokens", 2)):
            if getattr(workload, name) < least:
                raise ValueError(f"{name.replace('_', ' ')} must be at least {least}, got {getattr(workload, name)}")
    if plan.repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {plan.repeats}")
    for ratio in plan.ratios:
        if not 0 < ratio < 1:
            raise ValueError(f"pruning ratios lie between 0 and 1 (both excluded), got {ratio}{percent_hint(ratio)}")


def widths(glu: GLU, ratios: Sequence[float]) -> list[int]:
    """Return the dense width, and for each ratio the paper's width and the nearest multiple of 128, wide to narrow."""
    dense = glu.intermediate_size
    found = {dense}
    for ratio in ratios:
        exact = target_width(dense, glu.hidden_size, pruning_ratio=ratio, multiple_of=1)
        found |= {exact, max(128, (2 * exact + 128) // 256 * 128)}
    return sorted((width for width in found if width <= dense), reverse=True)


def weight_bytes(model) -> int:
    """Return the bytes that a decode step reads: all weights except an embedding table that is not also the head."""
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    table = 0 if embedding is head else embedding.nbytes
    return sum(parameter.nbytes for parameter in model.parameters()) - table


def bench(dense, name: str, plan: BenchPlan, device: torch.device, keep: Callable[[Record], None]) -> None:
    """Measure a model at every width of a plan.

    Args:
        dense: A causal LM in eval mode on the CPU. It is not changed: copies of it are pruned and moved.
        name: Its name in the records; for random weights, the name says so.
        plan: What to measure.
        device: Where to measure.
        keep: Called with every record as soon as it is measured.

    Raises:
        ValueError: The plan cannot be measured on the device, or the family of the model is not supported.
    """
    device = torch.device(device)
    check(plan, device)
    check_head(dense, "measuring generation")
    all_widths = widths(model_glus(dense)[0], plan.ratios)
    meter, idle = calibrated_meter(device, plan)
    with progress(total=len(all_widths) * len(_cells(plan, device)), unit="cell", desc="bench") as bar:
        for width in all_widths:
            bar.set_description(f"{width} neurons")
            for made in bench_model(narrowed(dense, width).to(device), name, plan, meter, idle):
                for record in made:
                    keep(record)
                bar.update()


def calibrated_meter(device: torch.device, plan: BenchPlan) -> tuple[Meter, Energy]:
    """Return the device's meter, and its idle measurement."""
    torch.zeros(1, device=device)  # an idle GPU uses more power once a context exists on it
    meter = find_meter(device)
    return meter, meter.idle(plan.idle_seconds)


def _cells(plan: BenchPlan, device: torch.device) -> list[tuple[str, str, Workload]]:
    providers = [provider for provider in plan.providers if provider == STOCK or device.type == "cuda"]
    return list(product(providers, plan.decodings, plan.workloads))


def bench_model(model, name: str, plan: BenchPlan, meter: Meter, idle: Energy) -> Iterator[list[Record]]:
    """Yield the records of a model on its device, for each provider, decoding method and workload in turn."""
    for provider, decoding, workload in _cells(plan, model.device):
        if provider == OURS:
            patch(model)
        else:
            unpatch(model)
        common = described(model, name, provider, decoding, workload)
        yield list(measure(model, common, workload, plan=plan, meter=meter, idle=idle))


def narrowed(dense, width: int):
    """Return a copy of a model with MLPs of `width` neurons."""
    model = copy.deepcopy(dense)
    if width < model_glus(model)[0].intermediate_size:
        prune(model, intermediate_size=width, multiple_of=1)
    return model


def measure(
    model,
    common: Description,
    workload: Workload,
    *,
    plan: BenchPlan,
    meter: Meter,
    idle: Energy,
) -> Iterator[Record]:
    """Yield the records of one model, decoding method and workload: TTFT, TPOT, TTLT, tokens/s, peak memory, joules.

    If the device or the decoding method does not support something, the record has the reason and no figure.

    Args:
        model: A causal LM in eval mode.
        common: What its records have in common, see `described`.
        workload: The workload.
        plan: Seeds, repeats and windows.
        meter: The meter of the model's device.
        idle: The idle measurement of the meter.
    """
    decoding = str(common[1]["decoding"])
    prompts = [prompt for seed in plan.seeds for prompt in random_prompts(model, workload, seed, plan.repeats)]
    memory = PeakMemory(model)
    try:
        generator = make_generator(decoding, model, prompts[0], workload.new_tokens)
        timing = time_generator(generator, prompts, workload.new_tokens)
    except (torch.OutOfMemoryError, ValueError) as error:
        reason = "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error)
        yield Record.missing("generation: TTLT", *common, unit="s", reason=reason)
        return
    yield from timing_records(timing, common, weight_bytes(model))
    peak, method = memory.read(lambda: generator(prompts[0], workload.new_tokens, _nothing))
    yield _measured_or_missing("generation: peak memory", common, "B", peak, method)
    if plan.energy_seconds is not None:
        yield from _energy(
            generator,
            prompts[0],
            common,
            workload=workload,
            seconds=plan.energy_seconds,
            meter=meter,
            idle=idle,
        )


def described(model, name: str, provider: str, decoding: str, workload: Workload) -> Description:
    """Return what the records of one model, decoding method and workload have in common."""
    glu = model_glus(model)[0]
    shape = {"model": name, "H": glu.hidden_size, "I": glu.intermediate_size, **workload.shape, "decoding": decoding}
    fused = [entry.fused for entry in fusion_status(model)]
    if provider == OURS and not all(fused):
        provider = f"{OURS}, {sum(fused)} of {len(fused)} MLPs fused"
    return provider, shape, model.dtype


def timing_records(timing: GenerationTiming, common: Description, nbytes: int) -> Iterator[Record]:
    """Yield the records of a timing; `nbytes` counts the weights that a decode step reads."""
    rates = [timing.batch * timing.new_tokens / seconds for seconds in timing.ttlts]
    yield Record.of("generation: TTFT", *common, unit="s", values=timing.ttfts, nbytes=nbytes)
    yield Record.of("generation: TPOT", *common, unit="s", values=timing.tpots, nbytes=nbytes)
    yield Record.of("generation: TTLT", *common, unit="s", values=timing.ttlts)
    yield Record.of("generation: tokens per second", *common, unit="tokens/s", values=rates)


def _energy(
    generator: Generator,
    prompt: torch.Tensor,
    common: Description,
    *,
    workload: Workload,
    seconds: float,
    meter: Meter,
    idle: Energy,
) -> Iterator[Record]:
    """Joules of whole generations for each token, gross and above idle; and joules of the prefill."""
    whole, runs = meter.repeat(lambda: generator(prompt, workload.new_tokens, _nothing).cpu(), seconds)
    tokens = runs * workload.batch * workload.new_tokens
    if whole.joules is None:
        yield Record.missing("generation: energy", *common, unit="J/token", reason=whole.method)
        return
    yield Record.of("generation: energy", *common, unit="J/token", values=[whole.joules / tokens], method=whole.method)
    above = whole.above(idle)
    if above is not None and idle.joules is not None:
        method = f"{whole.method}, less {idle.joules / idle.seconds:.4g} W at rest"
        yield Record.of(
            "generation: energy above idle", *common, unit="J/token", values=[above / tokens], method=method
        )
    prefill, runs = meter.repeat(lambda: generator(prompt, 1, _nothing).cpu(), seconds)
    joules = None if prefill.joules is None else prefill.joules / runs
    yield _measured_or_missing("generation: energy of the prefill", common, "J", joules, prefill.method)


def _measured_or_missing(what: str, common: Description, unit: str, value: float | None, method: str) -> Record:
    if value is None:
        return Record.missing(what, *common, unit=unit, reason=method)
    return Record.of(what, *common, unit=unit, values=[value], method=method)


def _nothing() -> None:
    pass


def random_prompts(model, workload: Workload, seed: int, count: int) -> list[torch.Tensor]:
    """Return random token ids: at a forced length, time and energy do not depend on the text."""
    generator = torch.Generator().manual_seed(seed)
    size, vocabulary = (count, workload.batch, workload.prompt), model.config.get_text_config().vocab_size
    return list(torch.randint(vocabulary, size, generator=generator).to(model.device))


def bench_plan(
    preset: str | None,
    device: torch.device,
    *,
    ratios: Sequence[float] | None = None,
    decodings: Sequence[str] | None = None,
    batches: Sequence[int] = (1, 8),
    prompts: Sequence[int] = (128, 1024),
    new_tokens: int = 64,
) -> BenchPlan:
    """Return the plan of a preset, or of batches, prompt lengths and forced lengths.

    Args:
        preset: A key of `PRESETS`, or None.
        device: Determines which decoding methods are measured by default.
        ratios: Shares of the neurons to remove. None: the default of the plan.
        decodings: Decoding methods. None: all that the device supports, or those of the preset.
        batches: Batch sizes, without a preset.
        prompts: Prompt lengths in tokens, without a preset.
        new_tokens: Forced output length, without a preset.
    """
    if preset is not None:
        plan = PRESETS[preset]
    else:
        workloads = tuple(Workload(batch, prompt, new_tokens) for batch in batches for prompt in prompts)
        on_cuda = torch.device(device).type == "cuda"
        plan = BenchPlan(workloads, tuple(DECODINGS) if on_cuda else ("generate", "compiled"))
    changes = {"ratios": ratios, "decodings": decodings}
    return replace(plan, **{name: tuple(value) for name, value in changes.items() if value is not None})
