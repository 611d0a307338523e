"""The breakdown of a difference: with a scripted clock, from records, and for the published figures."""

import json
import random
import statistics
from importlib.resources import files

import pytest
import torch
from gluprune_evals.paper import latency

from gluprune.cli import main
from gluprune.measure import decoding
from gluprune.measure.decoding import time_generator
from gluprune.measure.records import Record, append
from gluprune.reports import breakdown, report
from gluprune.reports.breakdown import Cost, split


def test_every_part_separately():
    before = Cost(tokens=11, each=0.02, first=0.1, launch=0.015)
    assert before.total == pytest.approx(0.1 + 10 * 0.02)
    parts = [
        (Cost(21, 0.02, 0.1, 0.015), "output_length", 10 * 0.02),
        (Cost(11, 0.02, 0.4, 0.015), "prefill", 0.3),
        (Cost(11, 0.03, 0.1, 0.015), "per_token", 10 * 0.01),
        (Cost(11, 0.01, 0.1, 0.005), "launches", -10 * 0.01),
    ]
    for after, name, expected in parts:
        found = split(before, after)
        for part in ("output_length", "prefill", "per_token", "launches"):
            assert getattr(found, part) == pytest.approx(expected if part == name else 0.0), (name, part)


def test_every_part_at_once():
    """Additional tokens count at the old time per token, all other parts with the new number of tokens."""
    found = split(Cost(11, 0.02, 0.1, 0.015), Cost(21, 0.05, 0.2, 0.025))
    expected = {"output_length": 10 * 0.02, "prefill": 0.1, "per_token": 20 * 0.02, "launches": 20 * 0.01}
    assert vars(found) == pytest.approx(expected)


@pytest.mark.parametrize("has_first", [True, False])
@pytest.mark.parametrize("has_launch", [True, False])
def test_the_parts_add_up(has_first, has_launch):
    def cost():
        first, launch = random.random() if has_first else None, random.random() if has_launch else None
        return Cost(random.randint(2, 99), random.random(), first, launch)

    before, after = cost(), cost()
    found = split(before, after)
    assert found.total == pytest.approx(after.total - before.total)
    assert (found.prefill is None, found.launches is None) == (not has_first, not has_launch)


def test_costs_with_different_parts_are_rejected():
    with pytest.raises(ValueError, match="the first token is separated in only one of the two costs"):
        split(Cost(3, 1.0), Cost(3, 1.0, 2.0))


def test_a_scripted_clock_is_split_into_its_parts(monkeypatch):
    """The second run has a 2 s longer prefill, 3 more tokens, and 0.25 s more per later token."""
    now = [0.0]
    monkeypatch.setattr(decoding.time, "perf_counter", lambda: now[0])

    def generator(first, each):
        def generate(prompt, new_tokens, on_token):
            for token in range(new_tokens):
                now[0] += each if token else first
                on_token()

        return generate

    def cost(first, each, new_tokens):
        timing = time_generator(generator(first, each), [torch.zeros(1, 4, dtype=torch.long)] * 3, new_tokens)
        return Cost(new_tokens, timing.tpot, timing.ttft)

    found = split(cost(5.0, 1.0, 4), cost(7.0, 1.25, 7))
    assert (found.output_length, found.prefill, found.per_token) == (3.0, 2.0, 6 * 0.25)


# --- records ---


def run(width, provider, decoding, ttft, tpot, joules=None, prefill=None):
    """Two prompts at a time, 11 tokens each: ten after the first."""
    shape = {"model": "m", "H": 8, "I": width, "batch": 2, "prompt": 5, "new tokens": 11, "decoding": decoding}
    for what, unit, value in [
        ("TTFT", "s", ttft),
        ("TPOT", "s", tpot),
        ("energy", "J/token", joules),
        ("energy of the prefill", "J", prefill),
    ]:
        if value is not None:
            yield Record.of(f"generation: {what}", provider, shape, torch.bfloat16, unit=unit, values=[value])


def table_rows(markdown, title):
    lines = markdown.split(f"### {title}")[1].split("###")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]
    return {tuple(row[1:4]): [None if cell == "–" else float(cell) for cell in row[4:]] for row in rows}


