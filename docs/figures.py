"""Draw the figures of README and docs from committed records: `python docs/figures.py`."""

from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from gluprune.measure.records import read

ROOT = Path(__file__).parents[1]
RATIOS = (0.1, 0.2, 0.4, 0.6)
# Provider in the records -> recipe as README names it, colour.
RECIPES = {
    "MAW": ("maw (the paper)", "#c0392b"),
    "MAW gate+up+down": ("maw_gud (default, no data)", "#d68910"),
    "hybrid, re-solved, + own text": ("hybrid+compensate", "#5d6d7e"),
    "surgeon, reconstructed on more, + own text": ("surgeon+compensate+reconstruct", "#1f618d"),
}
TEXTS = {"wikitext2": "WikiText-2", "lambada": "LAMBADA"}


def perplexities() -> dict[tuple[str, str, float], float]:
    """Return the perplexity by provider, text and ratio from the committed records."""
    records = read(ROOT / "evals/results/default-text/quality.jsonl")
    found = [record for record in records if record.what == "perplexity"]
    return {(record.provider, record.shape["text"], record.shape["ratio"]): record.p50 for record in found}


def draw_quality(path: Path) -> None:
    """Draw perplexity over the dense model's against the share of neurons removed."""
    values = perplexities()
    rcParams["svg.hashsalt"] = "gluprune"  # the same bytes at every run
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, (text, title) in zip(figure.subplots(1, 2, sharey=True), TEXTS.items(), strict=True):
        dense = values["dense", text, 0.0]
        for provider, (label, color) in RECIPES.items():
            ratios = [values[provider, text, ratio] / dense for ratio in RATIOS]
            axes.plot((0, *RATIOS), (1, *ratios), marker="o", markersize=4, color=color, label=label)
        axes.set_yscale("log")
        axes.set_ylim(0.95, 12)
        axes.set_yticks([1, 1.5, 2, 3, 5, 10], ["1×", "1.5×", "2×", "3×", "5×", "10×"])
        axes.minorticks_off()
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.set_title(title)
        axes.set_xlabel("neurons removed")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("perplexity over dense (lower is better)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, metadata={"Date": None}, facecolor="white")


if __name__ == "__main__":
    draw_quality(ROOT / "docs/assets/quality.svg")
