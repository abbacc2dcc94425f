"""Fast-dLLM v2 (Wu et al., Fast-dLLM v2: Efficient Block-Diffusion LLM, arXiv 2509.26328).

A Qwen2.5 transformer with biases on queries, keys and values. Attention is block-causal: full in a block, causal
between blocks. It was trained on from an autoregressive model and kept its shift: the row of a position predicts the
next position's token, and the last row of a block the first token of the next.
"""

from __future__ import annotations

from fdpp.models.fast_dllm_config import FastDLLMConfig
from fdpp.models.qwen import QwenBlock, QwenLM, QwenTransformer


class FastDLLMBlock(QwenBlock):
    biased = True


class FastDLLMTransformer(QwenTransformer):
    """The transformer up to its final norm."""

    config_class = FastDLLMConfig
    block_class = FastDLLMBlock
    _no_split_modules = ("FastDLLMBlock",)


class FastDLLMModelLM(QwenLM):
    """Fast-dLLM v2 with its language-model head and `generate`."""

    config_class = FastDLLMConfig
    transformer_class = FastDLLMTransformer
    published = "Fast_dLLM_QwenForCausalLM"
    shift = 1
    block_causal = True
    anchored = True
    default_sub_block_length = 8
    _no_split_modules = ("FastDLLMBlock",)
    model: FastDLLMTransformer
