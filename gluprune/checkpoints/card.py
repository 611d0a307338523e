"""Where a checkpoint comes from: `gluprune.json` and the model card, which every pruned checkpoint gets."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gluprune.io.hub import hub_model, is_hub_id, model_name, stored_folder
from gluprune.io.shards import read_json_object
from gluprune.models.nemotron_nas import ARCHITECTURE

HISTORY_FILE, CARD_FILE = "gluprune.json", "README.md"
_CARD_BYTES = 1 << 16


@dataclass(frozen=True)
class History:
    """Where a checkpoint comes from.

    Attributes:
        base_model: The dense model: a Hub id, or the name of a folder. Empty if it is not known.
        base_commit: Its commit on the Hub, if it came from there.
        steps: What was done to it, in order; see `gluprune.pruning.history`.
        licence: The lines of the dense model's card that state its licence.
    """

    base_model: str
    base_commit: str | None = None
    steps: list[dict] = field(default_factory=list)
    licence: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, source: str | Path) -> History:
        """Return the history of a model: that in its folder, or that of a dense model of this name.

        Args:
            source: A folder, a Hub id, or an empty string.
        """
        if not str(source):  # as a path, it would be the working directory
            return cls("")
        if found := read_history(source):
            return found
        model = hub_model(source)
        if model is not None:
            return cls(model.name, model.commit, licence=_licence(stored_folder(source) or Path(source)))
        if is_hub_id(source):
            return cls(str(source))
        return cls(model_name(source), licence=_licence(Path(source)))

    @property
    def digests(self) -> set[str]:
        """SHA-256 of the texts that the model was calibrated or trained on."""
        calibrations = [step.get("calibration") or {} for step in self.steps]
        return {digest for calibration in calibrations for digest in calibration.get("texts", {}).values()}

    def documents(
        self, steps: Sequence[dict], architecture: str, widths: Sequence[int], picture: str | None = None
    ) -> dict[str, bytes]:
        """Return the files of a checkpoint after more steps, by name.

        Args:
            steps: What was done since.
            architecture: The class of the model.
            widths: Intermediate size of every layer.
            picture: Name of a file of the checkpoint that the card shows.
        """
        after = History(self.base_model, self.base_commit, [*self.steps, *steps], self.licence)
        content = json.dumps(asdict(after), indent=2, ensure_ascii=False) + "\n"
        card = _card(after, _loading(architecture, widths), picture)
        return {HISTORY_FILE: content.encode(), CARD_FILE: card.encode()}

    def __str__(self) -> str:
        return f"{self.base_model or 'unknown'}: " + ", then ".join(map(_in_words, self.steps))


def read_history(source: str | Path) -> History | None:
    """Return what a checkpoint on this disk says about itself; None where it says nothing that can be read."""
    try:
        found = read_json_object((stored_folder(source) or Path(source)) / HISTORY_FILE)
        history = History(**{name: found[name] for name in ("base_model", "base_commit", "steps", "licence")})
        _ = str(history), history.digests  # raise for entries of another kind
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return history


def _licence(folder: Path) -> list[str]:
    """Return the lines on the licence in the header of a model card."""
    try:
        with (folder / CARD_FILE).open("rb") as file:
            text = file.read(_CARD_BYTES).decode("utf-8", "replace").replace("\r\n", "\n")
    except OSError:
        return []
    opening, _, rest = text.partition("---\n")
    header = rest.partition("\n---")[0]
    return [] if opening.strip() else [line for line in header.splitlines() if line.startswith("license")]


def _in_words(step: dict) -> str:
    if step["step"] == "measure":
        return f"measured: perplexity {step['perplexity'] / step['dense_perplexity']:.2f} times dense"
    if step["step"] != "prune":
        return str(step["step"])
    return f"{step['recipe']}, {step['pruning_ratio']:.1%} of the neurons removed"


def _card(history: History, loading: list[str], picture: str | None) -> str:
    base = history.base_model or "an unknown model"
    header = ["library_name: transformers", "tags:", "- gluprune", "- pruning", *history.licence]
    if is_hub_id(base):
        header.insert(0, f"base_model: {base}")
        link = f"[{base}](https://huggingface.co/{base})"
    else:
        link = base
    if history.base_commit:
        link += f" at commit {history.base_commit}"
    name, summary = base.rpartition("/")[2], f"Written from {link}."
    if history.steps:
        name, summary = f"{name}, pruned", f"A pruned version of {link}: neurons were removed from its MLPs."
    lines = [
        *("---", *header, "---", ""),
        *(f"# {name}", "", summary, ""),
        *("Its quality is not that of the dense model; measure it on your own task.", ""),
        *(line for step in history.steps for line in _step_lines(step)),
        *([f"![perplexity against width]({picture})", ""] if picture else []),
        *("## Load", "", *loading, ""),
        f"`{HISTORY_FILE}` holds these facts for programs.",
    ]
    return "\n".join(lines) + "\n"


def _step_lines(step: dict) -> list[str]:
    rows = []
    if step["step"] == "prune":
        widths = sorted(set(step["widths"].values()))
        after = f"{widths[0]}" if len(widths) == 1 else f"{widths[0]} to {widths[-1]}"
        rows += [
            ("recipe", f"`{step['recipe']}`, widths are multiples of {step['multiple_of']}"),
            ("neurons", f"{step['original_intermediate_size']} -> {after} in {len(step['widths'])} layers"),
            ("ratio", f"{step['pruning_ratio']:.1%} removed; expansion ratio {step['expansion_ratio']:.3f}"),
            ("parameters", f"{step['original_parameters']:,} -> {step['parameters']:,}"),
        ]
    if step["step"] == "measure":
        times = step["perplexity"] / step["dense_perplexity"]
        rows += [
            (
                "perplexity",
                f"{step['perplexity']:.2f}, {times:.2f} times the dense model's {step['dense_perplexity']:.2f}",
            ),
            (
                "measured on",
                f"{step['tokens']:,} tokens held apart, in windows of {step['length']}",
            ),
            *(("text", f"{name}, SHA-256 `{digest}`") for name, digest in step["texts"].items()),
        ]
    if step["step"] == "heal":
        rows += [
            ("teacher", step["teacher"]),
            ("trained", f"{step['train']}, learning rate {step['learning_rate']:g}, {step['batch']} windows per step"),
            ("loss", f"{step['loss']['first']:.4f} -> {step['loss']['last']:.4f} nats per token"),
        ]
    calibration = step.get("calibration") or {}
    if calibration.get("tokens"):
        rows.append(("trained on" if step["step"] == "heal" else "calibration", f"{calibration['tokens']:,} tokens"))
    rows += [("text", f"{name}, SHA-256 `{digest}`") for name, digest in calibration.get("texts", {}).items()]
    if "statistics" in calibration:
        rows.append(("statistics", f"SHA-256 `{calibration['statistics']}`"))
    rows.append(("versions", ", ".join(f"{name} {number}" for name, number in step["versions"].items())))
    return [f"## {step['step'].capitalize()}", "", "| | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows), ""]


def _loading(architecture: str, widths: Sequence[int]) -> list[str]:
    where = ["Run this in the folder of this file, or put the folder, or its id on the Hub, in place of the dot:", ""]
    if architecture == ARCHITECTURE:
        return [
            *where,
            *("```sh", "vllm serve . --trust-remote-code", "```", ""),
            *("```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""),
            'model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)',
            *('tokenizer = AutoTokenizer.from_pretrained(".", trust_remote_code=True)', "```", ""),
            "The config is in the Nemotron-NAS (DeciLM) format, in which layers may have different widths. transformers"
            " does not know it: `trust_remote_code=True` runs `configuration_decilm.py` and `modeling_decilm.py` in"
            " this folder, which gluprune wrote; read them first. `gluprune export . --format hf --out ../stock`"
            " writes a checkpoint without code, which `gluprune.load` loads.",
        ]
    if len(set(widths)) > 1:
        imports = "import gluprune  # layers have different widths, which stock transformers cannot load"
        return [*where, "```python", imports, "", 'model = gluprune.load(".")', "```"]
    name = "AutoModelForCausalLM" if architecture.endswith("ForCausalLM") else architecture
    code = ["```python", f"from transformers import {name}", "", f'model = {name}.from_pretrained(".")', "```"]
    return [*where, *code]
