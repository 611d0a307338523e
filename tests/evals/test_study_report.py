"""The report: published figures recomputed, changes compared with their noise, findings, plots."""

import csv
import dataclasses
import json
import math
import random
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gluprune_evals import findings, plots, report, summary
from gluprune_evals.configuration import Configuration
from gluprune_evals.findings import CLAIMS, published_verdict, verdict
from gluprune_evals.folder import Folder
from gluprune_evals.harness import Metric, Result
from gluprune_evals.paper import scores
from gluprune_evals.series import BETTER, NOISE, WORSE, Series, all_series
from gluprune_evals.significance import is_beyond_chance, paired_change, pearson
from gluprune_evals.tasks import BASE_TASKS, INSTRUCT_TASKS, TASKS
from scipy import stats

from gluprune.cli import main
from gluprune.io import atomic
from gluprune.measure.records import Record, append

# The summary tables of results/readme.md in github.com/peremartra/llama-glu-expansion-pruning, in % of dense.
SUMMARY = {
    "mmlu": (-19.3, -14.5, -16.1, -13.6, -16.2, -17.9),
    "gsm8k": (-40.3, -65.6, -75.9, -68.9, -74.7, -68.9),
    "arc_challenge": (-8.2, -15.1, -27.3, -30.8, -31.8, -33.9),
    "hellaswag": (-9.0, -20.2, -31.1, -41.3, -48.9, -54.3),
    "wikitext": (51.3, 116.5, 233.5, 386.9, 911.5, 2691.0),
    "ifeval": (37.5, 23.2, 75.0, 46.5, 48.2, 32.2),
    "leaderboard_musr": (6.6, 7.0, 10.5, 26.1, 10.1, 20.2),
    "truthfulqa_mc1": (5.2, 3.7, 4.7, 6.3, 5.2, 1.6),
    "truthfulqa_mc2": (6.7, 10.1, 12.7, 13.9, 14.4, 23.6),
    "winogrande": (1.7, -0.9, -4.5, -4.8, -11.3, -18.7),
}


@pytest.mark.parametrize("task", SUMMARY)
def test_published_percentages(task):
    found = scores.changes("Llama-3.2-1B", task)
    assert list(found) == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    for value, printed in zip(found.values(), SUMMARY[task], strict=True):
        assert 100 * value == pytest.approx(printed, abs=0.0501)


def test_published_correlation():
    series = (list(scores.series("Llama-3.2-3B", task).values()) for task in ("mmlu", "truthfulqa_mc2"))
    found = pearson(*series)
    assert (round(found.r, 3), round(found.p, 3), found.n) == (-0.864, 0.012, 7)
    series = (list(scores.series("Llama-3.2-1B", task).values()) for task in ("mmlu", "truthfulqa_mc2"))
    found = pearson(*series)
    assert (round(found.r, 3), round(found.p, 3)) == (-0.676, 0.096)


def test_published_tasks_and_ratios():
    for model, tasks, count in zip(scores.MODELS, (BASE_TASKS, BASE_TASKS, INSTRUCT_TASKS), (7, 7, 4), strict=True):
        found = scores.scores(model)
        assert {score.task for score in found} == set(tasks) and len(found) == count * len(tasks)
    ratios = {score.pruning: score.expansion_ratio for score in scores.scores("Llama-3.2-3B")}
    assert (ratios[0.0], ratios[0.4]) == (2.667, 1.6)
    assert scores.series("Llama-3.2-1B-Instruct", "ifeval")[0.4] == 0.146


def test_pearson_against_its_definition():
    rng = random.Random(3)
    x = [rng.gauss(0, 1) for _ in range(9)]
    y = [a + rng.gauss(0, 1) for a in x]
    found = pearson(x, y)
    r = np.corrcoef(x, y)[0, 1]
    t = r * math.sqrt(7 / (1 - r * r))
    half = 1.959964 / math.sqrt(6)
    assert found.r == pytest.approx(r)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(t), 7))
    assert (found.low, found.high) == pytest.approx(
        (math.tanh(math.atanh(r) - half), math.tanh(math.atanh(r) + half)), abs=1e-5
    )
    assert pearson([1, 2, 3], [1, 2, 3]) is None and pearson([1, 1, 1, 1], [1, 2, 3, 4]) is None
    with pytest.raises(ValueError, match="4 values against 3"):
        pearson([1, 2, 3, 4], [1, 2, 3])


