"""Calibration text that the model writes itself: of every kind it knows, where the text at hand is of one kind or none.

A model's own samples as calibration data are from *LLM-QAT: Data-Free Quantization Aware Training for Large Language
Models* (Liu et al., arXiv 2305.17888, section 2.1). Here every token is drawn from the full next-token distribution.
"""

from __future__ import annotations

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from gluprune.calibration.statistics import evaluating


class _Progress(StoppingCriteria):
    """Moves a progress bar with every token, and stops nothing."""

    def __init__(self, bar: tqdm):
        self._bar = bar

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_) -> torch.Tensor:
        self._bar.update()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.no_grad()
def sample_text(model: PreTrainedModel, tokenizer, windows: int = 64, length: int = 512, *, seed: int = 0) -> str:
    """Text that a model writes when it is given nothing but its token for the beginning, at temperature 1.

    All windows are written side by side: one batch of `windows` rows, which takes a key-value cache of
    `windows * length` tokens.

    Args:
        model: a causal LM, run as it is, on its device. Left as it was.
        tokenizer: its tokenizer.
        windows: how many texts.
        length: tokens of each.
        seed: of the sampling. The random state outside stays as it was.

    Returns:
        The texts, empty lines between them. The special tokens are left out.

    Raises:
        ValueError: a number below 1, or a tokenizer with neither a token for the beginning nor one for the end of text.
    """
    for name, value in {"windows": windows, "length": length}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise ValueError(
            "the tokenizer has neither a token for the beginning nor one for the end of text to start from"
        )
    prompt = torch.full((windows, 1), first, device=model.device)
    with (
        evaluating(model),
        torch.random.fork_rng(range(torch.cuda.device_count())),
        tqdm(total=length, desc="sampling", unit="token", leave=False, disable=None) as bar,
    ):
        torch.manual_seed(seed)
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            min_new_tokens=length,  # an end of text is no end: it is never drawn
            max_new_tokens=length,
            pad_token_id=first,
            stopping_criteria=StoppingCriteriaList([_Progress(bar)]),
        )
    return "\n\n".join(tokenizer.batch_decode(ids, skip_special_tokens=True))
