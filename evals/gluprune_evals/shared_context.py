"""lm-eval's Hugging Face model, computing every shared prefix of its requests only once.

The requests of a multiple-choice task overlap: the choices of a question share the question, the questions of
a subject share the five shots. Here the requests of a chunk are merged into a prefix tree, and the tree runs through
the model as one sequence in which every token sees only its ancestors. Log-likelihoods equal those of lm-eval up to
rounding; on a CPU, where arithmetic is the limit, MMLU and TruthfulQA take a fifth of the time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from gluprune.io.progress import progress

# Tokens of a chunk: unrelated requests are packed up to the first limit, so that attention over what a token must not
# see stays cheap; requests that share at least SHARED tokens with the one before are added up to the second.
PACKED, RELATED, SHARED = 512, 2048, 32
_LOGIT_ROWS = 256  # rows of logits converted to float32 at a time


def can_share(model) -> bool:
    """Whether the model's attention takes a mask of any form: plain full attention, no sliding window."""
    config = model.config.get_text_config()
    windowed = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return config._attn_implementation in ("eager", "sdpa") and not windowed


class Tree:
    """Token sequences merged by their shared prefixes.

    Attributes:
        tokens: One value per node.
        depths: One value per node.
        path: Nodes of the sequence added last.
    """

    def __init__(self):
        self.tokens: list[int] = []
        self.depths: list[int] = []
        self._parents: list[int] = []
        self.path: list[int] = []  # nodes of the sequence added last

    def shared(self, row: tuple[int, ...]) -> int:
        """Return how many tokens a sequence shares with the one added last."""
        count = 0
        for node, token in zip(self.path, row, strict=False):
            if self.tokens[node] != token:
                break
            count += 1
        return count

    def add(self, row: tuple[int, ...]) -> list[int]:
        """Add a sequence, which must come after the last one in sorted order; return its nodes."""
        kept = self.shared(row)
        self.path = self.path[:kept]
        for depth in range(kept, len(row)):
            self._parents.append(self.path[-1] if self.path else -1)
            self.path.append(len(self.tokens))
            self.tokens.append(row[depth])
            self.depths.append(depth)
        return self.path

    def visible(self) -> torch.Tensor:
        """Return a bool mask `[nodes, nodes]`: row sees column."""
        seen = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self._parents):
            if parent >= 0:
                seen[node] |= seen[parent]
        return seen


def chunks(rows: list[tuple[int, ...]]) -> Iterator[tuple[Tree, dict[tuple[int, ...], list[int]]]]:
    """Pack sorted, distinct sequences into trees; yield each with the nodes of its sequences."""
    tree, nodes = Tree(), {}
    for row in rows:
        shared = tree.shared(row)
        size = len(tree.tokens) + len(row) - shared
        if nodes and (size > RELATED or (size > PACKED and shared < SHARED)):
            yield tree, nodes
            tree, nodes = Tree(), {}
        nodes[row] = list(tree.add(row))
    if nodes:
        yield tree, nodes


class SharedContextLM(HFLM):
    """`HFLM` for a model in memory, with `_loglikelihood_tokens` over prefix trees. Generation is lm-eval's."""

    # Properties of HFLM, whose decorator hides its type from type checkers.
    max_length: int
    model: Any

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, override_bs: int | None = None):
        """Return the sum of log-probabilities of each continuation, and whether it is the greedy one.

        Args:
            requests: (cache key, context tokens, continuation tokens); too long ones lose tokens on the left.
            disable_tqdm: Hide the progress bar.
            override_bs: Not used.
        """
        by_row: dict[tuple[int, ...], list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            row = tuple((context + continuation)[-(self.max_length + 1) :][:-1])
            by_row.setdefault(row, []).append(index)
        answers: list = [None] * len(requests)
        hidden: dict[str, Any] = {"disable": True} if disable_tqdm else {}  # otherwise as the environment says
        with progress(total=len(requests), desc="log-likelihoods", unit="request", **hidden) as bar:
            for tree, nodes in chunks(sorted(by_row)):
                wanted = []  # (request, nodes whose logits predict its continuation)
                for row, path in nodes.items():
                    for index in by_row[row]:
                        wanted.append((index, path[-len(requests[index][2]) :]))
                for (index, _), answer in zip(wanted, self._score(tree, wanted, requests), strict=True):
                    answers[index] = answer
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
                bar.update(len(wanted))
        return answers

    @torch.no_grad()
    def _score(self, tree: Tree, wanted, requests) -> Iterator[tuple[float, bool]]:
        keep = sorted({node for _, path in wanted for node in path})
        place = {node: position for position, node in enumerate(keep)}
        hidden = ~tree.visible().to(self.device)
        mask = torch.zeros(hidden.shape, dtype=self.model.dtype, device=self.device)
        mask.masked_fill_(hidden, torch.finfo(mask.dtype).min)
        logits = self.model(
            torch.tensor([tree.tokens], device=self.device),
            attention_mask=mask[None, None],
            position_ids=torch.tensor([tree.depths], device=self.device),
            use_cache=False,
            logits_to_keep=torch.tensor(keep, device=self.device),
        ).logits[0]  # [keep, vocabulary]
        total = torch.cat([rows.float().logsumexp(-1) for rows in logits.split(_LOGIT_ROWS)])
        greedy = logits.argmax(-1)
        for index, path in wanted:
            at = torch.tensor([place[node] for node in path], device=self.device)
            tokens = torch.tensor(requests[index][2], device=self.device)
            log_probabilities = logits[at, tokens].float() - total[at]
            yield float(log_probabilities.sum()), bool((greedy[at] == tokens).all())
