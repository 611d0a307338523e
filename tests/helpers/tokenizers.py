"""A tokenizer for tiny models."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast


def byte_tokenizer():
    """One token per byte, and three special ones: 259 in all."""
    special = ["<|pad|>", "<|begin|>", "<|end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = dict(zip(("pad_token", "bos_token", "eos_token"), special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def begins_texts(tokenizer):
    """Make a tokenizer begin every text with its BOS, as those of Llama 3 and Gemma do; return it."""
    begin, number = tokenizer.bos_token, tokenizer.bos_token_id
    single, pair = f"{begin} $A", f"{begin} $A {begin} $B"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single, pair, [(begin, number)])
    return tokenizer
