"""Loading looks at what it loaded: every tensor, and the class of the checkpoint."""

import json
import random
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import gluprune
from gluprune.checkpoints.info import info
from gluprune.checkpoints.stream import prune_checkpoint
from gluprune.io.shards import SINGLE_FILE
from tests.helpers.tiny_models import make_tiny_model

CLASSES = ["LlamaForSequenceClassification", "LlamaForTokenClassification", "LlamaForQuestionAnswering", "LlamaModel"]
IDS = torch.tensor([[5, 9, 33, 2]])
EMBEDDING, DOWN = "model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path):
    make_tiny_model(seed=1).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder, change):
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / SINGLE_FILE).items()}
    save_file(change(tensors), folder / SINGLE_FILE, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda t: {n: x for n, x in t.items() if n != DOWN}, f"LlamaForCausalLM: it lacks {DOWN}$"),
        (lambda t: {**t, "model.stranger": torch.ones(2)}, "it has unexpected model.stranger$"),
        (
            lambda t: {**t, DOWN: torch.ones(32, 100)},
            rf"it has mis-shaped {DOWN} \(\[32, 100\] instead of \[32, 101\]\)",
        ),
        (lambda t: {n: x for n, x in t.items() if ".mlp." not in n}, r"down_proj.weight.* and 6 more$"),
        (lambda t: {"_orig_mod." + n: x for n, x in t.items()}, "it lacks .*; it has unexpected _orig_mod."),
    ],
    ids=["missing", "unexpected", "mis-shaped", "many", "prefix"],
)
@pytest.mark.parametrize("layers", [None, [1]], ids=["one width", "several"])
def test_tensors_that_do_not_belong(folder, damage, message, layers):
    if layers:
        model = gluprune.load(folder)
        gluprune.prune(model, intermediate_size=64, layers=[0, 2], multiple_of=1)
        shutil.rmtree(folder)
        gluprune.save(model, folder)
    change(folder, damage)
    with pytest.raises(ValueError, match=f"model does not hold the weights of .*{message}"):
        gluprune.load(folder)


@pytest.mark.parametrize("layers", [None, [1]], ids=["one width", "several"])
def test_entries_of_the_config_as_in_stock_transformers(folder, tmp_path, layers):
    model = gluprune.load(folder)
    gluprune.prune(model, intermediate_size=64, layers=layers, multiple_of=1)
    gluprune.save(model, tmp_path / "pruned")
    given = {"use_cache": False, "attention_dropout": 0.25, "attn_implementation": "eager", "dtype": torch.float16}
    found = gluprune.load(tmp_path / "pruned", **given)
    assert (found.config.use_cache, found.config.attention_dropout) == (False, 0.25)
    assert found.model.layers[0].self_attn.attention_dropout == 0.25
    assert (found.config._attn_implementation, found.dtype) == ("eager", torch.float16)
    if layers is None:
        stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", **given)
        assert found.config.to_dict() == stock.config.to_dict()


