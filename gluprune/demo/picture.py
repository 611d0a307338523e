"""The plot of the demonstration: quality and speed against the width."""

from __future__ import annotations

from pathlib import Path

from gluprune.demo.rows import DEFAULT, PAPER, RECIPES, RECOMMENDED

_STYLE = {
    PAPER: {"color": "#8c8c8c", "marker": "o"},
    DEFAULT: {"color": "#d98c1f", "marker": "s"},
    RECOMMENDED: {"color": "#1f6fb4", "marker": "D", "linewidth": 2.5},
}


def plot(record: dict, path: Path) -> None:
    """Draw two panels and write them as PNG.

    Args:
        record: What `gluprune.demo.run.run` returns.
        path: The file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    quality, speed = figure.subplots(1, 2)
    _plot_quality(quality, record["rows"])
    _plot_speed(speed, record["rows"], record["prompt_tokens"])
    dense = record["rows"][0]
    widths = sorted({row["intermediate_size"] for row in record["rows"]}, reverse=True)
    labels = [f"{width}\n" + (f"−{1 - width / widths[0]:.0%}" if width < widths[0] else "dense") for width in widths]
    for axes in (quality, speed):
        axes.set_xticks(widths, labels)
        axes.invert_xaxis()
        axes.set_xlabel("neurons in each MLP, and share removed")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{record['model']} pruned without training — {record['hardware']}, {record['computed_in']},"
        f" dense perplexity {dense['perplexity']:.1f}",
        fontsize="medium",
    )
    figure.savefig(path, dpi=120)


def _plot_quality(axes, rows: list[dict]) -> None:
    """Perplexity divided by that of the dense model, one curve per recipe."""
    dense = rows[0]
    for name, label in RECIPES.items():
        points = [dense, *(row for row in rows if row["recipe"] == name)]
        values = [row["perplexity"] / dense["perplexity"] for row in points]
        axes.plot([row["intermediate_size"] for row in points], values, label=label, **_STYLE[name])
        if name == PAPER:
            continue
        for row, value in zip(points[1:], values[1:], strict=True):
            axes.annotate(
                f"{value:.2g}×" if value < 10 else f"{value:.0f}×",
                (row["intermediate_size"], value),
                xytext=(0, -15 if name == RECOMMENDED else 8),
                textcoords="offset points",
                ha="center",
                fontsize="small",
                color=_STYLE[name]["color"],
            )
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    worst = max(row["perplexity"] for row in rows) / dense["perplexity"]
    axes.set(yscale="log")
    axes.set_yticks([1, 10, 100, 1000], ["1×", "10×", "100×", "1000×"])
    axes.set_ylim(0.4, worst * 30)  # room for the legend
    axes.set_title("Quality: perplexity, times the dense model's (lower is better)", fontsize="medium")
    axes.legend(loc="upper left", fontsize="small", frameon=False)


def _plot_speed(axes, rows: list[dict], prompt_tokens: int) -> None:
    """Speed divided by that of the dense model, and the limit set by the size of the weights."""
    dense = rows[0]
    points = [dense, *(row for row in rows if row["recipe"] == RECOMMENDED)]
    widths = [row["intermediate_size"] for row in points]
    for label, key, style, offset in (
        (
            f"reading a prompt of {prompt_tokens} tokens",
            "prefill_tokens_per_second",
            {"color": "#2a9d5c", "marker": "o"},
            (-4, 8),
        ),
        ("writing one token", "decode_tokens_per_second", {"color": "#7a4fb0", "marker": "s"}, (-4, -16)),
    ):
        values = [row[key] / dense[key] for row in points]
        axes.plot(widths, values, label=f"{label}: {dense[key]:.0f} tokens/s dense", **style)
        axes.annotate(
            f"{values[-1]:.2f}×",
            (widths[-1], values[-1]),
            xytext=offset,
            textcoords="offset points",
            fontsize="small",
            color=style["color"],
        )
    limit = [dense["bytes"] / row["bytes"] for row in points]
    axes.plot(widths, limit, color="black", linestyle=":", label="in proportion to the bytes of all weights")
    axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
    axes.set_title("Speed, times the dense model's (higher is better), batch 1", fontsize="medium")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.35 * (high - low))  # room for the legend
    axes.legend(loc="upper left", fontsize="small", frameon=False)
