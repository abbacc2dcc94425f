"""LLaDA's configuration, with the keys of the published `config.json`."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

from fdpp.models.rope import theta_of

IMPLEMENTED = {
    "block_type": ("llama",),
    "block_group_size": (1,),
    "activation_type": ("silu",),
    "layer_norm_type": ("rms",),
    "layer_norm_with_affine": (True,),
    "attention_layer_norm": (False,),
    "input_emb_norm": (False,),
    "scale_logits": (False,),
    "rope": (True,),
    "alibi": (False,),
    "include_bias": (False,),
    "include_qkv_bias": (False,),
    "bias_for_layer_norm": (False, None),
    "clip_qkv": (None,),
    "attention_dropout": (0.0,),
    "residual_dropout": (0.0,),
    "embedding_dropout": (0.0,),
    "rope_scaling": (None,),
    "yarn": (False, None),
}
"""Options of the published configuration that change the architecture, with the values this package implements."""

TOKEN_IDS = {"mask_token_id": 126336, "eos_token_id": 126081, "pad_token_id": 126081, "eot_token_id": 126348}
"""LLaDA's special tokens: the mask, the end of the text, padding, and the end of a turn of a chat."""

BLOCKS_TP_PLAN = {
    "transformer.blocks.*.q_proj": "colwise",
    "transformer.blocks.*.k_proj": "colwise",
    "transformer.blocks.*.v_proj": "colwise",
    "transformer.blocks.*.attn_out": "rowwise",
    "transformer.blocks.*.ff_proj": "colwise",
    "transformer.blocks.*.up_proj": "colwise",
    "transformer.blocks.*.ff_out": "rowwise",
}
"""Tensor parallelism as transformers' `tp_plan`: heads and hidden units of the blocks are sharded."""


class LLaDAConfig(PretrainedConfig):
    """Shape and token ids of a LLaDA model.

    The arguments have the names of the published `config.json` (GSAI-ML/LLaDA-8B-Base, -Instruct, LLaDA-1.5), so such
    a file loads as it is; those of `attribute_map`, which are transformers', will do as well. Defaults are those of
    LLaDA-8B:

    - `d_model`: 4096; `n_layers`, `n_heads`: 32; `max_sequence_length`: 4096;
    - `n_kv_heads`: `n_heads`, or 1 with `multi_query_attention`; `mlp_hidden_size`: `mlp_ratio * d_model`;
    - `embedding_size`, the rows of the embedding and of the head: `vocab_size`;
    - `mask_token_id`, `eos_token_id`, `pad_token_id`, `eot_token_id`: LLaDA's, or None if the vocabulary is too small.

    Raises:
        ValueError: sizes that do not fit; two names of one size with different values; an option that changes the
            architecture and is not implemented, with its name, its value and what is implemented; experts, as
            LLaDA-MoE has them.
    """

    model_type = "llada"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {  # noqa: RUF012
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "intermediate_size": "mlp_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "initializer_range": "init_std",
    }

    def __init__(
        self,
        vocab_size: int = 126464,
        embedding_size: int | None = None,
        d_model: int | None = None,
        n_layers: int | None = None,
        n_heads: int | None = None,
        n_kv_heads: int | None = None,
        multi_query_attention: bool | None = None,
        mlp_hidden_size: int | None = None,
        mlp_ratio: int = 4,
        max_sequence_length: int | None = None,
        rope_theta: float | None = None,
        rms_norm_eps: float = 1e-5,
        init_std: float = 0.02,
        weight_tying: bool = False,
        **kwargs: Any,
    ) -> None:
        experts = [key for key in kwargs if ("expert" in key or key.startswith("moe_")) and kwargs[key]]
        if experts:
            named = ", ".join(f"{key}={kwargs[key]!r}" for key in sorted(experts))
            raise ValueError(f"LLaDA config: expected a dense LLaDA, got experts, as LLaDA-MoE has them: {named}")
        for option, implemented in IMPLEMENTED.items():
            if option in kwargs and kwargs[option] not in implemented:
                expected = " or ".join(repr(value) for value in implemented)
                raise ValueError(f"LLaDA config: {option}={kwargs[option]!r} is not implemented, expected {expected}")
        sizes: dict[str, Any] = {
            "d_model": d_model,
            "n_layers": n_layers,
            "n_heads": n_heads,
            "n_kv_heads": n_kv_heads,
            "mlp_hidden_size": mlp_hidden_size,
            "max_sequence_length": max_sequence_length,
        }
        for alias, name in self.attribute_map.items():
            if name not in sizes:
                continue
            value = kwargs.pop(alias, None)
            if value is not None and sizes[name] not in (None, value):
                raise ValueError(f"LLaDA config: {alias}={value} contradicts {name}={sizes[name]}")
            sizes[name] = sizes[name] if value is None else value
        given = {name: value for name, value in sizes.items() if value is not None}
        self.vocab_size = vocab_size
        self.d_model: int = given.get("d_model", 4096)
        self.n_layers: int = given.get("n_layers", 32)
        self.n_heads: int = given.get("n_heads", 32)
        self.n_kv_heads: int = given.get("n_kv_heads", 1 if multi_query_attention else self.n_heads)
        self.mlp_hidden_size: int = given.get("mlp_hidden_size", mlp_ratio * self.d_model)
        self.max_sequence_length: int = given.get("max_sequence_length", 4096)
        if multi_query_attention and self.n_kv_heads != 1:
            raise ValueError(
                f"LLaDA config: multi_query_attention means n_kv_heads=1, got n_kv_heads={self.n_kv_heads}"
            )
        if min(vocab_size, self.d_model, self.n_layers, self.n_heads, self.n_kv_heads) < 1:
            raise ValueError(
                f"LLaDA config: expected sizes of at least 1, got vocab_size={vocab_size}, d_model={self.d_model}, "
                f"n_layers={self.n_layers}, n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}"
            )
        if self.d_model % self.n_heads or self.n_heads % self.n_kv_heads:
            raise ValueError(
                "LLaDA config: expected n_heads to divide d_model and n_kv_heads to divide n_heads, "
                f"got d_model={self.d_model}, n_heads={self.n_heads}, n_kv_heads={self.n_kv_heads}"
            )
        head_size = self.d_model // self.n_heads
        if head_size % 2:
            raise ValueError(f"LLaDA config: rotary embedding needs an even head size, got {head_size}")
        self.embedding_size = vocab_size if embedding_size is None else embedding_size
        if self.embedding_size < vocab_size:
            raise ValueError(f"LLaDA config: embedding_size={embedding_size} is below vocab_size={vocab_size}")
        self.rope_theta = theta_of("LLaDA", rope_theta, 500000.0, kwargs)
        self.rms_norm_eps = rms_norm_eps
        self.init_std = init_std
        self.weight_tying = weight_tying
        ids = {name: kwargs.pop(name, token if token < vocab_size else None) for name, token in TOKEN_IDS.items()}
        self.mask_token_id, self.eot_token_id = ids.pop("mask_token_id"), ids.pop("eot_token_id")
        # The head is sharded over the vocabulary, and the embedding only where it is the head.
        head = {"transformer.wte": "embedding_rowwise"} if weight_tying else {"transformer.ff_out": "colwise"}
        self.base_model_tp_plan = BLOCKS_TP_PLAN | head
        if kwargs.pop("tie_word_embeddings", weight_tying) != weight_tying:
            raise ValueError(f"LLaDA config: tie_word_embeddings contradicts weight_tying={weight_tying}")
        super().__init__(tie_word_embeddings=weight_tying, **ids, **kwargs)


AutoConfig.register("llada", LLaDAConfig, exist_ok=True)
