"""Vision-language models: their text part is pruned, patched, calibrated and written; the rest stays as it is."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

import gluprune
from gluprune.calibration.collect import calibrate
from gluprune.models.glu import decoder_layers, model_glus, text_configs
from gluprune.runtime.fusion import find_glus
from tests.helpers.composite_models import COMPOSITES, composite_model, split

KINDS = list(COMPOSITES)
WIDTH = 61


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def token_ids():
    return torch.randint(3, 290, (2, 24), generator=torch.Generator().manual_seed(1))


def prune(model, **options):
    return gluprune.prune(model, intermediate_size=WIDTH, multiple_of=1, **options)


def logits(model):
    with torch.no_grad():
        return model(input_ids=token_ids()).logits


def saved(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_the_text_part_is_found(kind):
    model = composite_model(kind)
    glus = model_glus(model)
    assert [glu.mlp for glu in glus] == [layer.mlp for layer in decoder_layers(model)] and len(glus) == 3
    assert [module for _, module in find_glus(model)] == [glu.mlp for glu in glus]


def test_prune_in_memory_leaves_the_other_parts(kind):
    model = composite_model(kind)
    text, others = split({name: tensor.clone() for name, tensor in model.state_dict().items()})
    report = prune(model)
    narrow, same = split(model.state_dict())
    assert_equal(same, others)
    assert len(narrow) == len(text) == 9 and all(WIDTH in tensor.shape for tensor in narrow.values())
    for index, kept in report.kept.items():
        (up,) = (name for name in text if f"layers.{index}.mlp.up_proj" in name)
        assert torch.equal(narrow[up], text[up][kept])
    kind_of_text = type(model.config.get_text_config())
    configs = [module.config for module in model.modules() if type(getattr(module, "config", None)) is kind_of_text]
    assert {config.intermediate_size for config in (model.config.get_text_config(), *configs)} == {WIDTH}
    assert model.config.vision_config.to_dict() == composite_model(kind).config.vision_config.to_dict()


def test_a_part_with_a_copy_of_the_config():
    """Some releases of transformers copy the config of a part when they build it."""
    model = composite_model("llava")
    decoder = model.get_decoder()
    decoder.config = copy.deepcopy(decoder.config)
    prune(model)
    assert decoder.config.intermediate_size == WIDTH == model.config.get_text_config().intermediate_size


def test_a_failed_prune_restores_every_config(kind, unchanged):
    model = composite_model(kind)
    glus = model_glus(model)
    glus[2].down.weight.requires_grad_(False).fill_(torch.nan)
    before = [dict(vars(config)) for config in text_configs(model)]
    with pytest.raises(ValueError, match="layer 2"):
        prune(model)
    assert [dict(vars(config)) for config in text_configs(model)] == before


def test_save_and_load(kind, tmp_path):
    model = composite_model(kind)
    prune(model)
    gluprune.save(model, tmp_path / "out")
    again = gluprune.load(tmp_path / "out")
    assert type(again) is type(model) and torch.equal(logits(again), logits(model))
    assert gluprune.info(tmp_path / "out").widths == [WIDTH] * 3


def test_layers_of_different_widths(kind, tmp_path):
    model = composite_model(kind)
    prune(model, layers=[0, 2])
    gluprune.save(model, tmp_path / "out")
    again = gluprune.load(tmp_path / "out")
    assert type(again) is type(model) and torch.equal(logits(again), logits(model))
    assert gluprune.info(tmp_path / "out").widths == [WIDTH, 101, WIDTH]


@pytest.mark.parametrize("layers", [None, [0, 2]])
def test_on_disk_as_in_memory(kind, layers, tmp_path):
    model = composite_model(kind)
    gluprune.save(model, tmp_path / "source")
    report = gluprune.prune_checkpoint(
        tmp_path / "source", tmp_path / "disk", intermediate_size=WIDTH, multiple_of=1, layers=layers
    )
    expected = prune(model, layers=layers)
    gluprune.save(model, tmp_path / "memory")
    assert_equal(saved(tmp_path / "disk"), saved(tmp_path / "memory"))
    assert report.parameters == expected.parameters and report.original_parameters == expected.original_parameters
    assert torch.equal(logits(gluprune.load(tmp_path / "disk")), logits(model))
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("source", "disk"))
    widths = {key: after["text_config"].pop(key, None) for key in ("intermediate_size", "per_layer_config")}
    for key in widths:
        before["text_config"].pop(key, None)
    assert after == before and widths["intermediate_size"] == (101 if layers else WIDTH)


def test_a_config_that_does_not_nest_the_text_part(tmp_path):
    """As the checkpoints of Qwen2.5-VL were published."""
    model = composite_model("qwen2_5_vl")
    gluprune.save(model, tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    config = json.loads(file.read_text())
    text = config.pop("text_config")
    file.write_text(json.dumps({**text, **config}))
    gluprune.prune_checkpoint(tmp_path / "source", tmp_path / "out", intermediate_size=WIDTH, multiple_of=1)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["intermediate_size"] == WIDTH
    prune(model)
    assert torch.equal(logits(gluprune.load(tmp_path / "out")), logits(model))


def test_statistics_are_those_of_the_text_part(kind):
    model = composite_model(kind)
    layers = [0, 2] if kind == "mllama" else None
    found = calibrate(model, [token_ids()], layers=layers)
    expected = calibrate(decoder_layers_owner(model), [token_ids()], layers=layers)
    for index, statistics in expected.layers.items():
        assert torch.equal(found.layers[index].gram, statistics.gram) and statistics.squares.any()
    report = prune(model, score="hybrid", compensate=True, calibration=found, layers=layers)
    assert report.intermediate_size == WIDTH and logits(model).isfinite().all()


def decoder_layers_owner(model):
    return model.get_decoder()


def test_sensitivities(kind):
    model = composite_model(kind)
    layers = [0, 2] if kind == "mllama" else None
    statistics = calibrate(model, [token_ids()], sensitivity=True, layers=layers)
    assert all(layer.saliency.isfinite().all() for layer in statistics.layers.values())
    prune(model, score="surgeon", compensate=True, calibration=statistics, layers=layers)


@pytest.mark.parametrize("options", [{}, {"sensitivity": True}])
def test_layers_that_attend_to_images_cannot_be_calibrated_on_text(options):
    with pytest.raises(ValueError, match="layer 1 does not run on text: it cannot be calibrated, prune other layers"):
        calibrate(composite_model("mllama"), [token_ids()], **options)


def test_patch_and_unpatch(kind):
    model = composite_model(kind)
    expected, classes = logits(model), [type(module) for module in model.modules()]
    gluprune.patch(model, backend="torch")
    patched = [type(module).__name__ for module in model.modules() if type(module).__name__.startswith("Fused")]
    assert patched == [f"Fused{type(composite_model(kind).get_decoder().layers[0].mlp).__name__}"] * 3
    torch.testing.assert_close(logits(model), expected)
    gluprune.unpatch(model)
    assert [type(module) for module in model.modules()] == classes and torch.equal(logits(model), expected)


def test_a_text_part_that_is_not_supported(tmp_path):
    config = AutoConfig.for_model("llava", text_config={"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4})
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model type 'gpt2' is not supported"):
        gluprune.info(tmp_path)
