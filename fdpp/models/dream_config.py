"""Dream's configuration, with the keys of the published `config.json`."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from fdpp.models.qwen_config import QwenConfig


class DreamConfig(QwenConfig):
    """Shape and token ids of a Dream model (Dream-org/Dream-v0-Base-7B, -Instruct-7B, Dream-Coder).

    All other arguments and the errors are those of `QwenConfig`.
    """

    model_type = "Dream"
    family = "Dream"
    implemented = {  # noqa: RUF012
        "hidden_act": ("silu",),
        "attention_dropout": (0.0,),
        "rope_scaling": (None,),
        "use_sliding_window": (False,),
        "use_mrope": (False,),
    }

    def __init__(self, mask_token_id: int | None = 151666, pad_token_id: int | None = 151643, **kwargs: Any) -> None:
        super().__init__(mask_token_id=mask_token_id, pad_token_id=pad_token_id, **kwargs)


AutoConfig.register("Dream", DreamConfig, exist_ok=True)
