"""Whatever is combined, a row of a batch decodes to the tokens of that row alone, undrafted and eager."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import CACHES, LLADA_OPTIONS, Boost, model_with_ends, ragged
from small import RULES

import fdpp
from fdpp import DiffusionGenerationConfig

MODEL = model_with_ends()


@given(
    rule=st.sampled_from(RULES),
    options=st.sampled_from([{}, *LLADA_OPTIONS, {"remasking": "random"}, {"steps": 7}]),
    cache=st.sampled_from(CACHES),
    temperature=st.sampled_from([0.0, 0.7]),
    stop_at_eos=st.booleans(),
    length=st.integers(1, 24),
    block=st.integers(1, 12),
    drafts=st.sampled_from([1, 2, 5, "auto"]),
    branches=st.sampled_from(["batch", "tree"]),
    how=st.sampled_from(["eager", "static", "processor"]),
    refresh=st.sampled_from(["all", "recent", "recent:2", "block", "window:12:2"]),
)
@settings(max_examples=60, deadline=None)
def test_everything_together(
    rule: fdpp.Rule,
    options: dict[str, Any],
    cache: str,
    temperature: float,
    stop_at_eos: bool,
    length: int,
    block: int,
    drafts: int | str,
    branches: str,
    how: str,
    refresh: str,
) -> None:
    if cache == "none" or isinstance(rule, fdpp.Dawn) or (refresh == "block" and drafts != 1):
        refresh = "all"  # the only one that goes with it, `test_refresh`
    decode = {
        "refresh": refresh,
        "rule": rule,
        "cache": cache,
        "temperature": temperature,
        "stop_at_eos": stop_at_eos,
        **options,
    }
    decode |= {"max_new_tokens": length, "block_length": block}
    try:
        DiffusionGenerationConfig(seed=0, **decode)
    except ValueError:
        # A refused combination; `test_llada_options` says which are.
        decode = {name: value for name, value in decode.items() if name not in options}
    engine = "static" if how == "static" and not isinstance(rule, fdpp.Dawn) else "eager"
    processors = [Boost()] if how == "processor" else None
    ids, mask = ragged()
    together = MODEL.generate(
        ids, mask, logits_processor=processors, engine=engine, drafts=drafts, branches=branches, seed=5, **decode
    )
    for b, P in enumerate(mask.sum(1).tolist()):
        prompt = ids[b : b + 1, ids.shape[1] - P :]
        alone = MODEL.generate(prompt, logits_processor=processors, engine="eager", seed=5 + b, **decode)
        assert torch.equal(together.sequences[b, -length:], alone.sequences[0, -length:])
        assert together.nfe[b] == alone.nfe[0] if drafts == 1 else together.nfe[b] <= alone.nfe[0]