@pytest.mark.slow
def test_records_are_split_against_the_dense_models_plain_generate(tmp_path):
    """Launches take 6 of the dense model's 10 ms, 7 of the narrow model's 9 ms, and no time in a graph."""
    records = [
        *run(128, "transformers", "generate", 0.1, 0.010, joules=2.0, prefill=4.0),
        *run(128, "transformers", "graph", 0.1, 0.004, joules=1.0, prefill=4.0),
        *run(99, "transformers", "generate", 0.08, 0.009),
        *run(99, "transformers", "graph", 0.08, 0.002),
        *run(99, "gluprune", "generate", 0.07, 0.005),
    ]
    markdown = breakdown.section(records, tmp_path)
    rows = table_rows(markdown, "TTLT, ms")
    # before, after, difference, output length, prefill, work, launches
    assert rows["128", "transformers", "graph"] == pytest.approx([200, 140, -60, 0, 0, 0, -60])
    assert rows["99", "transformers", "generate"] == pytest.approx([200, 170, -30, 0, -20, -20, 10])
    assert rows["99", "transformers", "graph"] == pytest.approx([200, 100, -100, 0, -20, -20, -60])
    patched = rows["99", "gluprune", "generate"]
    assert patched[:6] == pytest.approx([200, 120, -80, 0, -30, -50]) and patched[6] is None
    assert ("128", "transformers", "generate") not in rows
    # 22 tokens of 2 J are 44 J, 40 of them after the prefill: 4 J per step, of which launches take 4 - 1.8.
    assert table_rows(markdown, "Energy")["128", "transformers", "graph"] == pytest.approx([44, 22, -22, 0, 0, 0, -22])
    for record in records:
        append(tmp_path / "model.jsonl", record)
    assert markdown in report.write(records, tmp_path / "out").read_text()


def test_gains_compared_with_the_ratio_of_the_bytes(tmp_path):
    """Half of the bytes in 1 / 1.6 of the time: 80 % of the speed-up that the bytes allow."""
    shape = {"model": "m", "H": 8, "batch": 1, "prompt": 5, "new tokens": 11, "decoding": "generate"}
    records = [
        Record.of("generation: TPOT", "p", {**shape, "I": I}, torch.float32, unit="s", values=[seconds], nbytes=nbytes)
        for I, seconds, nbytes in [(128, 0.016, 1000), (64, 0.010, 500)]
    ]
    row = breakdown.section(records, tmp_path).strip().splitlines()[-1]
    assert row.split("|")[3:-1] == [" generate ", " TPOT ", " 64 ", " 16 ", " 10 ", " 1.600 ", " 2.000 ", " 80.0% "]


def test_no_records_of_generation_no_section(tmp_path):
    assert (
        breakdown.section([Record.of("copy", "torch", {"M": 1}, torch.float32, unit="s", values=[1.0])], tmp_path) == ""
    )


# --- the published figures ---


def test_output_length_explains_the_published_latency():
    errors = [abs(error) for error in latency.prediction_errors()]
    assert len(errors) == 2 * 3 * 6  # models, workloads at batch 1, prunings
    assert statistics.median(errors) < 0.03


def test_predictions_by_hand_from_the_raw_rows():
    """1B, HellaSwag at batch 1, half of the neurons: computed here from the three runs of both models."""
    document = json.loads((files("gluprune_evals.paper") / "data" / "published_inference.json").read_text())
    rows = [dict(zip(document["columns"], row, strict=True)) for row in document["rows"]]
    assert len(rows) == 2 * 7 * 6 * 3

    def runs(percent):
        wanted = ("Llama-3.2-1B", "hellaswag_latency_b1", percent)
        return [row for row in rows if (row["model"], row["workload"], row["pruned_percent"]) == wanted]

    dense, half = runs(0), runs(50)
    seconds = sum(95 * row["ttlt_ms"] / 1e3 for row in dense)  # 95 prompts in each run
    predicted = seconds / sum(row["tokens"] for row in dense) * sum(row["tokens"] for row in half) / (3 * 95)
    found = next(
        c
        for c in latency.published_results()
        if (c.model, c.workload, c.percent) == ("Llama-3.2-1B", "hellaswag b1", 50)
    )
    assert latency.predicted_ttlt(found) == pytest.approx(predicted, rel=1e-4)
    assert found.ttlt == pytest.approx(statistics.mean(row["ttlt_ms"] for row in half) / 1e3)
    assert found.latency.total == pytest.approx(found.ttlt, rel=1e-4) and found.width == 4096
    assert document["source"]["licence"].startswith("MIT") and "2512.22671" in document["source"]["paper"]


def test_odd_widths_cost_energy_at_batch_8_but_not_at_batch_1():
    for model in ("Llama-3.2-1B", "Llama-3.2-3B"):
        for workload in ("hellaswag", "mmlu", "ifeval"):
            batched = latency.odd_excess(model, f"{workload} b8")
            assert list(batched) == [7373, 5735, 3277] and min(batched.values()) > 0.05
            assert abs(statistics.mean(latency.odd_excess(model, f"{workload} b1").values())) < 0.05


@pytest.mark.slow
def test_report_of_the_published_figures(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["report", "--published", "--out", str(tmp_path / "new")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "new" / "published.md")
    text = (tmp_path / "new" / "published.md").read_text()
    errors = [abs(error) for error in latency.prediction_errors()]
    assert f"median error {statistics.median(errors):.1%}, largest {max(errors):.1%}**" in text
    assert "| Llama-3.2-1B | hellaswag b1 | 50 % | 20.0 | 391 | 404 | +3.2 % |" in text
    assert (tmp_path / "new" / "published.png").stat().st_size > 10_000


def test_published_takes_no_path(tmp_path, capsys):
    assert main(["report", str(tmp_path), "--published"]) == 2
    assert (
        capsys.readouterr().err
        == "gluprune report: error: --published takes no PATH: its figures are included in gluprune\n"
    )
