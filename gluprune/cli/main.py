"""The command line: `gluprune prune | sample | calibrate | reconstruct | info | bench | eval | study | report | demo`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from gluprune import __version__


def _prune(arguments: argparse.Namespace) -> None:
    if arguments.allocation == "sensitivity" and (arguments.calibration or arguments.statistics is None):
        raise ValueError("--allocation sensitivity needs --statistics FILE, of gluprune calibrate --sensitivity")
    options = {
        "expansion_ratio": arguments.expansion_ratio,
        "pruning_ratio": arguments.pruning_ratio,
        "intermediate_size": arguments.intermediate_size,
        "score": arguments.score,
        "multiple_of": arguments.multiple_of,
        "layers": arguments.layers,
    }
    if arguments.calibration is None:
        from gluprune.checkpoints.stream import prune_checkpoint
        from gluprune.pruning.scores import CALIBRATED_SCORES

        if arguments.statistics is None and (arguments.compensate or arguments.score in CALIBRATED_SCORES):
            what = "--compensate" if arguments.compensate else f"score {arguments.score}"
            raise ValueError(f"{what} needs --calibration FILE or --statistics FILE")
        report = prune_checkpoint(
            arguments.source,
            arguments.out,
            **options,
            statistics=arguments.statistics,
            compensate=arguments.compensate,
            allocation=arguments.allocation,
            dry_run=arguments.dry_run,
            resume=arguments.resume,
        )
    else:
        if arguments.dry_run or arguments.resume or arguments.statistics:
            raise ValueError("--dry-run, --resume and --statistics work without --calibration only, on the shards")
        report = _prune_in_memory(arguments, options)
    if arguments.json:
        print(json.dumps(report.to_dict()))
    else:
        print(report, "dry run: nothing was written" if arguments.dry_run else arguments.out, sep="\n")


def _calibration(source: str, text_files: Sequence[str], windows: int = 128):
    """The model, its tokenizer, and batches of so many windows of each text."""
    from transformers import AutoTokenizer

    from gluprune.calibration.batches import batches_from_text
    from gluprune.checkpoints.load_save import load

    texts = [Path(file).read_text(encoding="utf-8") for file in text_files]
    model = load(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    return model, tokenizer, batches_from_text(tokenizer, texts, windows)


def _prune_in_memory(arguments: argparse.Namespace, options: dict):
    from gluprune.checkpoints.load_save import save
    from gluprune.io.atomic import check_destination
    from gluprune.pruning.prune import prune

    check_destination(arguments.out)
    model, tokenizer, batches = _calibration(arguments.source, arguments.calibration)
    report = prune(model, **options, calibration=batches, compensate=arguments.compensate)
    save(model, arguments.out, tokenizer)
    return report


def _new_file(path: str) -> Path:
    out = Path(path)
    if out.exists() or not out.absolute().parent.is_dir():
        raise ValueError(f"{out} must be a new file in a folder that exists")
    return out


def _sample(arguments: argparse.Namespace) -> None:
    import torch
    from transformers import AutoTokenizer

    from gluprune.calibration.sample import sample_text
    from gluprune.checkpoints.load_save import load
    from gluprune.io.atomic import write_file

    out = _new_file(arguments.out)
    # Half precision is slow on most CPUs.
    model = (
        load(arguments.model).to("cuda") if torch.cuda.is_available() else load(arguments.model, dtype=torch.float32)
    )
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    text = sample_text(model, tokenizer, arguments.windows, arguments.length, seed=arguments.seed)
    write_file(out, [text.encode()])
    told = {"windows": arguments.windows, "tokens": arguments.windows * arguments.length, "file": str(out)}
    print(json.dumps(told) if arguments.json else f"{out}: {told['windows']} texts, {told['tokens']:,} tokens")


def _calibrate(arguments: argparse.Namespace) -> None:
    from gluprune.calibration.collect import calibrate

    out = _new_file(arguments.out)
    model, _, batches = _calibration(arguments.model, arguments.text)
    gram = arguments.gram or arguments.sensitivity
    statistics = calibrate(model, batches, gram=gram, sensitivity=arguments.sensitivity)
    statistics.save(out)
    told = {
        "layers": len(statistics.layers),
        "tokens": statistics.tokens,
        "gram": gram,
        "sensitivity": arguments.sensitivity,
        "file": str(out),
    }
    text = f"{out}: statistics of {told['layers']} layers on {told['tokens']:,} tokens, {out.stat().st_size:,} bytes"
    print(json.dumps(told) if arguments.json else text)


def _reconstruct(arguments: argparse.Namespace) -> None:
    from gluprune.checkpoints.load_save import load, save
    from gluprune.io.atomic import check_destination
    from gluprune.pruning.reconstruct import reconstruct

    check_destination(arguments.out)
    model, tokenizer, batches = _calibration(arguments.pruned, arguments.text, arguments.windows)
    reconstruct(model, load(arguments.dense), batches)
    save(model, arguments.out, tokenizer)
    told = {
        "windows": sum(map(len, batches)),
        "tokens": sum(batch.numel() for batch in batches),
        "folder": arguments.out,
    }
    text = f"{arguments.out}: reconstructed on {told['windows']} windows, {told['tokens']:,} tokens"
    print(json.dumps(told) if arguments.json else text)


def _info(arguments: argparse.Namespace) -> None:
    from gluprune.checkpoints.info import info

    description = info(arguments.model)
    print(json.dumps(description.to_dict()) if arguments.json else description)


def _bench(arguments: argparse.Namespace) -> None:
    import torch

    from gluprune.checkpoints.load_save import load
    from gluprune.measure import bench, records
    from gluprune.measure.random_models import random_model
    from gluprune.reports import report

    if (arguments.model is None) == (arguments.random is None):
        raise ValueError("give exactly one of MODEL and --random NAME")
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device} cannot be had: torch finds no CUDA device")
    sizes = {"batches": arguments.batch, "prompts": arguments.prompt, "new_tokens": arguments.new_tokens}
    given = {name: value for name, value in sizes.items() if value is not None}
    if arguments.preset and given:
        raise ValueError(
            f"--preset {arguments.preset} has its own workloads: leave out --batch, --prompt and --new-tokens"
        )
    plan = bench.plan_of(
        arguments.preset, device, ratios=arguments.pruning_ratio, decodings=arguments.decoding, **given
    )
    bench.check(plan, device)
    if arguments.random:
        dense, name = random_model(arguments.random), f"{arguments.random}, random weights"
    else:
        dense, name = load(arguments.model).eval(), Path(arguments.model).name
    path, made = Path(arguments.out) / "model.jsonl", []

    def keep(record: records.Record) -> None:
        records.append(path, record)
        made.append(record)

    bench.bench(dense, name, plan, device, keep)
    written = report.write(report.read_all([path]), arguments.out)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(record) for record in made]))
    else:
        print(bench.table(made), "", f"{path}: the records", f"{written}: tables and plots", sep="\n")


def _report(arguments: argparse.Namespace) -> int:
    from gluprune.reports import report

    if arguments.compare and (arguments.paths or arguments.out or arguments.published):
        raise ValueError("--compare takes OLD and NEW alone")
    if arguments.published and arguments.paths:
        raise ValueError("--published takes no PATH: its figures come with gluprune")
    if arguments.published:
        from gluprune_evals.paper import latency

        written = latency.write(arguments.out or "published_output")
        print(json.dumps({"report": str(written)}) if arguments.json else written)
        return 0
    if arguments.compare:
        from gluprune.measure.compare import compare

        comparison = compare(*(report.read_all([path]) for path in arguments.compare))
        print(json.dumps(comparison.to_dict()) if arguments.json else comparison)
        return 1 if comparison.regressions else 0
    studies = [path for path in arguments.paths if (Path(path) / "study.json").is_file()]
    if studies:
        return _report_study(arguments, studies)
    records = report.read_all(arguments.paths)
    first = Path(arguments.paths[0])
    written = report.write(records, arguments.out or (first if first.is_dir() else first.parent))
    print(json.dumps({"report": str(written), "records": len(records)}) if arguments.json else written)
    return 0


def _report_study(arguments: argparse.Namespace, studies: list[str]) -> int:
    """The folder of a study, and records of what its widths cost, if given."""
    from gluprune_evals import report as study_report
    from gluprune_evals.study import Folder

    from gluprune.reports import report

    if len(studies) > 1:
        raise ValueError(f"one study a report, got {' and '.join(studies)}")
    others = [path for path in arguments.paths if path not in studies]
    records = report.read_all(others) if others else []
    written = study_report.write(Folder(studies[0]), arguments.out or studies[0], records)
    print(json.dumps({"report": str(written), "records": len(records)}) if arguments.json else written)
    return 0


def _demo(arguments: argparse.Namespace) -> None:
    from gluprune.demo.run import run, summary

    record = run(arguments.model, arguments.out)
    print(json.dumps(record) if arguments.json else summary(record, arguments.out))


def _study_settings(arguments: argparse.Namespace):
    from gluprune_evals.study import Settings
    from gluprune_evals.tasks import Limits

    calibration = {}
    if getattr(arguments, "calibration", None):
        from gluprune_evals.text import read_text

        texts = tuple(read_text(file) for file in arguments.calibration)
        calibration = {"calibration": texts, "windows": arguments.calibration_windows}
    return Settings(
        limits=Limits(arguments.limit, small=arguments.budget == "small"),
        data=arguments.data,
        dtype=arguments.dtype,
        patch=arguments.patch,
        backend=arguments.backend,
        model_args=arguments.model_args,
        log_samples=arguments.log_samples,
        **calibration,
    )


def _evaluate(arguments: argparse.Namespace, models: list[str], configurations: list) -> None:
    from gluprune_evals.report import summary
    from gluprune_evals.study import Folder, Source, run

    sources = [Source.find(model) for model in models]
    settings = _study_settings(arguments)
    results = run(Folder(arguments.out), sources, configurations, _task_list(arguments.tasks), settings)
    if arguments.json:
        print(json.dumps([json.loads(result.to_json()) for result in results]))
    else:
        print(summary(results), arguments.out, sep="\n")


def _eval(arguments: argparse.Namespace) -> None:
    from gluprune_evals.study import Configuration

    _evaluate(arguments, [arguments.model], [Configuration()])


def _study(arguments: argparse.Namespace) -> None:
    from gluprune_evals.study import Recipe, grid

    recipes = [Recipe.parse(score) for score in arguments.scores]
    _evaluate(arguments, arguments.models, grid(arguments.ratios, recipes, arguments.multiple_of))


def _task_list(names: list[str]) -> list[str]:
    """Names of tasks, with `base` and `instruct` for the lists of the published study."""
    from gluprune_evals.tasks import BASE_TASKS, INSTRUCT_TASKS

    lists = {"base": BASE_TASKS, "instruct": INSTRUCT_TASKS}
    return [task for name in names for task in lists.get(name, (name,))]


def _add_evaluation_options(parser: argparse.ArgumentParser, out: str) -> None:
    parser.add_argument("--out", type=Path, default=out, metavar="FOLDER", help="results (default: %(default)s)")
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=["base"],
        metavar="TASK",
        help="base (13 tasks), instruct (7 tasks) or names of tasks (default: %(default)s)",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="local files instead of the Hub's data")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--limit", type=int, metavar="N", help="a seeded choice of N documents a task")
    size.add_argument("--budget", choices=["small"], help="a fixed, seeded subset of every task, sized for 2 CPU cores")
    parser.add_argument(
        "--dtype", default="auto", help="of the weights: auto, float32, bfloat16, ... (default: %(default)s)"
    )
    parser.add_argument("--patch", action="store_true", help="run with gluprune.patch_llama")
    parser.add_argument("--backend", metavar="NAME", help="evaluate a checkpoint in an lm-eval backend: hf, vllm, ...")
    parser.add_argument("--model-args", default="", metavar="KEY=VALUE,...", help="arguments of the backend")
    parser.add_argument("--log-samples", action="store_true", help="keep requests, answers and generated lengths")


def _layer_list(text: str) -> list[int]:
    """'0,2,5-7' -> [0, 2, 5, 6, 7]"""
    layers = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise argparse.ArgumentTypeError(f"{text!r} is no list of layers such as 0,2,5-7")
        layers.extend(range(int(first), int(last or first) + 1))
    return layers


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gluprune", description="Width pruning for the GLU MLPs of Llama-type models."
    )
    parser.add_argument("--version", action="version", version=f"gluprune {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    prune = commands.add_parser("prune", help="write a narrower checkpoint", description="Write a narrower checkpoint.")
    prune.add_argument("source", help="model folder or Hub id")
    prune.add_argument("--out", required=True, metavar="FOLDER", help="where to write; must not exist or be empty")
    target = prune.add_argument_group("target, exactly one")
    target.add_argument("--expansion-ratio", type=float, metavar="R", help="intermediate size over hidden size")
    target.add_argument("--pruning-ratio", type=float, metavar="P", help="share of the neurons to remove")
    target.add_argument("--intermediate-size", type=int, metavar="N", help="neurons to keep")
    prune.add_argument(
        "--score",
        default="maw",
        help="maw (= ppm), maw_gud, vow, pon, l2; with calibration also activation, hybrid, surgeon (default: %(default)s)",
    )
    prune.add_argument(
        "--multiple-of", type=int, default=128, metavar="N", help="round the width (default: %(default)s)"
    )
    prune.add_argument("--layers", type=_layer_list, metavar="LIST", help="only these, such as 0,2,5-7 (default: all)")
    calibrated = prune.add_argument_group("calibration")
    calibrated.add_argument(
        "--calibration",
        nargs="+",
        metavar="FILE",
        help="UTF-8 texts to calibrate on; loads the whole model",
    )
    calibrated.add_argument("--statistics", metavar="FILE", help="what `gluprune calibrate` wrote, instead of a text")
    calibrated.add_argument("--compensate", action="store_true", help="re-solve down_proj on the calibration text")
    calibrated.add_argument(
        "--allocation",
        choices=("uniform", "sensitivity"),
        default="uniform",
        help="every layer the same width, or by --statistics wider where the model is sensitive (default: %(default)s)",
    )
    streamed = prune.add_argument_group("without --calibration, one layer at a time is in memory")
    streamed.add_argument("--dry-run", action="store_true", help="say what would come out, write nothing")
    streamed.add_argument("--resume", action="store_true", help="go on where an interrupted run stopped")
    prune.set_defaults(run=_prune)

    sample = commands.add_parser(
        "sample",
        help="let a model write calibration text",
        description="Let a model write text of every kind it knows, at temperature 1, for --calibration and --text.",
    )
    sample.add_argument("model", help="model folder or Hub id")
    sample.add_argument("--out", required=True, metavar="FILE", help="where to write; must not exist")
    sample.add_argument("--windows", type=int, default=64, metavar="N", help="texts (default: %(default)s)")
    sample.add_argument("--length", type=int, default=512, metavar="N", help="tokens of each (default: %(default)s)")
    sample.add_argument("--seed", type=int, default=0, metavar="N", help="of the sampling (default: %(default)s)")
    sample.set_defaults(run=_sample)

    calibrate = commands.add_parser(
        "calibrate",
        help="write the statistics of a calibration text",
        description="Run a text through a model once and write what its neurons did, for `prune --statistics`.",
    )
    calibrate.add_argument("model", help="model folder or Hub id")
    calibrate.add_argument("--text", nargs="+", required=True, metavar="FILE", help="UTF-8 texts to calibrate on")
    calibrate.add_argument("--out", required=True, metavar="FILE", help="where to write; must not exist")
    calibrate.add_argument(
        "--gram",
        action="store_true",
        help="with the Gram matrices that --compensate needs: 4 bytes a pair of neurons, all layers in memory at once",
    )
    calibrate.add_argument(
        "--sensitivity",
        action="store_true",
        help="with what score surgeon and --allocation sensitivity need: --gram, and the model runs backward, too",
    )
    calibrate.set_defaults(run=_calibrate)

    reconstruct = commands.add_parser(
        "reconstruct",
        help="bring a pruned checkpoint back towards the dense one",
        description="Re-solve the down projections of a pruned checkpoint in order, so that its layers' outputs follow the"
        " dense model's on a text. Loads both models.",
    )
    reconstruct.add_argument("pruned", help="model folder or Hub id")
    reconstruct.add_argument(
        "--dense", required=True, metavar="MODEL", help="the model before pruning: folder or Hub id"
    )
    reconstruct.add_argument("--text", nargs="+", required=True, metavar="FILE", help="UTF-8 texts")
    reconstruct.add_argument(
        "--windows",
        type=int,
        default=32,
        metavar="N",
        help="windows of 512 tokens from each text (default: %(default)s)",
    )
    reconstruct.add_argument(
        "--out", required=True, metavar="FOLDER", help="where to write; must not exist or be empty"
    )
    reconstruct.set_defaults(run=_reconstruct)

    info = commands.add_parser(
        "info",
        help="widths, sizes, alignment",
        description="Widths, ratios, parameters, bytes, alignment and tensor-parallel ranks, read from the config alone.",
    )
    info.add_argument("model", help="model folder or Hub id")
    info.set_defaults(run=_info)

    bench = commands.add_parser(
        "bench",
        help="latency, memory and energy of a model at several widths",
        description="Measure a model dense, pruned to the study's exact width and to the nearest multiple of 128, patched and"
        " not: TTFT, TPOT, TTLT, tokens/s, peak memory and J/token at forced length.",
    )
    bench.add_argument("model", nargs="?", help="model folder or Hub id")
    bench.add_argument(
        "--random", metavar="NAME", help="random weights of the shapes of llama-3.2-1b, llama-3.2-3b, ..."
    )
    bench.add_argument("--device", help="default: cuda where there is one, otherwise cpu")
    bench.add_argument(
        "--pruning-ratio", type=float, nargs="+", metavar="P", help="shares of the neurons to remove (default: 0.4)"
    )
    bench.add_argument(
        "--decoding",
        nargs="+",
        choices=("generate", "compiled", "graph"),
        help="plain generate, a compiled step, a CUDA graph of the step (default: all that the device has)",
    )
    bench.add_argument("--preset", choices=("paper",), help="the study's workloads, widths, seeds and idle calibration")
    shape = bench.add_argument_group("without a preset")
    shape.add_argument("--batch", type=int, nargs="+", metavar="B", help="default: 1 8")
    shape.add_argument("--prompt", type=int, nargs="+", metavar="N", help="tokens (default: 128 1024)")
    shape.add_argument("--new-tokens", type=int, metavar="N", help="forced length (default: 64)")
    bench.add_argument(
        "--out", default="bench_output", metavar="FOLDER", help="records are appended there (default: %(default)s)"
    )
    bench.set_defaults(run=_bench)

    report = commands.add_parser(
        "report",
        help="tables and plots from records or a study",
        description="Tables and plots from records of measurements, or what got worse between two runs. Of a study's folder:"
        " scores, findings and correlations, and scores against J/token and TPOT where records are given after it.",
    )
    report.add_argument("paths", nargs="*", metavar="PATH", help="file or folder of records (*.jsonl), or a study")
    report.add_argument(
        "--out",
        metavar="FOLDER",
        help="where to write (default: beside the first PATH; published_output with --published)",
    )
    report.add_argument(
        "--published",
        action="store_true",
        help="explain the published latencies and energies of arXiv 2512.22671: output length, time and joules per token",
    )
    report.add_argument(
        "--compare",
        nargs=2,
        metavar=("OLD", "NEW"),
        help="two files or folders: tell what changed by more than its spread; exit code 1 if anything got worse",
    )
    report.set_defaults(run=_report)

    evaluate = commands.add_parser(
        "eval",
        help="score one model with lm-eval",
        description="Score one model on the tasks of the study. Results already in the folder are not made again.",
    )
    evaluate.add_argument("model", help="model folder or Hub id")
    _add_evaluation_options(evaluate, "eval_output")
    evaluate.set_defaults(run=_eval)

    study = commands.add_parser(
        "study",
        help="score models at several widths with lm-eval",
        description="Score models, dense and pruned: models x ratios x scores x tasks. A study that was killed goes on"
        " where it was when the same command is given again.",
    )
    study.add_argument("models", nargs="+", metavar="MODEL", help="model folders or Hub ids")
    study.add_argument(
        "--ratios",
        nargs="*",
        type=float,
        default=[0.1, 0.2, 0.3, 0.4, 0.5, 0.6],
        metavar="P",
        help="shares of the neurons to remove (default: those of arXiv 2512.22671)",
    )
    study.add_argument(
        "--scores",
        nargs="+",
        default=["maw"],
        metavar="SCORE",
        help="as of prune; +compensate after it re-solves down_proj (default: %(default)s)",
    )
    study.add_argument("--multiple-of", type=int, default=1, metavar="N", help="of the widths (default: exact widths)")
    study.add_argument(
        "--calibration",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="texts for calibrated scores and +compensate",
    )
    study.add_argument(
        "--calibration-windows",
        type=int,
        default=128,
        metavar="N",
        help="windows of 512 tokens from each text (default: %(default)s)",
    )
    _add_evaluation_options(study, "study_output")
    study.set_defaults(run=_study)

    demo = commands.add_parser(
        "demo",
        help="narrow a small real model and look at the result",
        description="Narrow a real model step by step: quality and speed against width, as a table and a picture.",
    )
    demo.add_argument("--model", help="model folder or Hub id (default: SmolLM2-135M-Instruct from its PyPI wheel)")
    demo.add_argument("--out", default="demo_output", metavar="FOLDER", help="default: %(default)s")
    demo.set_defaults(run=_demo)

    for command in (prune, sample, calibrate, reconstruct, info, bench, evaluate, study, report, demo):
        command.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns what it returns (0 for None), or 2 after one clear line on bad input."""
    parsed = _parser().parse_args(arguments)
    try:
        return parsed.run(parsed) or 0
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        print(f"gluprune {parsed.command}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
