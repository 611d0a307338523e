"""One task on one model in lm-eval: models in memory or any lm-eval backend, with results as plain data."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gluprune.io.atomic import write_file
from gluprune.measure import records
from gluprune.models.device import AUTO, choose_device
from gluprune_evals.tasks import TASKS, Limits, build

CPU_BATCH = 16  # sequences generated at a time; on a GPU lm-eval finds the largest batch that fits
RANDOM_SEED, OTHER_SEED = 0, 1234  # lm-eval's
BOOTSTRAPS = 1000  # for the standard error of lm-eval's perplexity


def require_lm_eval() -> None:
    """Check that lm-eval is installed, and silence its log.

    Raises:
        ImportError: It is missing; the message names the extra.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ImportError("lm-eval is not installed: pip install 'gluprune[eval]'") from None
    for name in ("lm_eval", "lm-eval", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


@dataclass(frozen=True)
class Metric:
    """A figure and its standard error (None where lm-eval has none for it)."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Result:
    """One task on one configuration, and everything that it depends on. It is written once and never changed.

    Attributes:
        model: Name of the model; see `gluprune_evals.study`.
        revision: Fingerprint of the model.
        configuration: How it was pruned.
        task: A name in `TASKS`.
        task_version: Version of lm-eval's definition.
        shots: Number of examples in the prompt.
        limits: Which documents were run.
        generation_limit: Maximum number of generated tokens. None: the task's own.
        data: "Hub" or "local files".
        dtype: Dtype of the weights.
        documents: Number of documents run.
        available: Number of documents available.
        metric: The reported metric.
        metrics: Every metric of lm-eval, by its name with the filter.
        per_document: One value of the reported metric for each document, in order; for perplexities of words,
            log-likelihood and number of words. They make paired comparisons possible.
        lengths: Generated tokens of each document, for tasks that generate.
        seconds: Time of the evaluation, without loading data and model.
        patched: Whether the model was patched.
        backend: Backend of lm-eval, or "in memory".
        hardware: GPU, or CPU and threads.
        driver: Version of the NVIDIA driver.
        versions: Versions of the packages that the result depends on.
        commit: Commit of the source tree.
    """

    model: str
    revision: str
    configuration: dict
    task: str
    task_version: str
    shots: int
    limits: str
    generation_limit: int | None
    data: str
    dtype: str
    documents: int
    available: int
    metric: str
    metrics: dict[str, Metric]
    per_document: list
    lengths: list[int] | None
    seconds: float
    patched: bool = False
    backend: str = "in memory"
    hardware: str = field(default_factory=records.hardware)
    driver: str | None = field(default_factory=records.driver)
    versions: dict[str, str] = field(default_factory=records.versions)
    commit: str | None = field(default_factory=records.commit)

    @property
    def value(self) -> float:
        """The reported figure."""
        return self.metrics[self.metric].value

    @property
    def stderr(self) -> float | None:
        """Its standard error."""
        return self.metrics[self.metric].stderr

    def to_json(self) -> str:
        """Return one line of JSON."""
        return json.dumps(dataclasses.asdict(self)) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Result:
        """Read a result.

        Raises:
            ValueError: The text is not a result of this version.
        """
        try:
            fields = json.loads(text)
            fields["metrics"] = {name: Metric(**metric) for name, metric in fields["metrics"].items()}
            return cls(**fields)
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"not a result of this version of gluprune: {error}") from None


def model_in_memory(model: torch.nn.Module, tokenizer):
    """Return the lm-eval model of a Hugging Face causal LM in memory, patched or not, on its device."""
    require_lm_eval()
    from lm_eval.models.huggingface import HFLM

    from gluprune_evals.shared_context import SharedContextLM, can_share

    on_cpu = next(model.parameters()).device.type == "cpu"
    chosen: Any = SharedContextLM if on_cpu and can_share(model) else HFLM
    return chosen(pretrained=model.eval(), tokenizer=tokenizer, batch_size=CPU_BATCH if on_cpu else "auto")


def model_by_backend(backend: str, path: str, *, dtype: str = "auto", device: str = AUTO, model_args: str = ""):
    """Return the lm-eval model of a checkpoint in any backend of lm-eval.

    Args:
        backend: lm-eval's name for it: hf, vllm, sglang, ...
        path: Folder or Hub id.
        dtype: Dtype of the weights; auto is that of the checkpoint.
        device: Where it runs; see `gluprune.models.device.choose_device`.
        model_args: lm-eval's `key=value,...` arguments for it, such as `tensor_parallel_size=2`.

    Raises:
        ValueError: lm-eval has no such backend, or packages that it needs are missing.
    """
    require_lm_eval()
    from lm_eval.api.registry import get_model

    try:
        chosen = get_model(backend)
    except (KeyError, ValueError, ImportError) as error:
        raise ValueError(f"backend {backend!r} cannot be used: {error}") from None
    arguments = ",".join(part for part in (f"pretrained={path},dtype={dtype}", model_args) if part)
    target = choose_device(device)
    batch = CPU_BATCH if target.type == "cpu" and backend == "hf" else "auto"
    return chosen.create_from_arg_string(arguments, {"batch_size": batch, "device": str(target)})


def _configure(tasks: dict, shots: int | None, limits: Limits) -> int | None:
    """Set shots, seeds and the cap on generation as lm-eval's command line does; return the cap, if there is one."""
    random.seed(RANDOM_SEED)
    np.random.seed(OTHER_SEED)
    torch.manual_seed(OTHER_SEED)
    cap = None
    for task in tasks.values():
        if shots is not None or task.config.num_fewshot is None:
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=OTHER_SEED)
        if task.OUTPUT_TYPE == "generate_until":
            cap = task.config.generation_kwargs.get("max_gen_toks")
            if limits.small:
                cap = min(Limits.small_tokens, cap or Limits.small_tokens)
                task.set_config(key="generation_kwargs", value={"max_gen_toks": cap}, update=True)
    return cap


