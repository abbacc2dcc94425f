"""LLaDA2's configuration, with the keys of the published `config.json`."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from fdpp.models.qwen_config import QwenConfig

TOKEN_IDS = {"mask_token_id": 156895, "eos_token_id": 156892, "pad_token_id": 156892}
"""Of the published tokenizer, for files that do not name them."""


class LLaDA2Config(QwenConfig):
    """Shape and token ids of a LLaDA2 model (inclusionAI/LLaDA2.0-mini, -flash, LLaDA2.1 and others).

    Defaults are those of LLaDA2.0-mini, not of the published class. `block_size`, which published files do not have, is
    the grid of its attention. All other arguments and the errors are those of `QwenConfig`; options that the published
    model does not read, but other code for it, are refused, too.
    """

    model_type = "llada2_moe"
    family = "LLaDA2"
    attribute_map = {"block_length": "block_size"}  # noqa: RUF012
    implemented = {  # noqa: RUF012
        "hidden_act": ("silu",),
        "attention_dropout": (0.0,),
        "embedding_dropout": (0.0,),
        "output_dropout": (0.0,),
        "rope_scaling": (None,),
        "use_sliding_window": (False,),
        "use_bias": (False,),
        "use_qkv_bias": (False,),
        "use_qk_norm": (True,),
        "use_rmsnorm": (True,),
        "use_linear_attention": (False,),
        "using_split_qkv_in_self_attention": (False,),
        "norm_head": (False,),
        "norm_softmax": (False,),
        "norm_topk_prob": (True,),
        "score_function": ("sigmoid",),
        "moe_router_enable_expert_bias": (True,),
        "router_dtype": ("fp32", "float32"),
        "num_nextn_predict_layers": (0, None),
    }

    def __init__(
        self,
        vocab_size: int = 157184,
        hidden_size: int = 2048,
        intermediate_size: int = 5120,
        num_hidden_layers: int = 20,
        num_attention_heads: int = 16,
        num_key_value_heads: int | None = 4,
        head_dim: int | None = 128,
        first_k_dense_replace: int = 1,
        num_experts: int = 256,
        num_experts_per_tok: int = 8,
        moe_intermediate_size: int = 512,
        num_shared_experts: int | None = 1,
        n_group: int = 8,
        topk_group: int = 4,
        routed_scaling_factor: float = 2.5,
        block_size: int = 32,
        rope_theta: float | None = None,
        rope_parameters: dict[str, Any] | None = None,
        rotary_dim: int | None = None,
        partial_rotary_factor: float | None = None,
        **kwargs: Any,
    ) -> None:
        sizes = {
            "num_experts": num_experts,
            "num_experts_per_tok": num_experts_per_tok,
            "moe_intermediate_size": moe_intermediate_size,
            "n_group": n_group,
            "topk_group": topk_group,
            "block_size": block_size,
        }
        self.check_sizes(sizes)
        of_group, rest = divmod(num_experts, n_group)
        # A group scores the sum of two.
        if rest or of_group < 2 or topk_group > n_group or num_experts_per_tok > topk_group * of_group:
            raise ValueError(
                "LLaDA2 config: expected n_group groups of at least two of the num_experts, and num_experts_per_tok "
                f"experts in topk_group of them, got num_experts={num_experts}, n_group={n_group}, "
                f"topk_group={topk_group}, num_experts_per_tok={num_experts_per_tok}"
            )
        for name, value in sizes.items():
            setattr(self, name, value)
        self.first_k_dense_replace = first_k_dense_replace
        self.num_shared_experts = num_shared_experts or 0
        self.routed_scaling_factor = routed_scaling_factor
        size = hidden_size // num_attention_heads if head_dim is None else head_dim
        # transformers 5 moves the factor into its table, also of models that it does not know.
        table = dict(rope_parameters or {})
        self.rotary_dim = turned(size, rotary_dim, table.pop("partial_rotary_factor", partial_rotary_factor))
        self.partial_rotary_factor = self.rotary_dim / size
        if rope_theta is None and not table:
            rope_theta = 600000.0
        super().__init__(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            head_dim=head_dim,
            rope_theta=rope_theta,
            rope_parameters=table,
            **{name: token if token < vocab_size else None for name, token in TOKEN_IDS.items()} | kwargs,
        )
        # Its styles split neither one projection of queries, keys and values by heads, nor experts without a sum over
        # all processes for each.
        self.base_model_tp_plan = {}


def turned(head_dim: int, rotary_dim: int | None, factor: float | None) -> int:
    """Channels of a head that turn with the position, named by either or both; by default half of them.

    Raises:
        ValueError: an odd number, more than there are, or two that contradict each other.
    """
    by_factor = int(round(head_dim * (0.5 if factor is None else factor), 6))
    count = by_factor if rotary_dim is None else rotary_dim
    if (factor is not None and count != by_factor) or count % 2 or not 0 < count <= head_dim:
        raise ValueError(
            "LLaDA2 config: expected rotary_dim = head_dim * partial_rotary_factor, even and at most head_dim, got "
            f"rotary_dim={rotary_dim}, partial_rotary_factor={factor}, head_dim={head_dim}"
        )
    return count


AutoConfig.register("llada2_moe", LLaDA2Config, exist_ok=True)
