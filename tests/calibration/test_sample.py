"""Calibration text that the model generates itself."""

import json
from collections import Counter

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import gluprune
from gluprune.calibration.sample import sample_text
from gluprune.cli import main
from tests.helpers.tiny_models import make_tiny_model

WORDS = 64  # the vocabulary of the tiny model


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel({f"w{number:02}": number for number in range(WORDS)}, unk_token="w00"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="w01", eos_token="w02")


def ids_of(tokenizer, text: str) -> list[list[int]]:
    return [tokenizer(window).input_ids for window in text.split("\n\n")]


def test_tokens_are_drawn_from_the_whole_distribution(tokenizer):
    """The model's generation config is ignored: token frequencies are those of the softmax."""
    model = make_tiny_model(seed=1)
    model.generation_config.temperature, model.generation_config.top_k = 0.1, 2
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # far from uniform
        expected = model(torch.tensor([[tokenizer.bos_token_id]])).logits[0, 0].double()
    expected[tokenizer.eos_token_id] = -torch.inf
    expected = expected.softmax(0)
    assert expected.max() > 0.04 and expected.sort().values[:10].sum() > 0.01
    windows = 20_000
    found = Counter(first_tokens(model, tokenizer, windows))
    measured = torch.tensor([found[token] / windows for token in range(WORDS)], dtype=torch.float64)
    deviations = (measured - expected).abs() / (expected * (1 - expected) / windows + 1e-12).sqrt()
    assert deviations[expected > 1e-3].max() < 5
    assert measured[tokenizer.eos_token_id] == 0


def first_tokens(model, tokenizer, windows: int) -> list[int]:
    """The first token of every window; the begin-of-text token, which the text omits, can also be drawn."""
    text = sample_text(model, tokenizer, windows, 1, seed=3)
    return [ids[0] if ids else tokenizer.bos_token_id for ids in ids_of(tokenizer, text)]


def test_windows_continue_as_the_model_would(tokenizer):
    """If one token has all the probability, every window is the model's greedy continuation, at full length."""
    model = make_tiny_model(seed=2, initializer_range=1.0)
    model.generation_config.repetition_penalty = 10.0
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
        ids = torch.tensor([[tokenizer.bos_token_id]])
        for _ in range(40):
            logits = model(ids).logits[0, -1]
            logits[tokenizer.eos_token_id] = -torch.inf
            ids = torch.cat([ids, logits.argmax()[None, None]], 1)
    expected = [token for token in ids[0, 1:].tolist() if token not in tokenizer.all_special_ids]
    assert 1 < len(set(expected)) < len(expected), "no repetition to be penalised"
    assert sample_text(model, tokenizer, 3, 40) == "\n\n".join([" ".join(f"w{token:02}" for token in expected)] * 3)


SETTINGS = {
    "min_p": 0.9,
    "typical_p": 0.2,
    "no_repeat_ngram_size": 1,
    "suppress_tokens": [5, 6, 7],
    "forced_bos_token_id": 7,
    "num_beams": 3,
    "num_return_sequences": 2,
    "max_time": 1e-9,
    "stop_strings": ["w0"],
    "return_dict_in_generate": True,
    "prompt_lookup_num_tokens": 2,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_no_setting_of_the_generation_config_changes_the_text(tokenizer, name):
    model = make_tiny_model(seed=6)
    expected = sample_text(model, tokenizer, 2, 16)
    config = model.generation_config
    setattr(config, name, SETTINGS[name])
    before = config.to_dict()
    assert sample_text(model, tokenizer, 2, 16) == expected
    assert model.generation_config is config and config.to_dict() == before


def test_the_generation_config_after_an_error(tokenizer, monkeypatch):
    model = make_tiny_model(seed=6)
    config = model.generation_config
    before = config.to_dict()

    def fails(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.model.layers[1].mlp, "forward", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        sample_text(model, tokenizer, 2, 4)
    assert model.generation_config is config and config.to_dict() == before


def test_every_end_of_text_token_of_the_generation_config_is_left_out(tokenizer):
    """Chat models have several; a window that drew one would end there."""
    model = make_tiny_model(seed=7)
    model.generation_config.eos_token_id = list(range(2, 60))
    found = {token for ids in ids_of(tokenizer, sample_text(model, tokenizer, 50, 8)) for token in ids}
    assert found and found.isdisjoint(range(2, 60))


def test_models_in_wrappers(tokenizer):
    """Compiled, or with adapters: the config is that of the model inside."""
    peft = pytest.importorskip("peft")
    model = make_tiny_model(seed=8)
    expected = sample_text(model, tokenizer, 2, 8)
    config = model.generation_config
    config.min_p = 0.9
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for wrapped in (torch.compile(model, backend="eager"), adapted):
        assert sample_text(wrapped, tokenizer, 2, 8) == expected
        assert model.generation_config is wrapped.generation_config is config and config.min_p == 0.9


def test_seed_mode_and_random_state(tokenizer):
    model = make_tiny_model(seed=3, attention_dropout=0.5)
    in_eval_mode = sample_text(model, tokenizer, 2, 12, seed=1)
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = sample_text(model, tokenizer, 2, 12, seed=1)
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes
    assert one == in_eval_mode == sample_text(model, tokenizer, 2, 12, seed=1)
    assert one != sample_text(model, tokenizer, 2, 12, seed=2)


def test_without_a_begin_of_text_token(tokenizer):
    model = make_tiny_model(seed=4)
    tokenizer.bos_token = None
    assert len(ids_of(tokenizer, sample_text(model, tokenizer, 2, 5))) == 2  # starts from the end-of-text token
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a begin-of-text nor an end-of-text token"):
        sample_text(model, tokenizer, 2, 5)


@pytest.mark.parametrize("given", [{"windows": 0}, {"length": 0}])
def test_bad_numbers(tokenizer, given):
    with pytest.raises(ValueError, match=f"{next(iter(given))} must be at least 1, got 0"):
        sample_text(make_tiny_model(), tokenizer, **given)


def test_command(tokenizer, tmp_path, capsys):
    """The file contains the function's text (float32), is not overwritten, and can be combined with another text."""
    model = make_tiny_model(dtype=torch.bfloat16, seed=5, initializer_range=1.0)
    gluprune.save(model, tmp_path / "model", tokenizer)
    out = tmp_path / "own.txt"
    command = ["sample", str(tmp_path / "model"), "--out", str(out), "--windows", "80", "--length", "16", "--seed", "4"]
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"windows": 80, "tokens": 1280, "file": str(out)}
    if not torch.cuda.is_available():
        assert out.read_text() == sample_text(model.float(), tokenizer, 80, 16, seed=4)
    written = out.read_text()
    assert main(command) == 2 and "must be a new file" in capsys.readouterr().err
    assert out.read_text() == written

    other = tmp_path / "other.txt"
    other.write_text("w07 " * 2000)
    statistics = ["calibrate", str(tmp_path / "model"), "--text", str(out), str(other), "--json"]
    assert main([*statistics, "--out", str(tmp_path / "statistics")]) == 0
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    own = len(tokenizer(written).input_ids)
    assert tokens == 512 * (own // 512 + 2000 // 512)
