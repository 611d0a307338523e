"""Whether a program's greedy tokens are those of transformers, but for ties."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

import gluprune

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "To sort a list of numbers in Python,",
    "The three states of matter are",
    "Dear Ms. Miller, thank you for",
    "In 1969, the first people",
    "Photosynthesis is the process by which",
    "A good way to learn a language is",
)
TOKENS = 32
# Both programs compute in float32, in different orders. A token may differ only where two are as likely, to rounding.
TIE = 1e-3


@dataclass(frozen=True)
class Agreement:
    """How the tokens that a program generated compare with what transformers computes for the same texts, in float32.

    Attributes:
        tokens: Number of tokens.
        equal: How many of them are the most likely token of transformers.
        gap: Largest log probability by which the most likely token of transformers exceeds the generated one.
        difference: Largest difference between the two programs' log probabilities of a generated token.
    """

    tokens: int
    equal: int
    gap: float
    difference: float


def prompt_ids(folder: Path) -> list[list[int]]:
    """Return the token ids of the prompts."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    return [tokenizer(prompt).input_ids for prompt in PROMPTS]


@torch.no_grad()
def compare(folder: Path, prompts: list[list[int]], generated: list[dict[str, Any]]) -> Agreement:
    """Compare generated tokens with transformers.

    At each position transformers sees the tokens that the program generated. So if all tokens are equal, both programs
    generate the same text; where they are not, the rest is still compared.

    Args:
        folder: The checkpoint, as gluprune saved it.
        prompts: Token ids of each prompt.
        generated: For each prompt, `ids` and `logprobs` of the tokens that follow.
    """
    model: Any = gluprune.load(folder, dtype=torch.float32).eval()
    equal, gaps, differences = 0, [], []
    for prompt, output in zip(prompts, generated, strict=True):
        ids, found = torch.tensor(output["ids"]), torch.tensor(output["logprobs"])
        assert len(ids) == TOKENS, output
        logits = model(torch.tensor([[*prompt, *output["ids"]]])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.double().log_softmax(-1)
        chosen = logprobs.gather(-1, ids[:, None])[:, 0]
        equal += int((logprobs.argmax(-1) == ids).sum())
        gaps.append((logprobs.amax(-1) - chosen).max().item())
        differences.append((chosen - found).abs().max().item())
    return Agreement(len(prompts) * TOKENS, equal, max(gaps), max(differences))
