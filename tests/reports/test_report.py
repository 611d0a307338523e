"""Reports from synthetic records: figures in the table cells, contents of the plots, comparisons."""

import dataclasses
import json

import pytest
import torch

from gluprune.cli import main
from gluprune.measure.compare import compare
from gluprune.measure.records import Record, append
from gluprune.reports import plots, report

BF16 = torch.bfloat16
WORDS = "width must be a multiple of 8"


def measured(provider, seconds, I=8192, M=1, what="mlp: forward", unit="s", repeats=5, spread=0.01, **details):
    values = (
        [seconds * (1 + spread * (step / (repeats - 1) - 0.5)) for step in range(repeats)] if repeats > 1 else [seconds]
    )
    return Record.of(
        what, provider, {"model": "1b", "H": 2048, "I": I, "M": M}, BF16, unit=unit, values=values, **details
    )


@pytest.fixture
def run():
    """Two widths, two numbers of tokens, ceilings of 1 TB/s and 100 TFLOP/s; the peer supports no unaligned width."""
    records = [
        Record.of("ceiling: copy", "torch", {"bytes": 10**9}, BF16, unit="s", values=[2e-3], nbytes=2 * 10**9),
        Record.of("ceiling: gemm", "torch", {"n": 8192}, BF16, unit="s", values=[0.01], flops=10**12),
    ]
    for I in (8192, 4915):
        for M in (1, 512):
            size = {"nbytes": 6 * 2048 * I, "flops": 6 * M * 2048 * I}
            floor = max(size["nbytes"] / 1e12, size["flops"] / 1e14)
            cell = {"I": I, "M": M, **size, "floor": floor}
            records.append(measured("eager", floor * 4, **cell))
            records.append(measured("gluprune", floor * (2 if M == 1 else 5), **cell))
            if I % 8:
                shape = records[-1].shape
                records.append(Record.missing("mlp: forward", "peer", shape, BF16, unit="s", reason=WORDS))
            else:
                records.append(measured("peer", floor * 3, **cell))
    return records


def keep(records, path):
    for record in records:
        append(path, record)
    return path


