"""SDAR (Cheng et al., SDAR: A Synergistic Diffusion-AutoRegression Paradigm, arXiv 2510.06303) and TraDo (Wang et al.,
arXiv 2509.06949), which has the same architecture.

A Qwen3 transformer, without biases, whose queries and keys are normalised head by head. Attention is block-causal: full
in a block, causal between blocks. A masked position's own row predicts its token.
"""

from __future__ import annotations

from fdpp.models.qwen import QwenBlock, QwenLM, QwenTransformer
from fdpp.models.sdar_config import SDARConfig


class SDARBlock(QwenBlock):
    normed = True


class SDARTransformer(QwenTransformer):
    """The transformer up to its final norm."""

    config_class = SDARConfig
    block_class = SDARBlock
    _no_split_modules = ("SDARBlock",)


class SDARModelLM(QwenLM):
    """SDAR or TraDo with its language-model head and `generate`."""

    config_class = SDARConfig
    transformer_class = SDARTransformer
    published = "SDARForCausalLM"
    block_causal = True
    _no_split_modules = ("SDARBlock",)
    model: SDARTransformer
