"""Records: spread of the measurements, one JSON line each, no figures that were not measured."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from gluprune.measure import records


def test_percentiles():
    record = records.Record.of("copy", "torch", {"M": 1}, torch.bfloat16, unit="s", values=[5.0, 1.0, 4.0, 2.0, 3.0])
    assert (record.p20, record.p50, record.p80, record.repeats) == pytest.approx((1.8, 3.0, 4.2, 5))
    assert record.dtype == "bfloat16" and record.versions["torch"] == version("torch")
    single = records.Record.of("copy", "torch", {}, torch.float32, unit="s", values=[2.5])
    assert (single.p20, single.p50, single.p80, single.repeats) == (2.5, 2.5, 2.5, 1)


def test_nothing_measured_is_an_error():
    with pytest.raises(ValueError, match="copy by torch: nothing was measured"):
        records.Record.of("copy", "torch", {}, torch.float32, unit="s", values=[])


def test_append_and_read(tmp_path):
    path = tmp_path / "new" / "records.jsonl"
    written = [records.Record.of("copy", "torch", {"M": m}, torch.float32, unit="s", values=[float(m)]) for m in (1, 2)]
    for record in written:
        records.append(path, record)
    assert len(path.read_text().splitlines()) == 2
    assert records.read(path) == written


def test_floor_and_missing_figure(tmp_path):
    """Twice the floor's time is a share of one half; a missing figure has a reason; both can be read back."""
    slow = records.Record.of(
        "copy", "torch", {}, torch.float32, unit="s", values=[4.0], nbytes=10, flops=20, floor=2.0, method="clock"
    )
    assert slow.share_of_floor == 0.5
    missing = records.Record.missing("mlp", "peer", {"I": 7373}, torch.bfloat16, unit="s", reason="not a multiple of 8")
    assert (missing.p20, missing.p50, missing.p80, missing.repeats) == (None, None, None, 0)
    assert missing.share_of_floor is None and missing.dtype == "bfloat16"
    for record in (slow, missing):
        records.append(tmp_path / "records.jsonl", record)
    assert records.read(tmp_path / "records.jsonl") == [slow, missing]


def test_committed_records_can_be_read():
    """Including records of earlier versions."""
    root = Path(__file__).parents[2]
    for path in [*root.glob("benchmarks/results/**/*.jsonl"), *root.glob("evals/results/**/*.jsonl")]:
        if path.name != "kernels_aot.jsonl":  # of the ahead-of-time check, which has a different format
            assert records.read(path), path


@pytest.mark.parametrize("line", ["{", '{"what": "copy"}', "[1]"])
def test_a_line_that_is_not_a_record(tmp_path, line):
    path = tmp_path / "records.jsonl"
    records.append(path, records.Record.of("copy", "torch", {}, torch.float32, unit="s", values=[1.0]))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"records\.jsonl, line 2 is not a record"):
        records.read(path)


def test_hardware_is_named():
    assert json.dumps(records.hardware()) and records.hardware().strip()
