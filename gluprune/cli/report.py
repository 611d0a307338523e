"""`gluprune report`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from gluprune.cli.options import Json, Quiet, Verbose, require

EXAMPLES = (
    "gluprune report bench_output",
    "gluprune report study_output bench_output --out report",
    "gluprune report --compare old/model.jsonl new/model.jsonl",
    "gluprune report --published",
)


def run(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[PATH]...", help="Files or folders of records (*.jsonl), or a study.", show_default=False
        ),
    ] = None,
    *,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Output folder. By default the folder of the first PATH; published_output with --published.",
        ),
    ] = None,
    published: Annotated[
        bool,
        typer.Option(
            "--published",
            help="Explain the published latencies and energies of arXiv 2512.22671 by output length, time and"
            " joules per token.",
        ),
    ] = False,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OLD NEW",
            help="Two files or folders: show the figures that changed by more than their spread. Exit code 1 if"
            " anything got worse.",
        ),
    ] = None,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Write tables and plots from records or a study.

    From records of `bench`: tables, plots, and where differences come from. From a study's folder: scores, findings and
    correlations, and, if records are given after it, scores against J/token and TPOT.
    """
    paths = paths or []
    if compare:
        if paths or out or published:
            raise ValueError("--compare takes only OLD and NEW")
        return _compare(compare, as_json)
    require("bench", "matplotlib")
    if published:
        if paths:
            raise ValueError("--published takes no PATH: its figures are included in gluprune")
        from gluprune_evals.paper import latency

        written = latency.write(out or "published_output")
        print(json.dumps({"report": str(written)}) if as_json else written)
        return 0
    studies = [path for path in paths if (Path(path) / "study.json").is_file()]
    if studies:
        written, count = _report_study(paths, studies, out)
    else:
        written, count = _report_records(paths, out)
    print(json.dumps({"report": str(written), "records": count}) if as_json else written)
    return 0


def _compare(paths: Sequence[str], as_json: bool) -> int:
    """Print what changed between two runs; return 1 if anything got worse."""
    if len(paths) != 2:
        raise ValueError(f"--compare takes OLD and NEW, got {len(paths)} paths")
    from gluprune.measure.compare import compare
    from gluprune.reports import report

    comparison = compare(*(report.read_all([path]) for path in paths))
    print(json.dumps(comparison.to_dict()) if as_json else comparison)
    return 1 if comparison.regressions else 0


def _report_records(paths: Sequence[str], out: str | None) -> tuple[Path, int]:
    """Write the report of records; return its path and the number of records."""
    from gluprune.reports import report

    records = report.read_all(paths)
    first = Path(paths[0])
    return report.write(records, out or (first if first.is_dir() else first.parent)), len(records)


def _report_study(paths: Sequence[str], studies: Sequence[str], out: str | None) -> tuple[Path, int]:
    """Write the report of a study, with cost records for its widths if given; return its path and their number."""
    if len(studies) > 1:
        raise ValueError(f"a report takes one study, got {' and '.join(studies)}")
    require("eval", "scipy")
    from gluprune_evals import report as study_report
    from gluprune_evals.folder import Folder

    from gluprune.reports import report

    others = [path for path in paths if path not in studies]
    records = report.read_all(others) if others else []
    return study_report.write(Folder(studies[0]), out or studies[0], records), len(records)
