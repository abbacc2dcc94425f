"""SDAR's configuration, with the keys of the published `config.json`."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from fdpp.models.qwen_config import QwenConfig


class SDARConfig(QwenConfig):
    """Shape and token ids of an SDAR or TraDo model (JetLM/SDAR-4B-Chat, Gen-Verse/TraDo-8B-Instruct and others).

    `block_size` is the grid of its attention, `head_dim` may differ from an equal share of `hidden_size`. All other
    arguments and the errors are those of `QwenConfig`.
    """

    model_type = "sdar"
    family = "SDAR"
    attribute_map = {"block_length": "block_size"}  # noqa: RUF012
    implemented = {  # noqa: RUF012
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "attention_dropout": (0.0,),
        "rope_scaling": (None,),
        "use_sliding_window": (False,),
    }

    def __init__(
        self,
        head_dim: int | None = 128,
        block_size: int = 4,
        mask_token_id: int | None = 151669,
        **kwargs: Any,
    ) -> None:
        if block_size < 1:
            raise ValueError(f"SDAR config: expected a block_size of at least 1, got {block_size}")
        self.block_size = block_size
        super().__init__(head_dim=head_dim, mask_token_id=mask_token_id, **kwargs)


AutoConfig.register("sdar", SDARConfig, exist_ok=True)
