"""A Llama whose layers have different widths, for transformers.

Written by `gluprune export` (Apache-2.0). transformers runs this file only with `trust_remote_code=True`.
"""

import copy

from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaMLP

from .configuration_decilm import DeciLMConfig


class DeciLMForCausalLM(LlamaForCausalLM):
    """transformers' own Llama; only the widths of its MLPs are set here."""

    config_class = DeciLMConfig

    def __init__(self, config):
        super().__init__(config)
        for layer, width in zip(self.model.layers, config.layer_widths, strict=True):
            own = copy.copy(config)
            own.intermediate_size = width
            layer.mlp = LlamaMLP(own)
        self.post_init()
