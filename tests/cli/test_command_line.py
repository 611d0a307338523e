"""Behaviour shared by all commands: help, flags with several values, errors, logs, missing extras, Ctrl-C."""

import resource
import shlex
import subprocess
import sys

import pytest
import typer
from gluprune_evals.tasks import BASE_TASKS, INSTRUCT_TASKS

import gluprune
from gluprune.cli import app, main
from gluprune.cli.app import PANELS
from gluprune.cli.command import Command, expand, in_flags
from gluprune.measure.bench import PRESETS
from gluprune.measure.decoding import DECODINGS
from gluprune.pruning.recipe import ALLOCATIONS, SCORES, Recipe
from tests.helpers.tiny_models import make_tiny_model
from tests.helpers.tokenizers import byte_tokenizer

COMMANDS = {name: module for modules in PANELS.values() for name, module in modules.items()}
EXAMPLES = [
    line
    for module in COMMANDS.values()
    for example in module.EXAMPLES
    for line in example.replace("\\\n", " ").splitlines()
]


def run(*arguments, code=None):
    command = [sys.executable, *(["-c", code] if code else ["-m", "gluprune"]), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def parsed(monkeypatch):
    """The parsed parameters of every command, which is not run."""
    seen = []
    monkeypatch.setattr(Command, "invoke", lambda self, ctx: seen.append(ctx.params))
    return seen


# --- help ---


def test_commands():
    assert list(COMMANDS) == [
        *("shrink", "prune", "calibrate", "sample", "reconstruct", "heal", "export", "info"),
        *("perplexity", "bench", "eval", "study", "report", "demo"),
    ]


@pytest.mark.parametrize("columns", [80, 100, 200])
@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help(command, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main([*command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Usage: gluprune" in text and "Example" in text and "…" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert main([*command, "-h"]) == 0
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("line", EXAMPLES)
def test_examples_work_as_typed(line, parsed, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("llama-narrow", "narrow", "served"):  # folders that examples read
        (tmp_path / name).mkdir()
    (tmp_path / "notes.txt").write_text("Text.")
    program, *arguments = shlex.split(line)
    assert program == "gluprune" and main(arguments) == 0, capsys.readouterr().err
    assert len(parsed) == 1


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example_of_the_command(command):
    assert any(line.startswith(f"gluprune {command}") for line in EXAMPLES)


def test_help_is_complete(capsys, monkeypatch):
    """Names that are repeated in help texts and signatures match those of the library."""
    monkeypatch.setenv("COLUMNS", "100")
    main(["prune", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert all(name in text for name in (*SCORES, *ALLOCATIONS))
    assert f"[default: {Recipe().score}]" in text and f"[default: {Recipe().multiple_of}]" in text
    main(["study", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "[default: 0.1 0.2 0.3 0.4 0.5 0.6]" in text and "[default: maw]" in text
    assert f"base ({len(BASE_TASKS)} tasks), instruct ({len(INSTRUCT_TASKS)} tasks)" in text
    assert [name.value for name in app.bench.Decoding] == list(DECODINGS)
    assert [name.value for name in app.bench.Preset] == list(PRESETS)


@pytest.mark.parametrize("arguments", [["--help"], ["prune", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments):
    code = (
        "import sys\nfrom gluprune.cli import main\nmain(sys.argv[1:])\n"
        "print({'torch', 'transformers', 'numpy', 'triton', 'pydantic'} & set(sys.modules), file=sys.stderr)"
    )
    result = run(*arguments, code=code)
    assert result.stderr.strip() == "set()", result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        "prune {0} --pruning-ratio 0.2 --out {0}",
        "shrink {0} --ratio 0.2 --out {0}",
        "heal {0} --teacher {0} --out {0}",
        "reconstruct {0} --dense {0} --text {0}/config.json --out {0}",
        "export {0} --format hf --out {0}",
        "eval {0} --tasks base nosuch",
        "study {0} --tasks nosuch",
        "shrink {0} --ratio 0.2 --out {0}/new --text {0}/nosuch",
        "heal {0} --teacher {0} --out {0}/new --text {0}/config.json {0}/nosuch",
        "shrink {0} --ratio 0.2 --out {0}/new --test-text {0}/nosuch",
    ],
)
def test_bad_folders_tasks_and_texts_are_found_at_once(tmp_path, arguments):
    """Before PyTorch is imported, which takes seconds."""
    (tmp_path / "config.json").write_text("{}")
    code = (
        "import sys\nfrom gluprune.cli import main\ncode = main(sys.argv[1:])\n"
        "print(code, {'torch', 'transformers'} & set(sys.modules), file=sys.stderr)"
    )
    error, rest = run(*arguments.format(tmp_path).split(), code=code).stderr.splitlines()
    assert rest == "2 set()"
    messages = (f"output folder {tmp_path} exists and is not empty", "unknown task 'nosuch'", "nosuch does not exist")
    assert any(message in error for message in messages)


def test_help_is_fast():
    """0.3 s beyond an empty Python; processor time, which other processes change little."""
    seconds = []
    for _ in range(5):
        start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        run("prune", "--help")
        seconds.append(resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start)
    assert min(seconds) < 1


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"gluprune {gluprune.__version__}\n"


def test_no_command_and_unknown_ones(capsys):
    assert main([]) == 2
    assert "Usage: gluprune" in capsys.readouterr().out
    for arguments, message in [
        (["prun"], "gluprune: error: No such command 'prun'"),
        (["info"], "gluprune info: error: Missing argument"),
        (["info", "a", "b"], "gluprune info: error: "),
        (["info", "a", "--jso"], "--jso"),
        (
            ["prune", "a", "--pruning-ratio", "x", "--out", "b"],
            "gluprune prune: error: Invalid value for '--pruning-ratio'",
        ),
        (["bench", "a", "--decoding", "slow"], "gluprune bench: error: Invalid value for '--decoding'"),
        (["calibrate", "a", "--out", "b", "--text"], "--text"),
    ]:
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell):
    """The script that Typer prints, and the completions that the script requests."""
    environment = {"_GLUPRUNE_COMPLETE": f"complete_{shell}", "COMP_WORDS": "gluprune re", "COMP_CWORD": "1"}
    environment |= {"_TYPER_COMPLETE_ARGS": "gluprune re", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    command = [sys.executable, "-m", "gluprune"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "reconstruct" in result.stdout and "report" in result.stdout and "prune\n" not in result.stdout


# --- several values after one flag ---


@pytest.mark.parametrize(
    "given, expected",
    [
        ("m --text a b --json", "m --text a --text b --json"),
        ("m --text a --text b", "m --text a --text b"),
        ("--text a b --out c d", "--text a --text b --out c d"),
        ("m --ratios", "m --ratios ''"),
        ("m --ratios --json", "m --ratios '' --json"),
        ("m --text", "m --text"),
        ("m --text --json", "m --text --json"),
        ("m --ratios -0.5 - -x", "m --ratios -0.5 --ratios - -x"),
        ("--text=a b", "--text=a b"),
        ("--text a -- b --text c d", "--text a -- b --text c d"),
        ("", ""),
    ],
)
def test_expand(given, expected):
    arguments = expand(shlex.split(given), {"--text", "--ratios"}, {"--ratios"})
    assert arguments == shlex.split(expected)


@pytest.mark.parametrize(
    "command, flag, name, values",
    [
        (["calibrate", "o/m", "--out", "f"], "--text", "text", ["a", "b"]),
        (["reconstruct", "o/m", "--dense", "o/d", "--out", "f"], "--text", "text", ["a", "b"]),
        (["perplexity", "o/m"], "--text", "text", ["a", "b"]),
        (["shrink", "o/m", "--out", "f"], "--text", "text", ["a", "b"]),
        (["shrink", "o/m", "--out", "f"], "--test-text", "test_text", ["a", "b"]),
        (["prune", "o/m", "--out", "f"], "--calibration", "calibration", ["a", "b"]),
        (["bench", "o/m"], "--pruning-ratio", "pruning_ratio", [0.1, 0.4]),
        (["bench", "o/m"], "--batch", "batch", [1, 8]),
        (["bench", "o/m"], "--prompt", "prompt", [128, 1024]),
        (["bench", "o/m"], "--decoding", "decoding", ["generate", "graph"]),
        (["study", "o/m", "o/n"], "--ratios", "ratios", ["0.1", "0.5"]),
        (["study", "o/m", "o/n"], "--scores", "scores", ["maw", "hybrid+compensate"]),
        (["study", "o/m"], "--tasks", "tasks", ["piqa", "boolq"]),
        (["eval", "o/m"], "--tasks", "tasks", ["piqa", "boolq"]),
        (["report"], "--compare", "compare", ["old", "new"]),
    ],
)
def test_values_after_one_flag_or_after_one_each(command, flag, name, values, parsed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("a", "b"):
        (tmp_path / file).write_text("Text.")
    first, second = map(str, values)
    assert main([*command, flag, first, second]) == 0
    assert main([*command, flag, first, flag, second]) == 0
    assert main([*command, flag, first, second, "--json"]) == 0
    assert [list(parameters[name]) for parameters in parsed] == [values] * 3


def test_ratios_without_a_value(parsed):
    assert main(["study", "o/m", "--ratios", "--json"]) == 0 == main(["study", "o/m", "--ratios"])
    assert [list(parameters["ratios"]) for parameters in parsed] == [[""], [""]]


# --- exit codes and errors ---


@pytest.mark.parametrize(
    "raised, code, line",
    [
        (KeyboardInterrupt(), 130, "gluprune info: interrupted"),
        (ValueError("first\n  second\n"), 2, "gluprune info: error: first second"),
        (ValueError("Value error, third"), 2, "gluprune info: error: third"),
        (RuntimeError("no memory"), 2, "gluprune info: error: no memory"),
    ],
)
def test_errors_and_interrupts_are_one_line(raised, code, line, monkeypatch, capsys):
    from gluprune.checkpoints import info

    def raises(path):
        raise raised

    monkeypatch.setattr(info, "info", raises)
    assert main(["info", "o/m"]) == code
    captured = capsys.readouterr()
    assert captured.err.strip("\r") == line + "\n" and not captured.out


@pytest.mark.parametrize(
    "arguments, where, hint",
    [
        (["prune", "o/m", "--out", "o"], "gluprune.checkpoints.stream.prune_checkpoint", "run it again with --resume"),
        (["shrink", "o/m", "--out", "o"], "gluprune.workflow.shrink.shrink", "run it again"),
        (["study", "o/m"], "gluprune_evals.folder.StudyModel.find", "run it again"),
        (["eval", "o/m"], "gluprune_evals.folder.StudyModel.find", "run it again"),
        (["sample", "o/m", "--out", "o"], "gluprune.cli.calibration.load", None),
        (["calibrate", "o/m", "--text", __file__, "--out", "o"], "gluprune.cli.calibration.read_config", None),
    ],
)
def test_ctrl_c_is_one_line_with_the_hint_to_resume(arguments, where, hint, monkeypatch, capsys, tmp_path):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(where, interrupt)
    assert main(arguments) == 130
    captured = capsys.readouterr()
    expected = f"gluprune {arguments[0]}: interrupted" + (f"; to continue, {hint}" if hint else "")
    assert captured.err.strip("\r") == expected + "\n" and not captured.out


def test_ctrl_c_while_arguments_are_parsed(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Command, "parse_args", interrupt)
    assert main(["info", "o/m"]) == 130
    assert capsys.readouterr().err.strip("\r") == "gluprune: interrupted\n"


def test_a_defect_keeps_its_traceback(monkeypatch):
    from gluprune.checkpoints import info

    monkeypatch.setattr(info, "info", lambda path: {}["absent"])
    with pytest.raises(KeyError):
        main(["info", "o/m"])


@pytest.mark.parametrize(
    "arguments, package, extra",
    [
        (["eval", "o/m"], "lm-eval", "eval"),
        (["study", "o/m"], "lm-eval", "eval"),
        (["study", "o/m"], "scipy", "eval"),
        (["bench", "o/m"], "matplotlib", "bench"),
        (["report", "records"], "matplotlib", "bench"),
        (["report", "--published"], "matplotlib", "bench"),
        (["demo"], "matplotlib", "demo"),
        (["demo"], "gguf", "demo"),
    ],
)
def test_a_missing_extra_is_one_line_that_names_it(arguments, package, extra, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package.replace("-", "_"), None)
    assert main(arguments) == 2
    expected = f"gluprune {arguments[0]}: error: {package} is not installed: pip install 'gluprune[{extra}]'\n"
    assert capsys.readouterr().err == expected and not list(tmp_path.iterdir())


def test_texts_that_are_no_files_are_not_looked_up(parsed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sources = ["wikipedia", "hf:o/d:train:text"]
    assert main(["shrink", "o/m", "--ratio", "0.2", "--text", *sources, "--out", "out"]) == 0
    assert parsed[0]["text"] == sources


@pytest.mark.slow
def test_logs_hold_no_bars_of_transformers(tmp_path):
    """They are redrawn with carriage returns, which fill a log."""
    tokenizer = byte_tokenizer()
    gluprune.save(make_tiny_model(seed=1, vocab_size=len(tokenizer)), tmp_path / "dense", tokenizer)
    (tmp_path / "notes.txt").write_text("A long text. " * 200)
    paths = [f"{tmp_path / 'dense'}", "--text", f"{tmp_path / 'notes.txt'}", "--length", "32"]
    result = run("perplexity", *paths)
    assert result.returncode == 0, result.stderr
    assert "Loading weights" not in result.stderr and "\r" not in result.stderr


@pytest.mark.parametrize("flag, shown", [("--json", ["warning"]), ("-v", ["info", "warning"]), ("-q", [])])
def test_verbose_and_quiet(flag, shown):
    """Logs and progress bars go to stderr: more with -v, only errors with -q; stdout contains only the result."""
    code = """
import logging, sys, types

class Result:
    to_dict = dict
    __str__ = lambda self: "{}"

def info(path):
    from tqdm.auto import tqdm

    logging.getLogger("gluprune.checkpoints").info("info")
    list(tqdm(range(2), desc="bar"))
    logging.getLogger("gluprune.checkpoints").warning("warning")
    return Result()

sys.modules["gluprune.checkpoints.info"] = types.SimpleNamespace(info=info)  # the real one imports torch
from gluprune.cli import main
sys.exit(main(["info", "o/m", *sys.argv[1:]]))
"""
    result = run(flag, code=code)
    assert result.stdout == "{}\n" and result.returncode == 0, result.stderr
    assert [line for line in result.stderr.splitlines() if line in ("info", "warning")] == shown
    assert ("bar: 100%" in result.stderr) == (flag != "-q")


def test_exit_code_of_the_process():
    result = run("info", "--json")
    assert result.returncode == 2 and not result.stdout
    assert result.stderr.startswith("gluprune info: error: ") and result.stderr.count("\n") == 1


def test_typer_exports_what_is_used():
    assert issubclass(typer.BadParameter, app.UsageError) and app.UsageError is not Exception


# --- errors ---


@pytest.mark.parametrize(
    "message, expected",
    [
        ("pruning_ratio must lie between 0 and 1", "--pruning-ratio must lie between 0 and 1"),
        ("use score='hybrid' or compensate=True", "use --score hybrid or --compensate"),
        ("multiple_of=128; width 7", "--multiple-of 128; width 7"),
        ("give statistics=", "give --statistics"),
        ("the score and its statistics", "the score and its statistics"),
        ("needs Gram matrices: calibrate(..., gram=True)", "needs Gram matrices: gluprune calibrate --gram"),
        ("/models/pruning_ratio=0.2/a and b/multiple_of", "/models/pruning_ratio=0.2/a and b/multiple_of"),
        ("num_score=3", "num_score=3"),
    ],
)
def test_errors_name_flags(message, expected):
    names = ("pruning_ratio", "multiple_of", "score", "compensate", "statistics")
    assert in_flags(message, {name: "--" + name.replace("_", "-") for name in names}) == expected