def _per_document(sample: dict, metric: str):
    value = sample[metric]
    return list(value) if isinstance(value, tuple) else float(value)


def _pooled(metrics: list[dict[str, Metric]], sizes: list[int]) -> dict[str, Metric]:
    """Metrics of several leaves as one: means weighted by size, as in lm-eval's groups."""
    if len(metrics) == 1:
        return metrics[0]
    total, pooled = sum(sizes), {}
    for name in metrics[0]:
        value = sum(m[name].value * size for m, size in zip(metrics, sizes, strict=True)) / total
        parts: list[Any] = [m[name].stderr for m in metrics]
        if any(part is None for part in parts):
            pooled[name] = Metric(value, None)
        else:  # of a weighted sum of independent means
            pooled[name] = Metric(
                value, math.sqrt(sum((e * size / total) ** 2 for e, size in zip(parts, sizes, strict=True)))
            )
    return pooled


def _weighted_perplexity_error(pairs: list) -> float | None:
    """Standard error of exp(-sum(log-likelihoods) / sum(words)) over documents: delta method on the ratio."""
    if len(pairs) < 2:
        return None
    words = sum(weight for _, weight in pairs)
    rate = sum(value for value, _ in pairs) / words
    residuals = [value - rate * weight for value, weight in pairs]
    return math.exp(-rate) * math.sqrt(len(pairs) * statistics.variance(residuals)) / words


def evaluate(
    lm,
    name: str,
    limits: Limits,
    *,
    data: Path | None = None,
    samples_to: Path | None = None,
    **identity,
) -> Result | None:
    """Run one task of the study.

    Args:
        lm: An lm-eval model.
        name: One of `TASKS`.
        limits: Which documents are run.
        data: Local folder. None: the Hub.
        samples_to: File for the requests, answers and lengths of every document, as JSON Lines. None: not written.
        identity: The fields of `Result` that say what was evaluated.

    Returns:
        The result; None on all ranks but the first where lm-eval runs on several.

    Raises:
        ValueError: See `gluprune_evals.tasks.build`; or lm-eval cannot run the task on this model.
        RuntimeError: See `gluprune_evals.tasks.build`.
    """
    from lm_eval.evaluator import evaluate as lm_evaluate

    spec = TASKS[name]
    tasks = build(name, limits, data)
    available = {leaf: len(task.eval_docs) for leaf, task in tasks.items()}
    samples = {leaf: limits.samples(spec, count) for leaf, count in available.items()}
    generates = next(iter(tasks.values())).OUTPUT_TYPE == "generate_until"
    cap = _configure(tasks, spec.shots, limits)
    start = time.perf_counter()
    try:
        found: Any = lm_evaluate(
            lm, {"tasks": tasks, "groups": {}}, samples=samples, bootstrap_iters=BOOTSTRAPS, log_samples=True
        )
    except AssertionError as error:  # raised by lm-eval where a model and a task do not fit together
        raise ValueError(f"{name} cannot be run: {error}") from error
    seconds = time.perf_counter() - start
    if found is None:
        return None
    metric, _, filter_name = spec.metric.partition(",")
    chosen = {leaf: [s for s in found["samples"][leaf] if s["filter"] == filter_name] for leaf in tasks}
    per_document = [_per_document(sample, metric) for leaf in tasks for sample in chosen[leaf]]
    metrics = _pooled([_metrics(found["results"][leaf]) for leaf in tasks], [len(chosen[leaf]) for leaf in tasks])
    if name == "wikitext":
        value = metrics[spec.metric].value
        metrics[spec.metric] = Metric(value, _weighted_perplexity_error(per_document))
    lengths = [_length(lm, sample) for leaf in tasks for sample in chosen[leaf]] if generates else None
    if samples_to is not None:
        lines = [_logged(lm, leaf, sample, generates) for leaf in tasks for sample in chosen[leaf]]
        write_file(samples_to, [json.dumps(line).encode() + b"\n" for line in lines])
    return Result(
        task=name,
        task_version=str(next(iter(found["versions"].values()))),
        shots=next(iter(found["n-shot"].values())),
        limits=str(limits),
        generation_limit=cap,
        documents=len(per_document),
        available=sum(available.values()),
        metric=spec.metric,
        metrics=metrics,
        per_document=per_document,
        lengths=lengths,
        seconds=round(seconds, 2),
        data="Hub" if data is None else "local files",
        **identity,
    )


def _metrics(results: dict) -> dict[str, Metric]:
    metrics = {}
    for name, value in results.items():
        metric, comma, filter_name = name.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            error = results.get(f"{metric}_stderr,{filter_name}")
            metrics[name] = Metric(float(value), float(error) if isinstance(error, (int, float)) else None)
    return metrics


def _length(lm, sample: dict) -> int:
    return len(lm.tok_encode(sample["resps"][0][0], add_special_tokens=False))


def _logged(lm, leaf: str, sample: dict, generates: bool) -> dict:
    kept = ("doc_id", "doc", "target", "arguments", "resps", "filtered_resps", "metrics")
    line = {"task": leaf, **{key: sample[key] for key in kept if key in sample}}
    line |= {metric: sample[metric] for metric in sample["metrics"]}
    return line | ({"generated_tokens": _length(lm, sample)} if generates else {})
