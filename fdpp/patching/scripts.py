"""The selection functions of Fast-dLLM's and Fast-dLLM++'s scripts, computed by fdpp's step.

They are recognised by their names and parameter names (`SELECTORS`), in a `generate` module (NVlabs/Fast-dLLM,
Ringo-Star/FastdLLM_plusplus, lizhuo-luo/DAWN) or in one that imported them. A patch reaches the callers in that module.
A module that imported a function before keeps the original.

A patched function returns what the original does, `(x0, transfer_index)`: the proposals, int64 `[B, L]` (the argmax at
masked positions, `x` elsewhere), and the positions to commit, bool `[B, L]`. It differs where the original departs from
its own formula, or leaves the choice open:

- `get_transfer_index_dynamic`: (n + 1)(1 - c_(n)) < f is strict. It also holds if the first failure is at the last
  masked position; the original then commits all of them.
- The mask id, read from the masked positions of `x`, is never proposed: committing it would leave a mask, and the
  original's loop would not end. If these positions hold different ids, no id is excluded.
- Equal confidences: the lower position first. Confidences are float32: two that differ by less than 1e-6, or one
  that is as close to a bound, may be decided otherwise than in float64.
- Positions whose logits hold NaN or +inf commit last.
- No position outside `mask_index` is ever reported as committed, however large `num_transfer_tokens` is.

Calls that the fused step cannot reproduce go to the original:

- `temperature` above 0 and `remasking="random"`, whose noise comes from torch's global generator, so that the same
  `torch.manual_seed` gives the same tokens as before;
- another `remasking`;
- logits in float64;
- masked positions more than 1024 columns apart (in a compiled caller an error);
- arguments that do not fit.

A call reads the masks on the host, as the published loops do after every step anyway.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fdpp.rules import Factor, Frechet, Quota, Rule, Threshold
from fdpp.selection import DTYPES, MAX_POSITIONS
from fdpp.step.operators import prefix_step
from fdpp.step.terms import Terms

Criterion = tuple[type[Rule], Any]
"""A rule and its number, one for all sequences or a tensor with one for each."""

ARGUMENTS = ("logits", "temperature", "remasking", "mask_index", "x")


def by_quota_or_threshold(num_transfer_tokens: Any, threshold: Any) -> Criterion:
    return (Quota, num_transfer_tokens) if threshold is None else (Threshold, threshold)


def by_factor(num_transfer_tokens: Any, factor: Any) -> Criterion:
    return Factor, factor


def by_margin(margin: Any) -> Criterion:
    return Frechet, margin


SELECTORS: dict[str, Callable[..., Criterion]] = {
    "get_transfer_index": by_quota_or_threshold,
    "get_transfer_index_dynamic": by_factor,
    "get_transfer_index_frechet_profile": by_margin,
}
"""How each function's parameters after `ARGUMENTS` become a rule and its number."""


def parameters_of(name: str) -> tuple[str, ...]:
    return (*ARGUMENTS, *inspect.signature(SELECTORS[name]).parameters)


SUPPORTED = "at least one of " + ", ".join(f"{name}({', '.join(parameters_of(name))})" for name in SELECTORS)


BECOMES = "fdpp's fused step"


def replacements(module: ModuleType) -> list[tuple[str, str, Any]]:
    """See `fdpp.patching.replacements`."""
    found = [name for name in SELECTORS if name in vars(module)]
    if not found:
        raise ValueError(f"found none of {', '.join(SELECTORS)}")
    return [("", name, replaced(name, vars(module)[name])) for name in found]


def replaced(name: str, original: Any) -> Callable[..., Any]:
    """The function in the place of `original`, with its signature and defaults."""
    expected = parameters_of(name)
    parameters = inspect.signature(original).parameters if callable(original) else {}
    if tuple(parameters) != expected or any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters.values()):
        came = ", ".join(map(str, parameters.values())) if callable(original) else repr(original)
        raise ValueError(f"{name}: expected the parameters ({', '.join(expected)}), got ({came})")
    defaults = {key: p.default for key, p in parameters.items() if p.default is not p.empty}
    criterion = SELECTORS[name]

    @functools.wraps(original)
    def selector(*args: Any, **kwargs: Any) -> Any:
        given = [*expected[: len(args)], *kwargs]
        call = {**defaults, **dict(zip(expected, args, strict=False)), **kwargs}
        if len(args) > len(expected) or len(set(given)) < len(given) or call.keys() != set(expected):
            return original(*args, **kwargs)
        logits, temperature, remasking, mask_index, x = (call.pop(key) for key in ARGUMENTS)
        rule, number = criterion(**call)
        if temperature != 0 or remasking != "low_confidence" or not fits(logits, mask_index, x, number):
            return original(*args, **kwargs)
        params = torch.zeros(x.shape[0], 3, dtype=torch.float64, device=x.device)
        params[:, 0] = number.flatten().to(x.device) if isinstance(number, Tensor) else number
        run = transfer_op if torch.compiler.is_compiling() else transfer
        try:
            x0, committed = run(logits, mask_index, x, params, rule.key())
        except SpreadError:
            return original(*args, **kwargs)
        return x0, committed & (params[:, :1] > 0) if rule is Quota else committed

    return selector


def fits(logits: Tensor, mask_index: Tensor, x: Tensor, number: Any) -> bool:
    """Whether fdpp's step takes these arguments."""
    return (
        (number.numel() in (1, x.shape[0]) if isinstance(number, Tensor) else isinstance(number, (int, float)))
        and x.dim() == 2
        and logits.shape[:-1] == mask_index.shape == x.shape
        and logits.dtype in DTYPES
        and (mask_index.dtype, x.dtype) == (torch.bool, torch.int64)
        and logits.device == mask_index.device == x.device
        and x.device.type in ("cpu", "cuda")
    )


class SpreadError(ValueError):
    """The masked positions span more columns than a step takes."""


def transfer(logits: Tensor, mask_index: Tensor, x: Tensor, params: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """`(x0, transfer_index)` by the rule with the key `rule` and the numbers `params` `[B, 3]`."""
    x0 = x.clone(memory_format=torch.contiguous_format)
    transfer_index = torch.zeros(x.shape, dtype=torch.bool, device=x.device)
    mask = mask_index.cpu()
    columns = mask.any(0).nonzero().flatten().tolist()
    if not columns:
        return x0, transfer_index
    block = slice(columns[0], columns[-1] + 1)
    if block.stop - block.start > MAX_POSITIONS:
        raise SpreadError(
            f"mask_index: expected masked positions within {MAX_POSITIONS} columns, got {block.stop - block.start}"
        )
    held = x.cpu()[mask].unique().tolist()
    mask_id = held[0] if len(held) == 1 else -1
    active = mask_index[:, block]
    tokens = x[:, block].masked_fill(active, mask_id)
    selection = prefix_step(logits[:, block].detach(), tokens, active, Terms(params, rule, mask_id))
    x0[:, block] = selection.proposal
    transfer_index[:, block] = selection.committed
    return x0, transfer_index


# One operator for compiled callers: the mask id is data, and to read it would break their graph.
transfer_op = torch.library.custom_op("fdpp::transfer", transfer, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))


@transfer_op.register_fake
def _(logits, mask_index, x, params, rule):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.bool)
