"""Tiny random vision-language models, one of each kind that is supported."""

import torch
import transformers

TEXT = dict(
    vocab_size=300,
    hidden_size=32,
    intermediate_size=101,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
)


def _llava():
    vision = {**VISION, "model_type": "clip_vision_model", "projection_dim": 32}
    text = {**TEXT, "model_type": "llama"}
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=299)
    return transformers.LlavaForConditionalGeneration(config)


def _gemma3():
    config = transformers.Gemma3Config(
        text_config={**TEXT, "model_type": "gemma3_text"},
        vision_config={**VISION, "model_type": "siglip_vision_model"},
        mm_tokens_per_image=4,
        image_token_index=299,
        boi_token_index=298,
        eoi_token_index=297,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _mistral3():
    vision = {**VISION, "model_type": "pixtral", "head_dim": 16}
    text = {**TEXT, "model_type": "mistral"}
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=299)
    return transformers.Mistral3ForConditionalGeneration(config)


def _qwen_vl(name, **more):
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
    vision = dict(depth=1, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=32, patch_size=14, **more)
    configure, build = (getattr(transformers, f"{name}{kind}") for kind in ("Config", "ForConditionalGeneration"))
    return build(configure(text_config={**TEXT, "rope_parameters": rope}, vision_config=vision))


def _mllama():
    """Layer 1 attends to images, and does not run without one."""
    text = {key: value for key, value in TEXT.items() if key != "head_dim"}
    vision = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_global_layers=1,
        attention_heads=2,
        image_size=28,
        patch_size=14,
        vision_output_dim=64,
        max_num_tiles=1,
        supported_aspect_ratios=[[1, 1]],
        intermediate_layers_indices=[0],
    )
    config = transformers.MllamaConfig(
        text_config={**text, "model_type": "mllama_text_model", "cross_attention_layers": [1]},
        vision_config=vision,
        image_token_index=299,
    )
    return transformers.MllamaForConditionalGeneration(config)


COMPOSITES = {
    "llava": _llava,
    "gemma3": _gemma3,
    "mistral3": _mistral3,
    "qwen2_5_vl": lambda: _qwen_vl("Qwen2_5_VL", fullatt_block_indexes=[0]),
    "qwen3_vl": lambda: _qwen_vl("Qwen3VL", deepstack_visual_indexes=[0]),
    "mllama": _mllama,
}


def composite_model(name, seed=0):
    """A model in eval mode with random weights; biases and gates that start at zero are random, too."""
    torch.manual_seed(seed)
    model = COMPOSITES[name]().eval()
    for parameter in model.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def split(state):
    """The MLP tensors of the text part, and all others, of a state dict."""
    text = {name: tensor for name, tensor in state.items() if "layers." in name and "_proj" in name and "mlp" in name}
    text = {name: tensor for name, tensor in text.items() if "vision" not in name and "visual" not in name}
    return text, {name: tensor for name, tensor in state.items() if name not in text}