def test_paired_change_of_an_accuracy():
    rng = random.Random(4)
    dense = [float(rng.random() < 0.6) for _ in range(50)]
    other = [float(rng.random() < 0.3) for _ in range(50)]
    found = paired_change(dense, other, "acc,none")
    interval = stats.ttest_rel(other, dense).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.relative == pytest.approx(np.mean(other) / np.mean(dense) - 1)
    assert not found.is_noise and paired_change(dense, dense, "acc,none").is_noise
    assert paired_change([1.0], [0.0], "acc,none").is_noise
    with pytest.raises(ValueError, match="50 documents against 49"):
        paired_change(dense, other[1:], "acc,none")


def test_paired_change_of_perplexities():
    rng = random.Random(5)
    words = [rng.randint(50, 400) for _ in range(12)]
    dense = [(-w * rng.uniform(2.5, 3.5), w) for w in words]
    other = [(value - w * rng.uniform(0.2, 0.6), w) for (value, w) in dense]
    found = paired_change(dense, other, "word_perplexity,none")
    before, after = (math.exp(-sum(v for v, _ in pairs) / sum(words)) for pairs in (dense, other))
    assert found.relative == pytest.approx(after / before - 1)
    assert found.difference == pytest.approx(math.log(after / before))
    # Jackknife of the ratio of sums, an independent estimate of the same error.
    parts = []
    for leave in range(12):
        rest = [n for n in range(12) if n != leave]
        total = sum(words[n] for n in rest)
        parts.append(sum(dense[n][0] - other[n][0] for n in rest) / total)
    jackknife = math.sqrt(11 / 12 * sum((part - np.mean(parts)) ** 2 for part in parts))
    half = (found.high - found.low) / 2 / stats.t.ppf(0.975, 11)
    assert half == pytest.approx(jackknife, rel=0.15) and not found.is_noise
    plain = paired_change([v for v, _ in dense], [v for v, _ in other], "perplexity,none")
    assert plain.difference == pytest.approx(np.mean([d[0] - o[0] for d, o in zip(dense, other, strict=True)]))


def make_result(task, ratio, values, recipe="maw", model="m", **more):
    """A result with these values per document."""
    spec = TASKS[task]
    mean = math.exp(-sum(values) / len(values)) if spec.lower_is_better else sum(values) / len(values)
    return Result(
        model=model,
        revision="r",
        configuration={
            "recipe": recipe if ratio else None,
            "ratio": ratio,
            "multiple_of": 1,
            "intermediate_size": round(1000 * (1 - ratio)),
            "expansion_ratio": 4 * (1 - ratio),
            "parameters": round(1000 * (1 - ratio)),
        },
        task=task,
        task_version="1.0",
        shots=0,
        limits="budget small",
        generation_limit=128 if more.get("lengths") else None,
        data="Hub",
        dtype="float32",
        documents=len(values),
        available=99,
        metric=spec.metric,
        metrics={spec.metric: Metric(mean, 0.05)},
        per_document=values,
        seconds=1.0,
        **{"lengths": None, **more},
    )


def test_the_summary_of_one_model_is_its_scores():
    """Neither "dense" for a checkpoint that may be pruned, nor marks for what is compared with nothing."""
    text = summary.summary([make_result("piqa", 0, some(0.5)), make_result("lambada_openai", 0, [-7.0] * 20)])
    lines = [line.split() for line in text.splitlines() if line]
    assert lines[:2] == [["m:", "budget", "small"], ["task", "metric", "score"]]
    assert sorted(lines[2:4]) == [
        ["lambada_openai", "perplexity", "1,097", "±0.05"],
        ["piqa", "acc_norm", "0.500", "±0.050"],
    ]
    assert lines[4:] == [summary.STANDARD_ERROR.split()]
    assert "dense" not in text


