"""The picture of `shrink`: perplexity against width."""

from __future__ import annotations

from io import BytesIO

from gluprune.workflow.report import ShrinkReport

_LINE, _CHOSEN = "#1f6fb4", "#d9541f"


def draw(report: ShrinkReport, name: str) -> bytes:
    """Return the picture as PNG: equal bytes for equal reports.

    Args:
        report: What was measured.
        name: Name of the model.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    dense, points = report.dense, report.points
    times = [point.perplexity / dense.perplexity for point in points]
    axes.plot([point.width for point in points], times, color=_LINE, marker="o")
    for point, value in zip(points, times, strict=True):
        is_chosen = point == report.chosen
        label = f"{value:.3f}×\n{point.bytes / 1e6:,.0f} MB"
        axes.annotate(
            f"written: {label}" if is_chosen else label,
            (point.width, value),
            xytext=(-8, 8),
            textcoords="offset points",
            ha="right",
            fontsize="small",
            fontweight="bold" if is_chosen else "normal",
            color=_CHOSEN if is_chosen else "black",
        )
    chosen = report.chosen
    axes.plot([chosen.width], [chosen.perplexity / dense.perplexity], "D", color=_CHOSEN, markersize=10)
    if report.max_loss is not None:
        limit = 1 + report.max_loss
        axes.axhline(limit, color=_CHOSEN, linewidth=1, linestyle="--")
        axes.annotate(
            f"at most {limit:g}×",
            (1, limit),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            color=_CHOSEN,
        )
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    labels = [f"{p.width}\n" + ("dense" if p is dense else f"−{1 - p.width / dense.width:.0%}") for p in points]
    axes.set_xticks([point.width for point in points], labels)
    axes.margins(0.2)
    axes.invert_xaxis()
    axes.set(xlabel="neurons in each MLP, and share removed", ylabel="perplexity, times the dense model's")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        f"{name} pruned without training ({report.recipe})\ndense perplexity {dense.perplexity:.2f} on"
        f" {report.tokens:,} tokens held apart, in windows of {report.length}",
        fontsize="medium",
    )
    stream = BytesIO()
    figure.savefig(stream, format="png", dpi=120)
    return stream.getvalue()
