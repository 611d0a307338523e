"""Official tasks on the Hub's data and on local files, fixed subsets, and malformed data."""

import datasets
import pytest
from gluprune_evals import tasks
from gluprune_evals.harness import evaluate
from gluprune_evals.tasks import BASE_TASKS, INSTRUCT_TASKS, TASKS, Limits, build, check_tasks

from tests.helpers.study_cases import OracleLM, rows, write_data

IDENTITY = {"model": "m", "revision": "r", "configuration": {}, "dtype": "float32"}
CHECKED = ("arc_challenge", "hellaswag", "gsm8k", "wikitext", "lambada_openai", "ifeval")


@pytest.fixture
def hub(monkeypatch):
    """Replace `datasets.load_dataset`: the documents of `rows` and, as on the Hub, splits that no score needs."""

    def load(path, name=None, **_):
        task = {
            "allenai/ai2_arc": "arc_challenge",
            "Rowan/hellaswag": "hellaswag",
            "openai/gsm8k": "gsm8k",
            "EleutherAI/wikitext_document_level": "wikitext",
            "EleutherAI/lambada_openai": "lambada_openai",
            "google/IFEval": "ifeval",
        }[path]
        splits = {split: datasets.Dataset.from_list(documents) for split, documents in rows(task).items()}
        other = next(iter(splits.values()))
        return datasets.DatasetDict({"train": other, "validation": other, **splits})

    monkeypatch.setattr(datasets, "load_dataset", load)


@pytest.mark.parametrize("name", CHECKED)
def test_local_files_equal_the_hubs_data(hub, tmp_path, name):
    """The same documents, requests, metrics and definition."""
    data = write_data(tmp_path)
    there, here = build(name, Limits()), build(name, Limits(), data)
    assert there.keys() == here.keys() == {name}
    assert list(there[name].eval_docs) == list(here[name].eval_docs) and len(here[name].eval_docs) == 6
    assert there[name].VERSION == here[name].VERSION
    models, found = [OracleLM(), OracleLM()], []
    for model, source in zip(models, (None, data), strict=True):
        found.append(evaluate(model, name, Limits(), data=source, **IDENTITY))
    assert models[0].seen == models[1].seen and models[0].seen
    assert found[0].metrics == found[1].metrics and TASKS[name].metric in found[0].metrics
    assert found[0].per_document == found[1].per_document and len(found[0].per_document) == 6
    assert (found[0].data, found[1].data) == ("Hub", "local files")


def test_shots_are_the_official_ones(tmp_path):
    """Five shots for GSM8K (from the training split) and MMLU; none for the others."""
    data, model = write_data(tmp_path), OracleLM()
    result = evaluate(model, "gsm8k", Limits(), data=data, **IDENTITY)
    assert result.shots == 5 and result.task_version == "3.0"
    training = [row["question"] for row in rows("gsm8k")["train"]]
    for _, (prompt, _) in model.seen:
        assert sum(question in prompt for question in training) == 5
    assert evaluate(OracleLM(), "arc_challenge", Limits(), data=data, **IDENTITY).shots == 0


def test_mmlu_is_weighted_by_size(tmp_path, monkeypatch):
    """Subjects are weighted by their number of documents, and each question has five shots from its subject."""
    sizes = {"mmlu_anatomy": 23, "mmlu_virology": 8}
    documents = {
        leaf: [
            {"question": f"{leaf} {n}", "subject": leaf, "choices": list("abcd"), "answer": n % 4} for n in range(size)
        ]
        for leaf, size in sizes.items()
    }
    shots = [{"question": f"shot {n}", "subject": "s", "choices": list("abcd"), "answer": 1} for n in range(5)]

    def source(leaf, folder):
        return lambda **_: {
            "test": datasets.Dataset.from_list(documents[leaf]),
            "dev": datasets.Dataset.from_list(shots),
        }

    monkeypatch.setattr(tasks, "local_source", source)
    monkeypatch.setattr(Limits, "leaves", lambda self, spec, names: sorted(sizes))
    model = OracleLM()
    result = evaluate(model, "mmlu", Limits(), data=tmp_path, **IDENTITY)
    assert result.documents == 31 and result.shots == 5
    assert result.value == pytest.approx(sum(result.per_document) / 31) and 0 < result.value < 1
    assert sum(result.per_document[:23]) / 23 != sum(result.per_document[23:]) / 8
    assert all(sum(f"shot {n}" in prompt for n in range(5)) == 5 for _, (prompt, _) in model.seen)


