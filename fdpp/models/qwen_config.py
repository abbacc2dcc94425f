"""What the configurations of families with Qwen's layers share: sizes, the check of options, tensor parallelism."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig

from fdpp.models.rope import theta_of

LAYERS_TP_PLAN = {
    "layers.*.self_attn.q_proj": "colwise",
    "layers.*.self_attn.k_proj": "colwise",
    "layers.*.self_attn.v_proj": "colwise",
    "layers.*.self_attn.o_proj": "rowwise",
    "layers.*.mlp.gate_proj": "colwise",
    "layers.*.mlp.up_proj": "colwise",
    "layers.*.mlp.down_proj": "rowwise",
}
"""Tensor parallelism as transformers' `tp_plan`: heads and hidden units of the blocks are sharded."""


class QwenConfig(PretrainedConfig):
    """Shape and token ids of a model with Qwen's layers.

    The arguments have the names of the published `config.json`, so such a file loads as it is. Defaults are those of
    the published classes, not of a model: a file names every size. `head_dim` None is an equal share of `hidden_size`.
    A token id outside of the vocabulary is None.

    Attributes of the class:
        family: its name, for messages.
        implemented: options of the published configuration that change the architecture, with the values this package
            implements.

    Raises:
        ValueError: sizes that do not fit; an option that changes the architecture and is not implemented, with its
            name, its value and what is implemented.
    """

    family: ClassVar[str]
    implemented: ClassVar[dict[str, tuple[Any, ...]]]
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size: int = 151936,
        hidden_size: int = 4096,
        intermediate_size: int = 22016,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        max_position_embeddings: int = 32768,
        rope_theta: float | None = None,
        rms_norm_eps: float = 1e-6,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        mask_token_id: int | None = None,
        pad_token_id: int | None = None,
        **kwargs: Any,
    ) -> None:
        for option, implemented in self.implemented.items():
            if option in kwargs and kwargs[option] not in implemented:
                expected = " or ".join(repr(value) for value in implemented)
                raise ValueError(
                    f"{self.family} config: {option}={kwargs[option]!r} is not implemented, expected {expected}"
                )
        heads = num_attention_heads
        # The published classes take as many key heads as heads for None alone.
        kv_heads = heads if num_key_value_heads is None else num_key_value_heads
        sizes = {
            "vocab_size": vocab_size,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
        }
        if head_dim is not None:
            sizes["head_dim"] = head_dim
        self.check_sizes(sizes)
        if (head_dim is None and hidden_size % heads) or heads % kv_heads:
            divides = "num_attention_heads to divide hidden_size and " if head_dim is None else ""
            raise ValueError(
                f"{self.family} config: expected {divides}num_key_value_heads to divide num_attention_heads, "
                f"got hidden_size={hidden_size}, num_attention_heads={heads}, num_key_value_heads={kv_heads}"
            )
        size = head_dim or hidden_size // heads
        if size % 2:
            raise ValueError(f"{self.family} config: rotary embedding needs an even head size, got {size}")
        for name, value in sizes.items():
            setattr(self, name, value)
        self.max_position_embeddings = max_position_embeddings
        self.rope_theta = theta_of(self.family, rope_theta, 10000.0, kwargs)
        self.rms_norm_eps = rms_norm_eps
        self.initializer_range = initializer_range
        self.mask_token_id = mask_token_id if mask_token_id is not None and mask_token_id < vocab_size else None
        pad = pad_token_id if pad_token_id is not None and pad_token_id < vocab_size else None
        kwargs.pop("rope_scaling", None)  # transformers warns of the name, whatever its value
        # The head is sharded over the vocabulary, and the embedding only where it is the head.
        embedding = {"embed_tokens": "embedding_rowwise"} if tie_word_embeddings else {}
        self.base_model_tp_plan = LAYERS_TP_PLAN | embedding
        super().__init__(tie_word_embeddings=tie_word_embeddings, pad_token_id=pad, **kwargs)

    @classmethod
    def check_sizes(cls, sizes: dict[str, int]) -> None:
        """`ValueError` that names all `sizes` unless each is at least 1."""
        if min(sizes.values()) < 1:
            named = ", ".join(f"{name}={value}" for name, value in sizes.items())
            raise ValueError(f"{cls.family} config: expected sizes of at least 1, got {named}")
