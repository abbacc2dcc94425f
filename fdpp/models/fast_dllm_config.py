"""The configuration of Fast-dLLM v2, with the keys of the published `config.json`."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from fdpp.models.qwen_config import QwenConfig


class FastDLLMConfig(QwenConfig):
    """Shape and token ids of a Fast-dLLM v2 model (Efficient-Large-Model/Fast_dLLM_v2_7B, _1.5B).

    `bd_size` is the grid of its attention. The published configuration names no mask: `mask_token_id` is by default the
    published `generate`'s. All other arguments and the errors are those of `QwenConfig`.
    """

    model_type = "Fast_dLLM_Qwen"
    family = "Fast-dLLM v2"
    attribute_map = {"block_length": "bd_size"}  # noqa: RUF012
    implemented = {  # noqa: RUF012
        "hidden_act": ("silu",),
        "attention_dropout": (0.0,),
        "rope_scaling": (None,),
        "use_sliding_window": (False,),
    }

    def __init__(
        self,
        bd_size: int = 32,
        layer_types: list[str] | None = None,
        mask_token_id: int | None = 151665,
        eos_token_id: int | list[int] | None = 151645,
        **kwargs: Any,
    ) -> None:
        if bd_size < 1:
            raise ValueError(f"Fast-dLLM v2 config: expected a bd_size of at least 1, got {bd_size}")
        if layer_types is not None and set(layer_types) != {"full_attention"}:
            raise ValueError(
                f"Fast-dLLM v2 config: layer_types={layer_types!r} is not implemented, expected 'full_attention' alone"
            )
        self.bd_size, self.layer_types = bd_size, layer_types
        super().__init__(
            mask_token_id=mask_token_id,
            eos_token_id=eos_token_id,
            **kwargs,
        )
        if isinstance(eos_token_id, int) and eos_token_id >= self.vocab_size:
            self.eos_token_id = None


AutoConfig.register("Fast_dLLM_Qwen", FastDLLMConfig, exist_ok=True)
