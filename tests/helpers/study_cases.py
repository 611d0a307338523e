"""A small local data folder, a small model with a tokenizer, and an lm-eval model that needs neither."""

import gzip
import hashlib
import json

from lm_eval.api.model import LM
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.conftest import make_tiny_model

WORDS = [f"w{number}" for number in range(60)]


def words(*key):
    """A sentence of eight words that depends on the key."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return " ".join(WORDS[byte % 60] for byte in digest[:8])


def rows(task, count=6):
    """`count` documents of an lm-eval task, with the fields of its data set, by split."""
    numbers = range(count)
    choices = [[words(task, n, c) for c in range(4)] for n in numbers]
    if task == "arc_challenge":
        made = [
            {
                "id": f"q{n}",
                "question": words(task, n),
                "choices": {"text": choices[n], "label": list("ABCD")},
                "answerKey": "ABCD"[n % 4],
            }
            for n in numbers
        ]
        return {"test": made}
    if task == "hellaswag":
        made = [
            {
                "ind": n,
                "activity_label": "w1 w2",
                "ctx_a": words(task, n, "a"),
                "ctx_b": words(task, n, "b"),
                "ctx": "",
                "endings": choices[n],
                "label": str(n % 4),
            }
            for n in numbers
        ]
        return {"validation": made}
    if task == "gsm8k":
        return {
            split: [{"question": words(task, split, n), "answer": f"{words(n)}\n#### {n}"} for n in range(size)]
            for split, size in (("test", count), ("train", 8))
        }
    if task == "wikitext":
        return {"test": [{"page": f" = {words(task, n)} = \n {words(n, task)} "} for n in numbers]}
    if task == "lambada_openai":
        return {"test": [{"text": f"{words(task, n)} {words(n)}"} for n in numbers]}
    if task == "ifeval":
        instructions = [
            ("punctuation:no_comma", {}),
            ("length_constraints:number_words", {"num_words": 2, "relation": "at least"}),
        ]
        made = [
            {
                "key": n,
                "prompt": words(task, n),
                "instruction_id_list": [instructions[n % 2][0]],
                "kwargs": [instructions[n % 2][1]],
            }
            for n in numbers
        ]
        return {"train": made}
    raise KeyError(task)


PLACES = {
    ("arc_challenge", "test"): "arc_challenge/test.jsonl",
    ("hellaswag", "validation"): "hellaswag/validation.jsonl.gz",
    ("gsm8k", "test"): "gsm8k/test.jsonl",
    ("gsm8k", "train"): "gsm8k/train.jsonl",
    ("wikitext", "test"): "wikitext/test.jsonl",
    ("lambada_openai", "test"): "lambada_openai/test.jsonl",
    ("ifeval", "train"): "ifeval/train.jsonl",
}


def write_data(folder, count=6):
    """The documents of all tasks that `rows` knows, as local files."""
    for (task, split), name in PLACES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows(task, count)[split])
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return folder


def save_tiny_model(folder, seed=1, **config):
    """Save a random llama with a tokenizer that has one token per word."""
    model = make_tiny_model(seed=seed, **{"max_position_embeddings": 512, **config})
    model.save_pretrained(folder)
    vocabulary = {word: number + 3 for number, word in enumerate(WORDS)} | {"<pad>": 0, "<s>": 1, "</s>": 2}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder


class OracleLM(LM):
    """An lm-eval model whose answers depend only on the request; `seen` keeps all requests."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def _number(self, request):
        self.seen.append((request.request_type, request.args))
        digest = hashlib.sha256(repr(request.args).encode()).digest()
        return int.from_bytes(digest[:4], "big") / 2**32

    def loglikelihood(self, requests):
        return [(-10 * self._number(request), False) for request in requests]

    def loglikelihood_rolling(self, requests):
        return [-100 * self._number(request) for request in requests]

    def generate_until(self, requests):
        return [f"w1 w2 #### {int(10 * self._number(request))}" for request in requests]

    def tok_encode(self, text, **_):
        return text.split()