def cells(markdown, start):
    line = next(line for line in markdown.splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_table(run):
    markdown = report.table([record for record in run if record.what == "mlp: forward"])
    header = ["model", "H", "I", "M", "eager", "gluprune", "peer", "best, share of floor", "gluprune over best peer"]
    assert cells(markdown, "| model") == header
    # 6 * 2048 * 8192 bytes at 1 TB/s are 100.66 us; four, two and three times that.
    wide = ["1b", "2048", "8192", "1", "402.7", "**201.3**", "302", "50%", "1.50×"]
    assert cells(markdown, "| 1b | 2048 | 8192 | 1 ") == wide
    odd = cells(markdown, "| 1b | 2048 | 4915 | 512 ")
    assert odd[6:] == ["missing [1]", "25%", "0.80×"]
    assert f"[1] {WORDS}" in markdown and "µs, bfloat16" in markdown
    assert "Medians of 5 repeats; half the p20–p80 range is 0.3%" in markdown


def test_higher_is_better_for_rates():
    rows = [measured("eager", 10.0, unit="tokens/s"), measured("gluprune", 30.0, unit="tokens/s")]
    markdown = report.table(rows)
    assert "**30**" in markdown and "**10**" not in markdown and "3.00×" in markdown
    assert report.win(rows) == pytest.approx(3) and report.win([measured("eager", 4.0), measured("gluprune", 1.0)]) == 4


def test_a_difference_within_the_spread_is_not_a_loss(tmp_path):
    """Two percent slower is a loss with a spread of one percent, but not with ten."""
    for spread, lost in ((0.01, 1), (0.1, 0)):
        rows = [measured("eager", 1.0, spread=spread), measured("gluprune", 1.02, spread=spread)]
        markdown = report.write(rows, tmp_path).read_text()
        assert f"by more than the spread in {lost} of 1 cells; geometric mean 0.98×" in markdown


def test_forced_paths_are_not_peers():
    rows = [measured("eager", 4.0), measured("gluprune", 2.0), measured("gluprune, triton", 1.0)]
    assert report.win(rows) == 2
    assert report.win(rows[1:]) is None and report.win(rows[:1]) is None


def test_report_of_a_folder(run, tmp_path, capsys):
    keep(run, tmp_path / "records" / "mlp.jsonl")
    out = tmp_path / "out"
    assert main(["report", str(tmp_path / "records"), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(out / "report.md"), "records": len(run)}
    markdown = (out / "report.md").read_text()
    assert "worse than the best peer by more than the spread in 2 of 4 cells; geometric mean 1.10×" in markdown
    pictures = {path.name for path in out.glob("*.png")}
    assert pictures == {"roofline.png", "width.png", "wins.png"}
    assert all(f"({name})" in markdown for name in pictures)


def test_report_next_to_its_records_with_one_width(tmp_path, capsys):
    """No plot against width for one width, no wins for one provider, no roofline without ceilings."""
    path = keep([measured("eager", 1.0, I=128)], tmp_path / "mlp.jsonl")
    assert main(["report", str(path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.md")
    assert not list(tmp_path.glob("*.png"))


def test_last_record_of_a_figure_counts(tmp_path):
    path = keep([measured("eager", 1.0), measured("eager", 2.0), measured("eager", 3.0, M=8)], tmp_path / "a.jsonl")
    assert [record.p50 for record in report.read_all([path])] == pytest.approx([2, 3])


def test_points_of_the_plots(run, tmp_path, monkeypatch):
    """The plotted points: the knee of the roofline, a fourfold gain over eager dense, and the logarithms of wins."""
    drawn = {}
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.update({path.name: figure}))
    report.write(run, tmp_path)
    roof = drawn["roofline.png"].axes[0]
    assert list(roof.lines[0].get_xdata())[1] == pytest.approx(100) and max(roof.lines[0].get_ydata()) == pytest.approx(
        1e14
    )
    assert all(y <= roof.lines[0].get_ydata()[1] for dots in roof.collections for _, y in dots.get_offsets())
    gain = drawn["width.png"].axes[1]
    lines = {line.get_label(): dict(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in gain.lines}
    assert lines["eager"][8192] == 1 and lines["gluprune"][8192] == pytest.approx(2)
    assert lines["ratio of the bytes"][4915] == pytest.approx(8192 / 4915)
    odd = [line for line in gain.lines if list(line.get_xdata()) == [4915] and line.get_marker() == "x"]
    assert [line.get_ydata()[0] for line in odd] == pytest.approx([8192 / 4915, 2 * 8192 / 4915])
    assert drawn["width.png"].get_suptitle().endswith("; crosses: unaligned widths (not a multiple of 128)")
    heat = drawn["wins.png"].axes[0].images[0].get_array()
    assert heat.flatten().tolist() == pytest.approx([0.585, -0.737, 1, -0.322], abs=1e-3)


@pytest.mark.parametrize(
    "values, unit, expected",
    [
        ([2.0, 0.5], "s", (1e3, "ms")),
        ([2e-7], "s", (1e6, "µs")),
        ([3e6, 5e9], "B", (1e-6, "MB")),
        ([0.1], "J", (1.0, "J")),
    ],
)
def test_readable_units(values, unit, expected):
    assert plots.readable(values, unit) == expected


# --- two runs ---


def faster(record, factor):
    return dataclasses.replace(record, p20=record.p20 * factor, p50=record.p50 * factor, p80=record.p80 * factor)


@pytest.mark.parametrize("unit, worse", [("s", 1.5), ("tokens/s", 0.5), ("J/token", 1.5)])
def test_regressions_beyond_the_spread(unit, worse):
    old = measured("eager", 10.0, unit=unit, spread=0.1)
    verdicts = {f: compare([old], [faster(old, f)]).changes[0].verdict for f in (1.0, 1.02, 0.98, worse, 2 - worse)}
    assert list(verdicts.values()) == ["same", "same", "same", "worse", "better"]


def test_ranges_that_touch_are_the_same():
    """The p20-p80 ranges must not overlap: a median or one end outside the other range is not enough."""
    old = dataclasses.replace(measured("eager", 10.0), p20=9.0, p50=10.0, p80=11.0)
    for p20, p50, p80, verdict in [
        (10.9, 12, 13, "same"),
        (11.1, 12, 13, "worse"),
        (7, 8, 9.1, "same"),
        (7, 8, 8.9, "better"),
    ]:
        assert compare([old], [dataclasses.replace(old, p20=p20, p50=p50, p80=p80)]).changes[0].verdict == verdict


def test_figures_that_cannot_be_compared():
    once = measured("eager", 1.0, repeats=1)
    result = compare([once, measured("peer", 1.0)], [faster(once, 9), measured("eager", 1.0, M=8)])
    assert [change.verdict for change in result.changes] == ["no spread"] and not result.regressions
    assert (result.only_old, result.only_new) == (1, 1)
    with pytest.raises(ValueError, match="no figure in common"):
        compare([once], [dataclasses.replace(once, hardware="another")])


def test_a_figure_that_is_now_missing_is_a_regression():
    old = measured("peer", 1.0)
    new = Record.missing(old.what, old.provider, old.shape, BF16, unit="s", reason=WORDS)
    assert [change.verdict for change in compare([old], [new]).regressions] == ["missing"]
    assert [change.verdict for change in compare([new], [old]).changes] == ["no longer missing"]
    assert not compare([new], [new]).regressions


def test_compare_on_the_command_line(tmp_path, capsys):
    old = [measured("eager", 1.0), measured("gluprune", 1.0)]
    before = keep(old, tmp_path / "old.jsonl")
    after = keep([old[0], faster(old[1], 2)], tmp_path / "new.jsonl")
    assert main(["report", "--compare", str(before), str(before)]) == 0
    assert main(["report", "--compare", str(before), str(after)]) == 1
    printed = capsys.readouterr().out
    assert "worse: mlp: forward, gluprune, model 1b, H 2048, I 8192, M 1, bfloat16: 1 -> 2 s (+100.0%)" in printed
    assert "1 same, 1 worse" in printed
    assert main(["report", "--compare", str(before), str(after), "--json"]) == 1
    assert [change["verdict"] for change in json.loads(capsys.readouterr().out)["changes"]] == ["same", "worse"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "give a file of records, or a folder of such files"),
        (["absent.jsonl"], "absent.jsonl"),
        (["."], "holds no file of records"),
        (["bad.jsonl"], "bad.jsonl, line 1 is not a record"),
        (["empty.jsonl"], "no record in empty.jsonl"),
        (["--compare", "bad.jsonl", "bad.jsonl", "--out", "x"], "--compare takes only OLD and NEW"),
    ],
)
def test_bad_input(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    if arguments != ["."]:
        (tmp_path / "bad.jsonl").write_text("{}\n")
        (tmp_path / "empty.jsonl").write_text("")
    assert main(["report", *arguments]) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert printed.startswith("gluprune report: error: ") and message in printed
    assert not list(tmp_path.glob("*.md"))