def test_the_summary_of_several_unpruned_models_is_one_table_against_the_largest():
    results = [make_result("piqa", 0, some(0.2), model="a small one"), make_result("piqa", 0, some(0.9), model="b")]
    results += [
        make_result("winogrande", 0, some(0.5), model="b"),
        make_result("hellaswag", 0, some(0.6), model="a small one"),
    ]
    for result in results:
        result.configuration["parameters"] += result.model == "b"
    text = summary.summary(results)
    assert [re.split("  +", line) for line in text.splitlines() if line] == [
        ["b, a small one: budget small"],
        ["task", "metric", "b", "a small one"],
        *(
            [task, TASKS[task].metric.partition(",")[0], *cells]
            for task, *cells in sorted(
                [
                    ("piqa", "0.900 ±0.050", "0.200 ±0.050 ▼"),
                    ("winogrande", "0.500 ±0.050", "–"),
                    ("hellaswag", "–", "0.600 ±0.050"),
                ],
                key=lambda row: list(TASKS).index(row[0]),
            )
        ),
        [
            "± is one standard error of the score. The marks compare with b on the same documents, at 95 %: ▲ better, ▼"
            " worse, ≈ within the noise."
        ],
    ]


def test_the_columns_of_the_summary_do_not_touch():
    results = [make_result("lambada_openai", ratio, [-12.0 - 9 * ratio] * 20) for ratio in (0, 0.2, 0.4)]
    text = summary.summary([*results, *(make_result("piqa", ratio, some(0.5)) for ratio in (0, 0.4))])
    assert "dense" in text and "m, maw: budget small" in text
    table = text.splitlines()[3:6]
    assert all(line.count("  ") >= 3 for line in table) and len({len(line.rstrip()) for line in table[:2]}) == 1


def some(share, count=60):
    return [float(n < round(share * count)) for n in range(count)]


@pytest.fixture
def folder(tmp_path):
    """A study in which MMLU falls, TruthfulQA rises, WinoGrande changes by one document, and GSM8K is zero."""
    found = []
    for step in range(5):
        ratio = step / 10
        found += [
            make_result("mmlu", ratio, some(0.9 - 0.15 * step)),
            make_result("truthfulqa_mc2", ratio, some(0.3 + 0.12 * step + 0.01 * (step % 2))),
            make_result("winogrande", ratio, some(0.6 + (step % 2) / 60)),
            make_result("gsm8k", ratio, [0.0] * 8, lengths=[20 * step + n for n in range(8)]),
            make_result("lambada_openai", ratio, [-2.0 - step - 0.1 * (n % 3) for n in range(20)]),
        ]
    study = Folder(tmp_path / "study")
    study.path.mkdir()
    study.claim({"limits": "budget small"}, {})
    for result in found:
        path = study.path / "m" / f"{result.configuration['ratio']}" / f"{result.task}.json"
        atomic.write_file(path, [result.to_json().encode()])
    return study


def test_settings_of_a_failed_study(tmp_path):
    """They stay, since another process may be at work, and the error says what to do."""
    study = Folder(tmp_path)
    study.claim({"limits": "limit 4"}, {})
    with pytest.raises(ValueError, match="limits 'limit 4', but this one has None: it has no results yet: delete it"):
        study.claim({"limits": None}, {})


def test_results_survive_the_disk(folder):
    for result in folder.results():
        assert Result.from_json(result.to_json()) == result
        assert dataclasses.asdict(result)["hardware"]
    with pytest.raises(ValueError, match="not a result of this version"):
        Result.from_json('{"model": "m"}')
    path = next(folder.path.glob("*/*/*.json"))
    path.write_text("{")
    with pytest.raises(ValueError, match=path.name):
        folder.results()


def test_marks_and_verdicts(folder):
    (series,) = all_series(folder.results())
    marks = {task: [series.mark(task, ratio) for ratio in (0.1, 0.2, 0.3, 0.4)] for task in series.results}
    assert marks["mmlu"] == [WORSE] * 4 and marks["lambada_openai"] == [WORSE] * 4
    assert marks["truthfulqa_mc2"] == [BETTER] * 4
    assert marks["winogrande"] == [NOISE] * 4 and marks["gsm8k"] == [NOISE] * 4
    words = {claim.tasks[0]: verdict(claim, series) for claim in CLAIMS}
    assert words["mmlu"].startswith("**holds** (4 of 4")
    assert words["truthfulqa_mc2"].startswith("**holds**")
    assert words["gsm8k"] == "**cannot be judged**: the dense model is not above chance on gsm8k"
    assert words["ifeval"] == "not measured"
    # The opposite change.
    opposite = [make_result("ifeval", ratio, some(0.8 - ratio)) for ratio in (0.0, 0.3, 0.5)]
    (series,) = all_series(opposite)
    ifeval = next(claim for claim in CLAIMS if claim.tasks == ("ifeval",))
    assert verdict(ifeval, series) == "**does not hold** (0 of 2 changes with it beyond the noise, 2 against it)"