@pytest.mark.parametrize("call", [gluprune.load, gluprune.info])
def test_a_model_where_its_path_is_expected(call):
    with pytest.raises(TypeError, match="expected a folder or a Hub id, got LlamaForCausalLM"):
        call(make_tiny_model())


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_dtype_is_that_of_the_weights(tmp_path, name):
    make_tiny_model(seed=1, dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    for given, expected in (("auto", torch.bfloat16), ("float32", torch.float32), (torch.float16, torch.float16)):
        found = gluprune.load(tmp_path / "model", **{name: given})
        assert found.dtype == found.config.dtype == expected


def test_what_is_no_model_is_not_saved(folder, tmp_path):
    with pytest.raises(TypeError, match="model must be a model of transformers, got Linear"):
        gluprune.save(torch.nn.Linear(2, 2), tmp_path / "saved")
    with pytest.raises(TypeError, match="tokenizer must have save_pretrained, got str"):
        gluprune.save(gluprune.load(folder), tmp_path / "saved", "narrow")
    assert not (tmp_path / "saved").exists()


def test_what_stock_transformers_leaves_out_is_no_error(tmp_path):
    """Tied heads, and frequencies that older checkpoints hold."""
    make_tiny_model(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / SINGLE_FILE)
    gluprune.load(tmp_path / "tied")
    head = load_file(tmp_path / "tied" / SINGLE_FILE)[EMBEDDING].clone()
    change(tmp_path / "tied", lambda t: {**t, "lm_head.weight": head})
    gluprune.load(tmp_path / "tied")
    change(tmp_path / "tied", lambda t: {**t, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    gluprune.load(tmp_path / "tied")


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("layers", [None, [1]], ids=["one width", "several"])
def test_the_class_is_kept(folder, tmp_path, name, layers):
    """In memory and on disk, with all of its own weights."""
    stock = getattr(transformers, name)
    model = stock.from_pretrained(folder)
    model.save_pretrained(tmp_path / "source")
    prune_checkpoint(tmp_path / "source", tmp_path / "disk", intermediate_size=64, multiple_of=1, layers=layers)
    loaded = gluprune.load(tmp_path / "source")
    assert type(loaded) is stock
    gluprune.prune(loaded, intermediate_size=64, multiple_of=1, layers=layers)
    gluprune.save(loaded, tmp_path / "memory")
    for place in ("disk", "memory"):
        assert json.loads((tmp_path / place / "config.json").read_text())["architectures"] == [name]
        again = gluprune.load(tmp_path / place)
        assert type(again) is stock
        expected = loaded.state_dict()
        assert again.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in again.state_dict().items())
    assert info(tmp_path / "disk").parameters == sum(parameter.numel() for parameter in loaded.parameters())


@pytest.mark.parametrize("architectures", [None, [], ["Mine"], ["AutoModel"], ["GPT2LMHeadModel"], ["torch"]])
def test_a_class_that_is_not_of_the_family_is_the_causal_lm(folder, architectures):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": architectures}))
    assert type(gluprune.load(folder)).__name__ == "LlamaForCausalLM"


@pytest.mark.parametrize("name", CLASSES)
def test_statistics_of_other_classes(folder, tmp_path, name):
    """What `prune --calibration` computes: a reward model keeps its head."""
    getattr(transformers, name).from_pretrained(folder).save_pretrained(tmp_path / "source")
    model = gluprune.load(tmp_path / "source")
    gluprune.calibrate(model, [IDS]).save(tmp_path / "statistics")
    arguments = dict(pruning_ratio=0.4, multiple_of=1, score="hybrid", compensate=True)
    prune_checkpoint(tmp_path / "source", tmp_path / "out", **arguments, statistics=tmp_path / "statistics")
    again = gluprune.load(tmp_path / "out")
    for key, tensor in model.state_dict().items():
        assert ".mlp." in key or torch.equal(again.state_dict()[key], tensor)
    if name != "LlamaModel":
        return
    with pytest.raises(ValueError, match="needs a model with a language-model head, but LlamaModel has none"):
        gluprune.calibrate(model, [IDS], sensitivity=True)
    with pytest.raises(ValueError, match="sampling text needs a model with a language-model head"):
        gluprune.sample_text(model, None)


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"num_attention_heads": "four"}, "rejects the config of .*model: .*'num_attention_heads'.* got str"),
        ({"dtype": "bfloat61"}, "rejects the config of .*model: AttributeError: .*bfloat61"),
        ({"text_config": "none"}, "rejects the config of .*model: TypeError: text_config is 'none', not a config"),
        ({"hidden_act": "swish2"}, "builds no model from the config: KeyError: 'swish2'"),
        ({"architectures": 3}, "builds no model from the config: TypeError"),
        ({"head_dim": -1}, "builds no model from the config: RuntimeError"),
    ],
)
def test_values_that_transformers_does_not_expect(folder, entries, message):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | entries))
    for command in (info, gluprune.load):
        with pytest.raises(ValueError, match=message):
            command(folder)


def test_random_values_in_the_config(folder):
    """Whatever a value is replaced by, bad input is a ValueError."""
    rng = random.Random()
    config = json.loads((folder / "config.json").read_text())
    values = ["x", "", -1, 0, 3, None, [], {}, [1], [None], {"a": 1}, 1.5, True, 10**30]
    names = [*config, "text_config", "quantization_config", "per_layer_config", "layer_types", "head_dim"]
    rejected = 0
    for _ in range(200):
        changed = config | {rng.choice(names): rng.choice(values)}
        (folder / "config.json").write_text(json.dumps(changed))
        try:
            info(folder)
        except ValueError:
            rejected += 1
        except Exception as error:
            pytest.fail(f"{changed}: {error!r}")
    assert rejected > 20
