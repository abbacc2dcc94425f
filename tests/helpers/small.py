"""Small random models whose confidences spread over (0, 1), for tests that need a model but not a trained one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fdpp
from fdpp import (
    DreamConfig,
    DreamModelLM,
    FastDLLMConfig,
    FastDLLMModelLM,
    LLaDA2Config,
    LLaDA2ModelLM,
    LLaDAConfig,
    LLaDAModelLM,
    SDARConfig,
    SDARModelLM,
)
from fdpp.models.block import Block
from fdpp.models.language_model import DiffusionLM

V, PAD, MASK, EOS = 64, 61, 62, 63
RULES = (
    fdpp.Quota(),
    fdpp.Quota(2),
    fdpp.Threshold(0.6),
    fdpp.Factor(1.0),
    fdpp.Frechet(0.1),
    fdpp.EntropyBound(0.5),
    fdpp.LocalLeap(0.6, 0.3),
    fdpp.Budget(0.6, 0.5, 0.2, 0.3),
    fdpp.Klass(0.3, 0.5, 1),
    fdpp.Dawn(tau_sink=0.1, tau_edge=0.05, tau_low=0.3, tau_high=0.6, tau_induce=0.4),
)
"""At least one of each kind, with numbers that make these models commit some positions of a block and not others."""


def small_model(seed: int = 0, **config: Any) -> LLaDAModelLM:
    """Two layers, 64 tokens; the same seed and configuration give the same weights."""
    sizes = {"vocab_size": V, "d_model": 32, "n_layers": 2, "n_heads": 4, "mlp_hidden_size": 48, "init_std": 0.5}
    ids = {"mask_token_id": MASK, "eos_token_id": EOS, "pad_token_id": PAD}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LLaDAModelLM(LLaDAConfig(**{**sizes, **ids, "max_sequence_length": 256, **config})).eval()


def small_dream(seed: int = 0, **config: Any) -> DreamModelLM:
    """`small_model` of Dream's architecture, with biases that count."""
    sizes = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 48, "initializer_range": 0.5}
    ids = {"mask_token_id": MASK, "eos_token_id": EOS, "pad_token_id": PAD}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DreamModelLM(DreamConfig(**{**sizes, **ids, "max_position_embeddings": 256, **config})).eval()
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.5)
    return model


def small_sdar(seed: int = 0, **config: Any) -> SDARModelLM:
    """`small_model` of SDAR's architecture: heads of a size of their own, whose norms count."""
    sizes = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 12}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 48, "initializer_range": 0.5, "block_size": 4}
    ids = {"mask_token_id": MASK, "eos_token_id": EOS, "pad_token_id": PAD}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = SDARModelLM(SDARConfig(**{**sizes, **ids, "max_position_embeddings": 256, **config})).eval()
        for name, parameter in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def small_fast_dllm(seed: int = 0, **config: Any) -> FastDLLMModelLM:
    """`small_model` of the architecture of Fast-dLLM v2, with biases that count."""
    sizes = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 48, "initializer_range": 0.5, "bd_size": 8}
    ids = {"mask_token_id": MASK, "eos_token_id": EOS, "pad_token_id": PAD}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FastDLLMModelLM(FastDLLMConfig(**{**sizes, **ids, "max_position_embeddings": 256, **config})).eval()
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                torch.nn.init.normal_(parameter, std=0.5)
    return model


def small_llada2(seed: int = 0, **config: Any) -> LLaDA2ModelLM:
    """`small_model` of LLaDA2's architecture: a dense layer, then one of eight experts, three for a row."""
    sizes = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 48, "initializer_range": 0.5, "block_size": 8}
    sizes |= {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 16, "n_group": 4, "topk_group": 2}
    ids = {"mask_token_id": MASK, "eos_token_id": EOS, "pad_token_id": PAD}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LLaDA2ModelLM(LLaDA2Config(**{**sizes, **ids, "max_position_embeddings": 256, **config})).eval()
        for name, value in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith(("query_layernorm.weight", "key_layernorm.weight")):
                torch.nn.init.uniform_(value, 0.5, 1.5)
            elif name.endswith(".expert_bias"):
                torch.nn.init.normal_(value, std=0.1)
    return model


SMALL = {"LLaDA": small_model, "Dream": small_dream}
"""A small model of every family whose positions all see each other, by name."""

BLOCK_CAUSAL = {"SDAR": small_sdar, "Fast-dLLM v2": small_fast_dllm, "LLaDA2": small_llada2}
"""A small model of every block-causal family, by name."""


def exact_model(seed: int = 0, **config: Any) -> LLaDAModelLM:
    """`small_model` that computes in float64, so that no rounding of a batched matmul can decide a commit."""
    model = small_model(seed, **config)
    make_exact(model)
    return model


def exact(family: str, seed: int = 0, **config: Any) -> DiffusionLM:
    """`exact_model` of a family in `SMALL` or `BLOCK_CAUSAL`."""
    model = (SMALL | BLOCK_CAUSAL)[family](seed, **config)
    make_exact(model)
    return model


def make_exact(model: DiffusionLM) -> None:
    model.double()
    model.project = lambda hidden: type(model).project(model, hidden).float()


def name_of(root: nn.Module, held: nn.Module | nn.Parameter) -> str:
    """Where `root` holds a layer or a parameter."""
    every = root.named_parameters() if isinstance(held, nn.Parameter) else root.named_modules()
    return next(name for name, found in every if found is held)


def layer_of(model: DiffusionLM, role: str, block: int = 0) -> Any:
    """A layer of a block, by its role in `fdpp.models.block.Layers`."""
    return getattr(model.model.blocks[block].layers(), role)


def put(block: Block, role: str, layer: nn.Module) -> None:
    """Replace a layer of a block."""
    block.set_submodule(name_of(block, getattr(block.layers(), role)), layer)


def prompts(B: int, P: int, seed: int = 0) -> Tensor:
    """`[B, P]` random ids, none of them special."""
    return torch.randint(0, PAD, (B, P), generator=torch.Generator().manual_seed(seed))


def left_pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Input ids and attention mask `[B, P]` of one-dimensional prompts."""
    P = max(len(row) for row in rows)
    input_ids, attention_mask = torch.full((len(rows), P), PAD), torch.zeros(len(rows), P, dtype=torch.int64)
    for b, row in enumerate(rows):
        input_ids[b, P - len(row) :] = row
        attention_mask[b, P - len(row) :] = 1
    return input_ids, attention_mask
