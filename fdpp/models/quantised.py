"""What is refused of quantised models: what would else go wrong without a word, or with a misleading one."""

from __future__ import annotations

import re
from typing import Any

import transformers
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, PreTrainedModel

from fdpp.models.linear import is_bare

SKIPPED = ("llm_int8_skip_modules", "modules_to_not_convert")
"""Where a quantization configuration names the layers to leave out."""


def check_loaded(model: PreTrainedModel, layers: int) -> None:
    """Refuse a quantisation that did not do to a just loaded `model`, of so many linear `layers`, what it was asked to.

    Raises:
        ValueError: it replaced no layer, or one that was to be left out under a name that it does not know.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return
    config = quantizer.quantization_config
    named = [name for attribute in SKIPPED for name in getattr(config, attribute, None) or []]
    if sum(map(is_bare, model.modules())) == layers:
        raise ValueError(
            f"quantization_config: expected {method_of(config)} to replace linear layers, it replaced none of {layers} "
            f"(left out by name: {', '.join(named) or 'none'})"
        )
    whole = [path for path, module in model.named_modules() if type(module._parameters.get("weight")) is nn.Parameter]
    # A folder that is quantised already may name what it likes: its weights say what is left out.
    for name in [] if quantizer.pre_quantized else named:
        if not any(re.search(name, path) for path in whole):
            raise ValueError(
                f"quantization_config: expected names of layers to leave out, got {name!r}, which leaves out none; "
                "the head is 'model.transformer.ff_out', a block's last layer 'model.transformer.blocks.0.ff_out'"
            )


def check_saveable(model: PreTrainedModel) -> None:
    """Refuse to save weights that were quantised in place, of which a reader of the checkpoint would not know.

    Raises:
        ValueError: with the name of the first such weight.
    """
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "_hf_peft_config_loaded", False):
        return
    for name, value in model.state_dict().items():
        subclass = hasattr(value, "__tensor_flatten__") and not isinstance(value, DTensor)
        if subclass or not isinstance(value, Tensor):
            raise ValueError(
                f"save_pretrained: expected plain weights, got {name} of type {type(value).__name__}; what is to be "
                "saved is quantised by `from_pretrained(..., quantization_config=...)`"
            )


def method_of(quantization: Any) -> str:
    """The name of the method of a quantization configuration, which may be a dictionary."""
    is_dict = isinstance(quantization, dict)
    method = quantization.get("quant_method") if is_dict else quantization.quant_method
    return str(getattr(method, "value", method))


def reading(config: PreTrainedConfig) -> str:
    """For messages about a checkpoint that does not fit: by which method it says that it is quantised."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return ""
    return f" quantised by {method_of(quantization)} (read by transformers {transformers.__version__})"
