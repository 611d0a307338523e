"""Calibration text that the model itself generates, from everything it was trained on.

Calibration on a model's own samples is from *LLM-QAT: Data-Free Quantization Aware Training for Large Language Models*
(Liu et al., arXiv 2305.17888, section 2.1). Here every token is drawn from the full next-token distribution.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from gluprune.calibration.running import evaluating
from gluprune.io.progress import progress
from gluprune.models.glu import check_head

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class _Progress(StoppingCriteria):
    """Advances a progress bar with every token, and never stops."""

    def __init__(self, bar: tqdm):
        self._bar = bar

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        self._bar.update()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@contextmanager
def _generating_by(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Replace the generation config of a model, in a wrapper or not; afterwards, it has its own again.

    `generate` fills what a config that it is given leaves open from the model's own.
    """
    owners: list[Any] = [
        module for module in model.modules() if isinstance(vars(module).get("generation_config"), GenerationConfig)
    ]
    before = [owner.generation_config for owner in owners]
    try:
        for owner in owners:
            owner.generation_config = config
        yield
    finally:
        for owner, own in zip(owners, before, strict=True):
            owner.generation_config = own


@torch.no_grad()
def sample_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, windows: int = 64, length: int = 512, *, seed: int = 0
) -> str:
    """Return text that a model writes from its begin-of-text token, at temperature 1.

    All windows are written in parallel: one batch of `windows` rows, with a key-value cache of `windows * length`
    tokens. Of the model's generation config, only the end-of-text tokens are used: they are never drawn.

    Args:
        model: A causal LM; it runs on its device and is not changed.
        tokenizer: Its tokenizer.
        windows: Number of texts.
        length: Tokens per text.
        seed: Seed of the sampling. The global random state is not changed.

    Returns:
        The texts without special tokens, separated by empty lines.

    Raises:
        ValueError: The model has no language-model head, a number is below 1, or the tokenizer has neither a
            begin-of-text nor an end-of-text token.

    Example:
        >>> import gluprune
        >>> from transformers import AutoTokenizer
        >>> model, tokenizer = gluprune.load(model_path), AutoTokenizer.from_pretrained(model_path)
        >>> text = gluprune.sample_text(model, tokenizer, windows=2, length=8)
    """
    check_head(model, "sampling text")
    for name, value in {"windows": windows, "length": length}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    first: Any = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise ValueError("the tokenizer has neither a begin-of-text nor an end-of-text token to start from")
    generate: Any = model.generate
    own_config: Any = model.generation_config
    config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        repetition_penalty=1.0,
        min_new_tokens=length,  # never draws an end-of-text token
        max_new_tokens=length,
        eos_token_id=own_config.eos_token_id,
        pad_token_id=first,
    )
    prompt = torch.full((windows, 1), first, device=model.device)
    with (
        evaluating(model),
        _generating_by(model, config),
        torch.random.fork_rng(range(torch.cuda.device_count())),
        progress(total=length, desc="sampling", unit="token") as bar,
    ):
        torch.manual_seed(seed)
        ids = generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([_Progress(bar)]),
        )
    return "\n\n".join(tokenizer.batch_decode(ids, skip_special_tokens=True))
