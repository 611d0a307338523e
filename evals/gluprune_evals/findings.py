"""Which of the published findings hold in a study, and which are within its noise."""

from __future__ import annotations

from dataclasses import dataclass

from gluprune_evals.harness import Result
from gluprune_evals.paper import scores
from gluprune_evals.series import BETTER, WORSE, Series, mark_counts
from gluprune_evals.significance import is_beyond_chance
from gluprune_evals.tasks import TASKS


@dataclass(frozen=True)
class Claim:
    """A published finding: the scores of these tasks get better (True) or worse (False) as neurons are removed."""

    words: str
    tasks: tuple[str, ...]
    better: bool


CLAIMS = (
    Claim("Knowledge is fragile: MMLU falls", ("mmlu",), False),
    Claim("Arithmetic is fragile: GSM8K falls", ("gsm8k",), False),
    Claim("Perplexity is fragile: WikiText and Lambada rise", ("wikitext", "lambada_openai"), False),
    Claim("Instruction following improves: IFEval rises", ("ifeval",), True),
    Claim("Multi-step reasoning is robust: MuSR rises", ("leaderboard_musr",), True),
    Claim("Truthfulness improves: TruthfulQA-MC2 rises", ("truthfulqa_mc2",), True),
)


def verdict(claim: Claim, series: Series) -> str:
    """Return in words whether a published finding holds in a study."""
    tasks = [task for task in claim.tasks if task in series.results]
    counts = mark_counts(series, tasks)
    total = sum(counts.values())
    if not total:
        return "not measured"
    agree, against = (counts[BETTER], counts[WORSE]) if claim.better else (counts[WORSE], counts[BETTER])
    detail = f"{agree} of {total} changes with it beyond the noise, {against} against it"
    nothing = [task for task in tasks if has_nothing_to_lose(series.results[task].get(0.0))]
    if nothing and not claim.better:
        return f"**cannot be judged**: the dense model is not above chance on {', '.join(nothing)}"
    holds, fails = is_beyond_chance(agree, total), is_beyond_chance(against, total)
    word = "mixed" if holds and fails else "holds" if holds else "does not hold" if fails else "within the noise"
    return f"**{word}** ({detail})"


def has_nothing_to_lose(dense: Result | None) -> bool:
    """Whether the dense score is at zero, or not above what guessing gives."""
    if dense is None or TASKS[dense.task].lower_is_better:
        return False
    chance = TASKS[dense.task].chance or 0.0
    return dense.value - 1.96 * (dense.stderr or 0.0) <= chance


def shows_more_than_noise(series: Series, task: str) -> bool:
    """Whether more scores of a task differ from the dense model's than by chance, and a loss can show."""
    if has_nothing_to_lose(series.results.get(task, {}).get(0.0)):
        return False
    counts = mark_counts(series, [task])
    return any(is_beyond_chance(counts[mark], sum(counts.values())) for mark in (WORSE, BETTER))


def published_verdict(claim: Claim, model: str) -> str:
    """Return the number of published configurations in which the scores moved as the finding says."""
    moves = []
    for task in claim.tasks:
        sign = -1 if TASKS[task].lower_is_better else 1
        moves += [sign * change for change in scores.changes(model, task).values()]
    if not moves:
        return "not published"
    agree = sum((move > 0) == claim.better for move in moves)
    word = "holds" if agree == len(moves) else "does not hold" if agree == 0 else "mixed"
    return f"{word}: {agree} of {len(moves)}"