def test_one_mark_of_six_is_not_a_finding():
    """A score that falls at one of six ratios, one below chance, and one that rises and falls."""

    def series_of(task, shares):
        found = [make_result(task, ratio / 10, some(share, 200)) for ratio, share in enumerate(shares)]
        return all_series(found)[0]

    claims = {claim.tasks[0]: claim for claim in CLAIMS}
    once = series_of("mmlu", [0.9, 0.9, 0.9, 0.5, 0.9, 0.9, 0.9])
    assert verdict(claims["mmlu"], once).startswith("**within the noise** (1 of 6")
    twice = series_of("mmlu", [0.9, 0.9, 0.9, 0.5, 0.9, 0.9, 0.5])
    assert verdict(claims["mmlu"], twice).startswith("**holds** (2 of 6")
    low = series_of("mmlu", [0.25, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05])
    assert verdict(claims["mmlu"], low) == "**cannot be judged**: the dense model is not above chance on mmlu"
    both = series_of("ifeval", [0.5, 0.9, 0.9, 0.5, 0.5, 0.1, 0.1])
    assert verdict(claims["ifeval"], both).startswith("**mixed** (2 of 6 changes with it beyond the noise, 2 against")
    short = report._in_short([once, twice, low])
    assert short.count("Shown, beyond the noise of these documents: nothing") == 2 and f"mmlu ({WORSE} 2 of 6)" in short
    assert f"no more changes than expected by chance: mmlu ({WORSE} 1 of 6)" in short
    assert f"at zero: mmlu ({WORSE} 6 of 6)" in short


@pytest.mark.parametrize("total, least", [(1, 1), (2, 1), (3, 2), (6, 2), (12, 2), (24, 3)])
def test_marks_beyond_chance(total, least):
    """The smallest number of marks with a binomial tail probability below 5 %, summed directly."""
    chances = [math.comb(total, k) * 0.025**k * 0.975 ** (total - k) for k in range(total + 1)]
    assert sum(chances[least:]) < 0.05 <= sum(chances[least - 1 :])
    assert is_beyond_chance(least, total) and not is_beyond_chance(least - 1, total)


def test_verdicts_on_published_findings(folder):
    """IFEval rises for the two base models; the published instruct model falls."""
    ifeval = next(claim for claim in CLAIMS if claim.tasks == ("ifeval",))
    verdicts = [published_verdict(ifeval, model) for model in scores.MODELS]
    assert verdicts == ["holds: 6 of 6", "holds: 6 of 6", "does not hold: 0 of 3"]


