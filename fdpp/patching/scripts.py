"""The selection functions of other people's scripts and samplers, computed by fdpp's step.

They are recognised by their names and parameter names (`FUSED`), in the module that defines them or in one that
imported them: a `generate` of NVlabs/Fast-dLLM, Ringo-Star/FastdLLM_plusplus or lizhuo-luo/DAWN, dInfer's
`parallel_strategy`, dllm's samplers, `generation_utils` of Dream's code and its copies, FreeDave's `core`. A patch
reaches the callers in that module. A module that imported a function before keeps the original.

A patched function returns what the original does. The functions of `SELECTORS`: `(x0, transfer_index)`, the proposals,
int64 `[B, L]` (the argmax at masked positions, `x` elsewhere), and the positions to commit, bool `[B, L]`. Those of
`fdpp.patching.dllm`: see there. It differs where the original departs from its own formula, or leaves the choice open:

- A factor: (n + 1)(1 - c_(n)) < f is strict. Of `get_transfer_index_dynamic` it also holds if the first failure is at
  the last masked position; the original then commits all of them.
- The mask id, read from the masked positions of `x`, is never proposed: committing it would leave a mask, and the
  original's loop would not end. If these positions hold different ids, no id is excluded, nor by a `sample_tokens`
  that is not given `x`.
- Equal confidences: the lower position first; equal logits: the lower id. Confidences are float32: two that differ by
  less than 1e-6, or one that is as close to a bound, may be decided otherwise than in float64. Where the original takes
  the softmax in the dtype of bfloat16 or float16 logits, so that most confident positions tie, this one does not.
- Positions whose logits hold NaN or +inf commit last; a `sample_tokens` that returns confidences has 0 for them.
- No position outside `mask_index` is ever reported as committed, however large `num_transfer_tokens` is.

Calls that the fused step cannot reproduce go to the original:

- `temperature` above 0 and `remasking="random"`, whose noise comes from torch's global generator, so that the same
  `torch.manual_seed` gives the same tokens as before;
- another `remasking`;
- of `sample_tokens` confidences by margin or entropy, or of filtered logits;
- logits in float64;
- masked positions more than 1024 columns apart (in a compiled caller an error);
- arguments that do not fit.

A call that is given `x` reads the masks on the host, as the published loops do after every step anyway.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torch import Tensor

from fdpp.patching import dllm
from fdpp.patching.transfer import Criterion, by_any, by_factor, by_margin, by_quota_or_threshold, transferred

Fused = Callable[..., Any]
"""Takes an original's arguments by name and returns its result, or None for a call that goes to the original."""

ARGUMENTS = ("logits", "temperature", "remasking", "mask_index", "x")

SELECTORS: dict[str, Callable[..., Criterion]] = {
    "get_transfer_index": by_quota_or_threshold,
    "get_transfer_index_dynamic": by_factor,
    "get_transfer_index_frechet_profile": by_margin,
    "_get_transfer_index": by_any,
}
"""How each function's parameters after `ARGUMENTS` become a rule and its number."""


def parameters_of(name: str) -> tuple[str, ...]:
    return (*ARGUMENTS, *inspect.signature(SELECTORS[name]).parameters)


def selector(criterion: Callable[..., Criterion]) -> Fused:
    def fused(
        logits: Tensor, temperature: float, remasking: str, mask_index: Tensor, x: Tensor, **numbers: Any
    ) -> tuple[Tensor, Tensor] | None:
        return transferred(logits, temperature, remasking, mask_index, x, criterion(**numbers))

    return fused


def by_parameters(*functions: Fused) -> dict[tuple[str, ...], Fused]:
    return {tuple(inspect.signature(function).parameters): function for function in functions}


FUSED: dict[str, dict[tuple[str, ...], Fused]] = {
    **{name: {parameters_of(name): selector(criterion)} for name, criterion in SELECTORS.items()},
    "_diffusion_step_block": by_parameters(dllm.diffusion_step_block),
    "diffusion_step_block": by_parameters(dllm.diffusion_step_block),
    "sample_tokens": by_parameters(dllm.confidence_and_token, dllm.token_and_probability, dllm.transferred_tokens),
}
"""What computes a function with this name and these parameters."""


def shown(parameters: tuple[str, ...]) -> str:
    return f"({', '.join(parameters)})"


SUPPORTED = "at least one of " + ", ".join(name + shown(known) for name, kinds in FUSED.items() for known in kinds)


BECOMES = "fdpp's fused step"


def replacements(module: ModuleType) -> list[tuple[str, str, Any]]:
    """See `fdpp.patching.replacements`."""
    found = [name for name in FUSED if name in vars(module)]
    if not found:
        raise ValueError(f"found none of {', '.join(FUSED)}")
    return [("", name, replaced(name, vars(module)[name])) for name in found]


def replaced(name: str, original: Any) -> Callable[..., Any]:
    """The function in the place of `original`, with its signature and defaults."""
    parameters = inspect.signature(original).parameters if callable(original) else {}
    expected = tuple(parameters)
    fused = FUSED[name].get(expected)
    if fused is None or any(p.kind is not p.POSITIONAL_OR_KEYWORD for p in parameters.values()):
        came = ", ".join(map(str, parameters.values())) if callable(original) else repr(original)
        known = " or ".join(map(shown, FUSED[name]))
        raise ValueError(f"{name}: expected the parameters {known}, got ({came})")
    defaults = {key: p.default for key, p in parameters.items() if p.default is not p.empty}

    @functools.wraps(original)
    def replacement(*args: Any, **kwargs: Any) -> Any:
        given = [*expected[: len(args)], *kwargs]
        call = {**defaults, **dict(zip(expected, args, strict=False)), **kwargs}
        if len(args) > len(expected) or len(set(given)) < len(given) or call.keys() != set(expected):
            return original(*args, **kwargs)
        result = fused(**call)
        return original(*args, **kwargs) if result is None else result

    return replacement
