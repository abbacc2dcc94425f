"""Weights quantised by name, and refusals of what would else go wrong without a word, or with a misleading one."""

from __future__ import annotations

import importlib.util
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fdpp.models.joined import Stacked
from fdpp.models.linear import PER_BLOCK, is_bare

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from fdpp.models.language_model import DiffusionLM

KINDS = ("int8", "int8-dynamic", "float8", "float8-dynamic", "int4")
"""What `quantise` knows, by torchao: weights alone, or with the inputs of every product quantised as it comes."""

GROUPS = (128, 64, 32)
"""Weights that share a scale in int4: the first of these that divides all inputs. torchao's own default is 128."""

SKIPPED = ("llm_int8_skip_modules", "modules_to_not_convert")
"""Where a quantization configuration names the layers to leave out."""


def check_kind(kind: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a `kind` of `KINDS` that cannot run on `device` with weights of `dtype`, before any is loaded.

    Raises:
        ModuleNotFoundError: torchao is not installed.
        ValueError: what was expected of the device or dtype, and what came.
    """
    if kind not in KINDS:
        raise ValueError(f"expected one of {', '.join(KINDS)}, got {kind!r}")
    if importlib.util.find_spec("torchao") is None:
        raise ModuleNotFoundError("quantised weights need torchao, which is not installed: pip install torchao")
    on_gpu = device.type == "cuda"
    # (8, 9): the first with products of float8. (8, 0): the first that torchao's int4 kernel is made for.
    least = {"float8-dynamic": (8, 9), "int4": (8, 0) if on_gpu else None}.get(kind)
    if least is None:
        return
    wanted = f"expected an NVIDIA GPU of compute capability {least[0]}.{least[1]} or newer, got"
    if not on_gpu:
        raise ValueError(f"{wanted} a CPU; there int8-dynamic runs, and float8 for the weights alone")
    if torch.version.hip is not None or torch.cuda.get_device_capability(device) < least:
        major, minor = torch.cuda.get_device_capability(device)
        raise ValueError(f"{wanted} {torch.cuda.get_device_name(device)} ({major}.{minor})")
    if dtype != torch.bfloat16:
        raise ValueError(f"expected bfloat16 for all that stays as it is, got {str(dtype).removeprefix('torch.')}")


def torchao_config(kind: str, on_gpu: bool, group: int) -> Any:
    """torchao's configuration of a `kind` of `KINDS`; a scale for each row, in int4 for each `group` of a row.

    It leaves the settings of PyTorch's compiler as they are, which torchao's would change for the whole process.
    """
    from torchao import quantization

    if kind == "int4" and not on_gpu:
        int4 = torch.int4  # type: ignore[attr-defined]
        return quantization.IntxWeightOnlyConfig(int4, quantization.PerGroup(group))
    name, options = {
        "int8": ("Int8WeightOnlyConfig", {}),
        "int8-dynamic": ("Int8DynamicActivationInt8WeightConfig", {}),
        "float8": ("Float8WeightOnlyConfig", {}),
        "float8-dynamic": ("Float8DynamicActivationFloat8WeightConfig", {"granularity": quantization.PerRow()}),
        "int4": ("Int4WeightOnlyConfig", {"group_size": group, "int4_packing_format": "tile_packed_to_4d"}),
    }[kind]
    return getattr(quantization, name)(set_inductor_config=False, **options)


def check_dense(model: Any) -> None:
    """Refuse a `model` with experts, which would run one by one, and on a GPU wait for the host in every layer.

    Raises:
        ValueError: with the model's class.
    """
    if any(isinstance(joined, Stacked) for block in model.model.blocks for joined in block.joins()):
        raise ValueError(f"quantised weights: expected a model without experts, got {type(model).__name__}")


def quantise(model: DiffusionLM, kind: str, device: torch.device) -> DiffusionLM:
    """`model` on `device`, the projections of its blocks quantised in place as `kind` of `KINDS` says.

    Layer by layer, so that no device holds more than one in both forms. The embedding and the head stay whole, as with
    transformers' `quantization_config`.

    Raises:
        ModuleNotFoundError, ValueError: as `check_kind` and `check_dense`; sizes that torchao cannot quantise so.
    """
    check_dense(model)
    check_kind(kind, device, model.dtype)
    from torchao.quantization import quantize_

    blocks: Any = model.model.blocks
    sizes = tuple(dict.fromkeys(layer.in_features for layer in blocks.modules() if is_bare(layer)))
    fitting = [group for group in GROUPS if all(size % group == 0 for size in sizes)]
    if kind == "int4" and not fitting:
        raise ValueError(f"int4: expected layers with inputs in multiples of {GROUPS[-1]}, got {sizes}")
    quantize_(blocks, torchao_config(kind, device.type == "cuda", fitting[0] if fitting else 0), device=device)
    whole = [name for name, module in blocks.named_modules() if is_bare(module)]
    if whole:
        left = tuple(blocks.get_submodule(whole[0]).weight.shape)
        raise ValueError(f"{kind}: expected torchao to quantise every layer, it left {len(whole)} such as {left}")
    model.to(device)
    model.join_weights()
    return model


def check_loaded(model: PreTrainedModel, layers: int) -> None:
    """Refuse a quantisation that did not do to a just loaded `model`, of so many linear `layers`, what it was asked to.

    Raises:
        ValueError: as `check_dense`; it replaced no layer, or one was to be left out by a name that it does not know.
    """
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return
    check_dense(model)
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
                f"{examples(model)}"
            )


def examples(model: PreTrainedModel) -> str:
    """Names as a quantisation's configuration takes them: of the head, and of the first block's last layer."""
    names = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    return f"the head is {names[-1]!r}, a block's last layer {names[PER_BLOCK - 1]!r}"


def check_saveable(model: PreTrainedModel) -> None:
    """Refuse to save weights that were quantised in place, of which a reader of the checkpoint would not know.

    Raises:
        ValueError: with the name of the first such weight.
    """
    if getattr(model, "hf_quantizer", None) is not None or getattr(model, "_hf_peft_config_loaded", False):
        return
    from torch.distributed.tensor import DTensor  # as transformers below

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
    import transformers  # not above: `--help` needs no more than `KINDS`

    return f" quantised by {method_of(quantization)} (read by transformers {transformers.__version__})"