@pytest.mark.slow
def test_report_of_a_study(folder, tmp_path, capsys):
    records = tmp_path / "bench.jsonl"
    for width, seconds in ((1000, 0.02), (800, 0.017), (600, 0.015)):
        shape = {"model": "m", "H": 250, "I": width}
        append(records, Record.of("generation: TPOT", "stock", shape, torch.float32, unit="s", values=[seconds]))
    result = make_result("mmlu", 0, some(0.8), model="not pruned")
    (folder.path / "not pruned/unchanged").mkdir(parents=True)
    atomic.write_file(folder.file("not pruned", Configuration(), "mmlu"), [result.to_json().encode()])
    out = tmp_path / "report"
    assert main(["report", str(folder.path), str(records), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["report"] == str(out / "study.md")
    text = (out / "study.md").read_text()
    assert text.startswith("# m, not pruned: capability against width\n")
    assert "| mmlu | acc | 0 | 60 of 99 | 0.900 ±0.050 | 0.750 ±0.050 ▼ |" in text
    assert "## not pruned\n" in text and "| mmlu | acc | 0 | 60 of 99 | 0.800 ±0.050 |\n" in text
    assert (
        "the noise of these documents: lambada_openai (▼ 4 of 4), mmlu (▼ 4 of 4), truthfulqa_mc2 (▲ 4 of 4)." in text
    )
    assert "no more changes than expected by chance: winogrande." in text and "or at zero: gsm8k." in text
    assert "| mmlu | 40% | -66.7 % ▼ | -13.6 % | " in text
    assert "does not hold: 0 of 3" in text and "r = -0.864, p = 0.012" in text
    assert "| m | maw | gsm8k | 40% | 84 | 128 | 0 of 8 |" in text
    assert "J/token is missing at these widths" in text and "(tpot.png)" in text
    for name in ("capability", "published", "correlations", "tpot"):
        assert (out / f"{name}.png").stat().st_size > 10_000
    assert not (out / "energy.png").exists()
    rows = list(csv.DictReader((out / "correlations.csv").open()))
    row = next(r for r in rows if (r["model"], r["task"], r["other_task"]) == ("m", "mmlu", "truthfulqa_mc2"))
    assert float(row["r"]) < -0.9 and row["n"] == "5" and float(row["low_95"]) < float(row["r"]) < float(row["high_95"])
    assert sum(r["recipe"] == "published" for r in rows) == 78 + 78 + 21


def test_report_of_models_that_were_not_pruned(tmp_path):
    """One table, compared with the largest model, and nothing about recipes or the published models."""
    study = Folder(tmp_path / "study")
    study.path.mkdir()
    study.claim({"limits": "budget small"}, {})
    for model, more, share in (("a small one", 0, 0.2), ("b", 1, 0.9), ("c", 0, 0.85)):
        for task in ("piqa", "hellaswag")[: 1 + more]:
            result = make_result(task, 0, some(share), model=model)
            result.configuration["parameters"] += more
            path = study.file(model, Configuration(), task)
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_file(path, [result.to_json().encode()])
    text = report.write(study, tmp_path / "out").read_text()
    assert text.startswith("# b, a small one, c: scores\n")
    assert text[text.index("## b") :].splitlines() == [
        "## b, a small one, c",
        "",
        "Columns: model (expansion ratio). ± is one standard error of the score. The marks compare with b on the same"
        " documents, at 95 %: ▲ better, ▼ worse, ≈ within the noise. –: missing.",
        "",
        "| task | metric | shots | documents | b (4.00) | a small one (4.00) | c (4.00) |",
        "|---|---|--:|--:|--:|--:|--:|",
        "| hellaswag | acc_norm | 0 | 60 of 99 | 0.900 ±0.050 | – | – |",
        "| piqa | acc_norm | 0 | 60 of 99 | 0.900 ±0.050 | 0.200 ±0.050 ▼ | 0.850 ±0.050 ≈ |",
    ]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["study.md"]
    for other in ("a small one", "c"):
        shutil.rmtree(study.path / other)
    text = report.write(study, tmp_path / "out").read_text()
    assert f"Columns: model (expansion ratio). {summary.STANDARD_ERROR} –: missing." in text, "compared with nothing"


def test_a_task_at_chance_shows_nothing(monkeypatch):
    """Four of four scores are worse, but the dense model guesses."""
    monkeypatch.setattr(findings, "mark_counts", lambda series, tasks: {WORSE: 4, BETTER: 0, NOISE: 0})
    for value, shows in ((0.9, True), (TASKS["mmlu"].chance, False)):
        dense = SimpleNamespace(task="mmlu", value=value, stderr=0.01)
        assert findings.shows_more_than_noise(Series("m", "maw", {"mmlu": {0.0: dense}}), "mmlu") == shows


def test_pictures_draw_the_tasks_that_show_more_than_noise(tmp_path, monkeypatch):
    own, drawn = Series("m", "maw", {task: {} for task in ("mmlu", "piqa", "boolq")}), []
    monkeypatch.setattr(plots, "_finish", lambda figure, panels, title, path: drawn.append((list(panels), title)))
    for shown in (["piqa"], []):
        monkeypatch.setattr(plots, "shows_more_than_noise", lambda series, task, shown=shown: task in shown)
        plots.capability([own], tmp_path / "capability.png")
    (some, note), (every, bare) = drawn
    assert some == ["piqa"] and note.endswith("cannot show: mmlu, boolq")
    assert every == ["mmlu", "piqa", "boolq"] and "Not drawn" not in bare


def test_folder_without_results(tmp_path, capsys):
    folder = Folder(tmp_path / "empty")
    folder.path.mkdir()
    with pytest.raises(ValueError, match="holds no study"):
        folder.results()
    folder.claim({"limits": "limit 1"}, {})
    assert main(["report", str(folder.path)]) == 2
    assert "holds no result yet" in capsys.readouterr().err
