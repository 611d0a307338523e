"""Config of a Llama whose layers have different widths, in the Nemotron-NAS (DeciLM) format.

Written by `gluprune export` (Apache-2.0). transformers runs this file only with `trust_remote_code=True`.
"""

from transformers import LlamaConfig


class _Block(dict):
    """A dict whose keys are also attributes, as servers read them; it stays JSON."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class DeciLMConfig(LlamaConfig):
    """A Llama config with one entry of `block_configs` for each layer."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs=None, **options):
        self.block_configs = [
            _Block({part: _Block(entries) for part, entries in block.items()}) for block in block_configs or []
        ]
        super().__init__(**options)

    @property
    def layer_widths(self):
        """Intermediate size of every layer."""
        return [ffn_width(block["ffn"], self.hidden_size) for block in self.block_configs]


def ffn_width(ffn, hidden_size):
    """Return the intermediate size of one layer: given, or computed from `ffn_mult` as servers do."""
    if "intermediate_size" in ffn:
        return ffn["intermediate_size"]
    return -(-int(2 * ffn["ffn_mult"] * hidden_size / 3) // 256) * 256
