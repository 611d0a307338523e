"""Greedy decoding with vLLM's `LLM`, in a process of its own: reads token ids, prints what it generated.

`python -m serving.offline FOLDER TOKENS [OPTIONS] < prompts.json`, with options of `LLM` as JSON.
"""

from __future__ import annotations

import json
import sys
from typing import Any


def generate(folder: str, prompts: list[list[int]], tokens: int, **options: Any) -> list[dict[str, Any]]:
    """Return `ids` and `logprobs` of the tokens that follow each prompt."""
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    llm = LLM(folder, dtype="float32", max_model_len=512, max_num_seqs=8, **options)
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, logprobs=1)
    outputs = [output.outputs[0] for output in llm.generate([{"prompt_token_ids": ids} for ids in prompts], sampling)]
    return [
        {
            "ids": list(output.token_ids),
            "logprobs": [each[token].logprob for each, token in zip(output.logprobs, output.token_ids, strict=True)],
        }
        for output in outputs
    ]


if __name__ == "__main__":
    options = json.loads(sys.argv[3]) if len(sys.argv) > 3 else {}
    found = generate(sys.argv[1], json.load(sys.stdin), int(sys.argv[2]), **options)
    print("\n" + json.dumps(found))