def test_musr_on_local_files_has_only_murder_mysteries(tmp_path, monkeypatch):
    """With local files MuSR consists only of murder mysteries: of the other two only samples are available."""
    monkeypatch.setattr(tasks, "_local_overrides", lambda manager, leaf, data: {"custom_dataset": lambda **_: {}})
    seen = []
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(
        TaskManager, "load", lambda self, spec: seen.append(spec) or {"tasks": {t["task"]: 0 for t in spec["task"]}}
    )
    assert list(build("leaderboard_musr", Limits(), tmp_path)) == ["leaderboard_musr_murder_mysteries"]
    assert len(build("leaderboard_musr", Limits())) == 3


def test_lists_of_tasks():
    assert len(BASE_TASKS) == 13 and len(INSTRUCT_TASKS) == 7
    assert set(INSTRUCT_TASKS) < set(BASE_TASKS)
    assert check_tasks(["piqa", "wikitext"]) == ["wikitext", "piqa"]
    with pytest.raises(ValueError, match="unknown task 'mmlu_pro'; allowed: wikitext, lambada_openai, mmlu"):
        check_tasks(["piqa", "mmlu_pro"])


def test_subsets_are_fixed():
    small, spec = Limits(small=True), TASKS["lambada_openai"]
    chosen = small.samples(spec, 5153)
    assert chosen == sorted(set(chosen)) == small.samples(spec, 5153) and len(chosen) == spec.documents
    assert small.samples(TASKS["truthfulqa_mc1"], 817) == small.samples(TASKS["truthfulqa_mc2"], 817)
    assert Limits(3).samples(spec, 5) != [0, 1, 2] or Limits(3).samples(spec, 6) != [0, 1, 2]
    assert Limits().samples(spec, 4) == Limits(9).samples(spec, 4) == [0, 1, 2, 3]
    names = [f"mmlu_{n:02}" for n in range(57)]
    assert len(small.leaves(TASKS["mmlu"], names)) == TASKS["mmlu"].subjects
    assert Limits(2).leaves(TASKS["mmlu"], names) == names
    assert len({Limits().subset(), Limits(3).subset(), Limits(4).subset(), small.subset(), Limits(3).subset()}) == 4
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        Limits(0)
    with pytest.raises(ValueError, match="not both"):
        Limits(3, small=True)


def test_small_budget_caps_generation(tmp_path):
    data, model = write_data(tmp_path), OracleLM()
    result = evaluate(model, "ifeval", Limits(small=True), data=data, **IDENTITY)
    assert result.generation_limit == Limits.small_tokens
    assert all(arguments["max_gen_toks"] == Limits.small_tokens for _, (_, arguments) in model.seen)
    assert result.lengths == [4] * 6
    model = OracleLM()
    assert evaluate(model, "ifeval", Limits(), data=data, **IDENTITY).generation_limit == 1280
    assert all(arguments["max_gen_toks"] == 1280 for _, (_, arguments) in model.seen)


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"question": "a", "choices": {}}', "test.jsonl, line 2 has no field 'answerKey'"),
        ("{broken", "test.jsonl, line 2 is not a JSON object"),
        ("3", "test.jsonl, line 2 is not a JSON object"),
    ],
)
def test_wrong_data_names_file_line_and_field(tmp_path, line, message):
    path = write_data(tmp_path) / "arc_challenge" / "test.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[1:]]))
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        build("arc_challenge", Limits(), tmp_path)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(ValueError, match=r"validation\.jsonl\.gz does not exist"):
        build("hellaswag", Limits(), tmp_path)
    path = write_data(tmp_path) / "hellaswag" / "validation.jsonl.gz"
    path.write_bytes(b"plain text")
    with pytest.raises(ValueError, match="line 1 is not a JSON object: Not a gzipped file"):
        build("hellaswag", Limits(), tmp_path)
    (tmp_path / "arc_challenge" / "test.jsonl").write_text("")
    with pytest.raises(ValueError, match="is empty"):
        build("arc_challenge", Limits(), tmp_path)


def test_no_network(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'allenai/ai2_arc' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        RuntimeError, match=r"the data of arc_challenge cannot be read from the Hub .*: give local files with --data"
    ):
        build("arc_challenge", Limits())
