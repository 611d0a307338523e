"""The programs that run pruned models, and the widths that each of them takes.

Sources, as read in their public repositories, and runs:

- transformers, vllm: any width runs. Rows of down_proj whose size is not a multiple of 16 bytes slow plain matrix
  products down (benchmarks/results/nvidia-h200/report.md: the widths 6554 and 4916 against 4096).
- tpN: vllm/distributed/utils.py, `ensure_divisibility`, asserts that the width divides over the ranks, and
  vllm/config/model.py, `verify_with_parallel_config`, that the attention heads do. Each rank's rows should be multiples
  of 16 bytes, for the same reason as on one GPU.
- fp8: vllm/model_executor/layers/quantization/utils/fp8_utils.py, `validate_fp8_block_shape`: in the merged gate and
  up, the gate must be a multiple of the block, which is 128.
- awq, gptq: vllm/model_executor/layers/quantization/{awq,gptq}.py, `create_weights`: the input of down_proj must be a
  multiple of the group, which is usually 128, and the input of the other projections, the hidden size, as well.
- fp8, awq, gptq of layers that differ: vllm/model_executor/models/nemotron_nas.py gives each layer's projections the
  quantization, with the same rules. No such checkpoint has been quantized or run.
- llama.cpp: SmolLM2-135M at several widths, and with layers that differ (docs/deploying.md). It replaces a K-quant
  whose rows are not multiples of 256 by a larger format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gluprune.models import nemotron_nas

_UNTESTED = "not tested: quantizing that export"
_UNALIGNED = "rows of down_proj are not multiples of 16 bytes in half precision"


@dataclass(frozen=True)
class Consumer:
    """A program, or a way to run or quantize a model, as far as it restricts widths.

    Attributes:
        name: The value of `deploy=`.
        multiple: Widths that are multiples of this run without loss.
        required: Widths that are not multiples of this are refused.
        slower: What happens to widths that are multiples of `required`, but not of `multiple`.
        export: The format of `gluprune export` that layers which differ need.
        ranks: Number of processes that the attention heads are divided among.
        hidden: Hidden sizes that are not multiples of this are refused.
        differing: What else to know about layers that differ.
    """

    name: str
    multiple: int
    required: int = 1
    slower: str = ""
    export: str = nemotron_nas.MODEL_TYPE
    ranks: int = 1
    hidden: int = 1
    differing: str = ""


CONSUMERS: dict[str, Consumer] = {
    consumer.name: consumer
    for consumer in (
        Consumer("transformers", 8, slower=_UNALIGNED, differing="or with gluprune.load, as they are"),
        Consumer("vllm", 8, slower=_UNALIGNED),
        *(
            Consumer(f"tp{ranks}", 8 * ranks, required=ranks, slower=f"on each rank, {_UNALIGNED}", ranks=ranks)
            for ranks in (2, 4, 8)
        ),
        Consumer("fp8", 128, required=128, differing=_UNTESTED),
        *(Consumer(name, 128, required=128, hidden=128, differing=_UNTESTED) for name in ("awq", "gptq")),
        Consumer("llama.cpp", 256, slower="K-quants of down_proj fall back to larger formats", export="gguf"),
    )
}


@dataclass(frozen=True)
class Verdict:
    """Whether a consumer takes the widths of a model.

    Attributes:
        outcome: "works", "works slower" (or with larger files) or "refused".
        reason: Why it is slower or refused, or what is needed for it to work. Empty if there is nothing to say.
    """

    outcome: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.outcome}: {self.reason}" if self.reason else self.outcome


def consumer(name: str) -> Consumer:
    """Return the table entry of a consumer.

    Raises:
        ValueError: There is none of this name.
    """
    if name not in CONSUMERS:
        raise ValueError(f"unknown deploy {name!r}; allowed: {', '.join(CONSUMERS)}")
    return CONSUMERS[name]


def sizes_of(config: Any) -> dict[str, Any]:
    """Return what `verdict` checks besides the widths, from a config of transformers."""
    text = config.get_text_config()
    return {"model_type": text.model_type, "heads": text.num_attention_heads, "hidden_size": text.hidden_size}


def verdict(
    found: Consumer, widths: Sequence[int], model_type: str, *, heads: int = 0, hidden_size: int = 0
) -> Verdict:
    """Return whether a consumer takes a model of these sizes.

    Args:
        found: An entry of `CONSUMERS`.
        widths: Intermediate size of every layer.
        model_type: `config.model_type` of the text part.
        heads: Its number of attention heads. 0: not checked.
        hidden_size: H. 0: not checked.
    """
    if hidden_size % found.hidden:
        return Verdict("refused", f"the hidden size {hidden_size} is not a multiple of {found.hidden}")
    if heads % found.ranks:
        return Verdict("refused", f"{heads} attention heads do not divide among {found.ranks} ranks")
    differ = len(set(widths)) > 1
    if differ and (obstacle := nemotron_nas.obstacle(model_type)):
        return Verdict(
            "refused", f"layers differ, and the format for such layers does not hold {model_type}: {obstacle}"
        )
    if unfit := _first_unfit(widths, found.required):
        return Verdict("refused", f"{unfit} is not a multiple of {found.required}")
    needed = ""
    if differ:
        needed = "; ".join(filter(None, (f"after `gluprune export --format {found.export}`", found.differing)))
    if unfit := _first_unfit(widths, found.multiple):
        reason = f"{unfit} is not a multiple of {found.multiple}: {found.slower}"
        return Verdict("works slower", f"{reason}; {needed}" if needed else reason)
    return Verdict("works", needed)


def _first_unfit(widths: Sequence[int], multiple: int) -> int | None:
    return next((width for width in widths if width % multiple), None)
