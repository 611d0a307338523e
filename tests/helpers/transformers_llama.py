"""Run transformers' tests of the Llama model, stock and patched; fail if a test passes stock but fails patched.

    python tests/transformers_llama.py FOLDER [--backend triton] [-k EXPRESSION]

FOLDER is a transformers source tree of the installed version, from its repository (its Llama test file is run) or its
source distribution, which has only the common model tests (they are run on Llama). Nothing is downloaded; the tests
need the package `parameterized`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import types
import unittest
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Tests that are expected to fail when patched, and why.
EXPECTED = {"test_load_contiguous_weights": "the rows of a down projection of a padded width have gaps between them"}

LLAMA_TESTS = Path("tests/models/llama/test_modeling_llama.py")
COMMON_TESTS = Path("tests/test_modeling_common.py")


def common_llama_test():
    """The common model tests on small Llama models. Mixins that a source distribution lacks are empty."""
    for name, mixin in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        module = types.ModuleType(f"tests.{name}")
        setattr(module, mixin, type(mixin, (), {}))
        package = types.ModuleType(f"tests.{name.split('.')[0]}")
        package.__path__ = []
        sys.modules.update({package.__name__: package, module.__name__: module})
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

    from tests.test_modeling_common import ModelTesterMixin, ids_tensor

    class Tester:
        is_training = True
        batch_size, seq_length, num_hidden_layers, hidden_size, num_attention_heads = 3, 7, 2, 32, 4

        def get_config(self):
            return LlamaConfig(
                vocab_size=99,
                hidden_size=32,
                intermediate_size=37,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                pad_token_id=0,
            )

        def prepare_config_and_inputs_for_common(self):
            ids = ids_tensor([self.batch_size, self.seq_length], 99)
            return self.get_config(), {"input_ids": ids, "attention_mask": ids.new_ones(ids.shape)}

    class LlamaModelTest(ModelTesterMixin, unittest.TestCase):
        all_model_classes = (LlamaModel, LlamaForCausalLM, LlamaForSequenceClassification)

        def setUp(self):
            self.model_tester = Tester()

    return LlamaModelTest


def patch_every_model(backend):
    """Patch every Llama model when it is built."""
    from transformers.activations import ACT2FN
    from transformers.models.llama import modeling_llama

    from gluprune.runtime.patching import FusedGLU, patch

    build_mlp, build_model = modeling_llama.LlamaMLP.__init__, modeling_llama.LlamaPreTrainedModel.post_init

    def build_silu_mlp(mlp, config):  # the common test configurations use gelu, which no Llama has
        build_mlp(mlp, config)
        mlp.act_fn = ACT2FN["silu"]

    def build_patched_model(model):
        build_model(model)
        if backend != "stock":
            patch(model, backend)
            assert any(isinstance(module, FusedGLU) for module in model.modules())

    modeling_llama.LlamaMLP.__init__ = build_silu_mlp
    modeling_llama.LlamaPreTrainedModel.post_init = build_patched_model


class Outcomes:
    def __init__(self):
        self.outcomes = {}

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.nodeid.split("::", 1)[1]] = report.outcome


def run_tests(folder, backend, expression, record):
    """Run the tests in this process and write the outcomes to the file `record`."""
    import pytest

    sys.path[:1] = [str(folder)]  # instead of this script's folder
    sys.modules["tests"] = types.ModuleType("tests")  # transformers' tests, even if this repository is on the path
    sys.modules["tests"].__path__ = [str(folder / "tests")]
    patch_every_model(backend)
    target = folder / LLAMA_TESTS
    if not target.exists():
        globals()["LlamaModelTest"] = common_llama_test()
        target = record.with_name("test_modeling_llama.py")
        target.write_text("from __main__ import LlamaModelTest\n")
    results = Outcomes()
    settings = record.with_name("pytest.ini")
    settings.write_text("[pytest]\n")
    options = [
        "-q",
        "--no-header",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        f"--rootdir={target.parent}",
        f"-c{settings}",
    ]
    pytest.main([str(target), *options, *(["-k", expression] if expression else [])], plugins=[results])
    record.write_text(json.dumps(results.outcomes))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=lambda text: Path(text).resolve())
    parser.add_argument("--backend", default="triton", choices=("auto", "triton", "cublas", "torch"))
    parser.add_argument("-k", dest="expression", default="")
    parser.add_argument("--record", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not any((arguments.folder / path).exists() for path in (LLAMA_TESTS, COMMON_TESTS)):
        parser.error(f"{arguments.folder} contains neither {LLAMA_TESTS} nor {COMMON_TESTS}")
    if arguments.run:
        run_tests(arguments.folder, arguments.run, arguments.expression, arguments.record)
        return 0

    outcomes = {}
    with tempfile.TemporaryDirectory() as scratch:
        for run in ("stock", arguments.backend):
            record = Path(scratch, run)
            command = [sys.executable, __file__, str(arguments.folder), "--run", run, "--record", str(record)]
            subprocess.run([*command, "-k", arguments.expression], check=True, cwd=scratch)
            outcomes[run] = json.loads(record.read_text())
    stock, patched = outcomes["stock"], outcomes[arguments.backend]
    passed = [name for name, outcome in stock.items() if outcome == "passed"]
    lost = [name for name in passed if patched.get(name) != "passed"]
    worse = [name for name in lost if name.rpartition("::")[2] not in EXPECTED]
    print(f"{len(passed)} of {len(stock)} tests pass stock; {len(passed) - len(lost)} of these pass patched")
    for name in lost:
        reason = EXPECTED.get(name.rpartition("::")[2])
        print(f"fails patched: {name}" + (f" (expected: {reason})" if reason else ""))
    return 1 if worse or not passed else 0


if __name__ == "__main__":
    sys.exit(main())
