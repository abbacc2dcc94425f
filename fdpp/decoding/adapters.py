"""Adapters of peft's that a block decode cannot apply, refused before it runs.

An adapter that stands in the layers (LoRA and its kin) needs nothing of a decode: a wrapped layer is called.
"""

from __future__ import annotations

from typing import Any

from torch import nn

BY_ROW = {
    "adapter_names": "rows of a decode end and are repeated, so expected one adapter for all, by set_adapter",
    "alora_offsets": "an activated LoRA begins in the midst of a prompt, which a block decode does not know",
}
"""What peft hands to every layer by a hook while `generate` runs, and why it does not fit."""

PROMPT_LEARNING = "a block decode takes ids, expected an adapter in the layers such as LoRA, got prompt learning"


def model_within(model: Any) -> Any:
    """The model in peft's wrapper, whose layers have the adapter; a model without one is itself.

    Raises:
        ValueError: the wrapper's active adapter is one of prompt learning.
    """
    if not hasattr(model, "get_base_model"):
        return model
    if model.active_peft_config.is_prompt_learning:
        raise ValueError(f"{PROMPT_LEARNING} ({type(model.active_peft_config).__name__})")
    return model.get_base_model()


def check_adapters(model: Any) -> None:
    """Refuse prompt learning, and adapters that are chosen row by row.

    peft's prompt learning replaces the `prepare_inputs_for_generation` of the instance that it calls.

    Raises:
        ValueError: the decode would run without the adapter, or with that of another row.
    """
    prepare = vars(model).get("prepare_inputs_for_generation")
    preparer = getattr(prepare, "__self__", prepare)
    if preparer is not None and preparer is not model:
        raise ValueError(f"generate: {PROMPT_LEARNING} (a {type(preparer).__name__} that prepares the inputs)")
    names: set[str] = set()
    for module in model.modules() if isinstance(model, nn.Module) else ():
        for key, hook in list(module._forward_pre_hooks.items()):
            found = BY_ROW.keys() & (getattr(hook, "keywords", None) or {}).keys()
            if found:  # peft leaves its hooks behind when a call fails
                module._forward_pre_hooks.pop(key)
                module._forward_pre_hooks_with_kwargs.pop(key, None)
                names |= found
    if names:
        name = min(names)
        raise ValueError(f"generate: {name} is not implemented: {BY_ROW[name]}")
