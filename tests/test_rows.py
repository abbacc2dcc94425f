"""Rows beside a sequence: what they see under every cache, and that no column sees them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from small import MASK, exact, left_pad, prompts
from torch import Tensor

import fdpp
from fdpp.attention import BlockCache
from fdpp.attention.cache import indices
from fdpp.decoding.arena import uncaptured
from fdpp.rules import Needs, Rows, Sight
from fdpp.rules.quota import quota

SIGHTS: list[Sight] = []


@dataclass(frozen=True)
class Watching(fdpp.Rule):
    """Two positions a step; keeps what it sees. Each row lacks a column of its own, one lacks none."""

    needs: ClassVar = Needs(logits=True, rows=True)
    predicate: ClassVar = quota

    def params(self) -> tuple[float, float]:
        return 2.0, 0.0

    def rows(self, block: Tensor) -> Rows:
        holes = torch.cat((block[1:], torch.full_like(block[:1], -1)))
        return Rows(torch.cat((block, block[:1])), torch.cat((holes, block[:1])))

    def observe(self, sight: Sight, before: Any) -> None:
        fed = sight.fed if isinstance(sight.fed, slice) else sight.fed.clone()
        block = sight.block if isinstance(sight.block, slice) else sight.block.clone()
        # Of static steps these are written anew by the next one.
        padding = None if sight.padding is None else sight.padding.clone()
        SIGHTS.append(sight._replace(fed=fed, block=block, tokens=sight.tokens.clone(), padding=padding))


def seen_by(queries: Tensor, length: int, grid: int | None, padding: int) -> Tensor:
    """Which of `length` columns `queries` see, bool `[n, length]`."""
    columns = torch.arange(length)
    sees = (columns >= padding) | (queries < padding)[:, None]
    return sees if grid is None else sees & (columns // grid <= (queries // grid)[:, None])


def imitated(model: Any, sight: Sight, b: int, d: int, L: int, cache: BlockCache) -> Tensor:
    """The rows' logits `[E, V]` by a forward under a mask that says for every query what it sees."""
    block, fed = indices(sight.block, torch.device("cpu")), indices(sight.fed, torch.device("cpu"))
    rows, grid = Watching().rows(block), model.default_block_length if model.block_causal else None
    E, padding = rows.columns.shape[0], 0 if sight.padding is None else int(sight.padding[b])
    tokens = torch.cat((sight.tokens[b, d], torch.full((E,), MASK)))[None]
    own = torch.nn.functional.pad(seen_by(fed, L, grid, padding), (0, E))
    beside = torch.cat((seen_by(block[:1], L, grid, padding).repeat(E, 1), torch.ones(E, E, dtype=torch.bool)), dim=1)
    for row, hole in enumerate(rows.holes.tolist()):
        if hole >= 0:
            beside[row, hole] = False
    positions = (torch.cat((fed, rows.columns)) - padding).clamp(min=0)[None]
    hidden = model.model(
        tokens,
        attention_mask=torch.nn.functional.pad(torch.cat((own, beside)), (0, (cache.columns or 0) - L - E))[None, None],
        position_ids=positions,
        cache=cache,
        start=torch.cat((fed, L + torch.arange(E))),
    )
    return model.project(hidden)[0, -E:]


CASES: list[tuple[str, dict[str, Any]]] = [
    ("LLaDA", {"cache": "none"}),
    ("LLaDA", {"cache": "prefix"}),
    ("LLaDA", {"cache": "dual"}),
    ("LLaDA", {"cache": "none", "drafts": 3}),
    ("LLaDA", {"cache": "prefix", "drafts": 2}),
    ("LLaDA", {"cache": "dual", "drafts": "auto"}),
    ("LLaDA", {"cache": "dual", "refresh": "recent"}),
    ("LLaDA", {"cache": "none", "engine": "static"}),
    ("LLaDA", {"cache": "dual", "engine": "static"}),
    ("LLaDA", {"cache": "prefix", "engine": "static", "drafts": 2}),
    ("SDAR", {"cache": "none"}),
    ("SDAR", {"cache": "prefix", "sub_block_length": 2}),
    ("SDAR", {"cache": "dual", "sub_block_length": 2}),
    ("SDAR", {"cache": "dual", "engine": "static"}),
    ("SDAR", {"cache": "dual", "drafts": 3}),
    ("LLaDA2", {"cache": "dual"}),
]


@pytest.mark.parametrize("padded", [False, True], ids=["alone", "padded"])
@pytest.mark.parametrize(("family", "settings"), CASES, ids=str)
@torch.no_grad()
def test_a_row_sees_what_the_block_sees_but_its_hole(family: str, settings: dict[str, Any], padded: bool) -> None:
    model, block_length = exact(family), {} if family != "LLaDA" else {"block_length": 5}
    ids = left_pad([prompts(1, 3 + 8 * b, seed=b)[0] for b in range(3)]) if padded else (prompts(1, 9),)
    SIGHTS.clear()
    with uncaptured():
        out = model.generate(*ids, rule=Watching(), max_new_tokens=13, stop_at_eos=False, **block_length, **settings)
    model.forget_captures()
    sights, E, caches = list(SIGHTS), SIGHTS[0].rows.shape[2], {}
    assert len(sights) > 5 and not (out.sequences == MASK).any()
    L = 64  # beyond all columns: no query sees what is behind its own
    for sight in sights:
        length = sight.length if not model.block_causal else L
        for b in range(sight.states.shape[0]):
            for d in range(sight.states.shape[1]):
                # Sequences leave a batch one by one. No two have the same padding, in whole blocks either.
                sequence = b if sight.padding is None else int(sight.padding[b])
                cache = caches.get(sequence)
                if cache is None or settings["cache"] == "none":
                    cache = BlockCache(sequences=1, columns=length + E)
                cache = cache if d == 0 else copy.deepcopy(cache)
                expected = imitated(model, sight, b, d, length, cache)
                torch.testing.assert_close(sight.rows[b, d], expected, rtol=0, atol=1e-8)
                if d == 0:
                    caches[sequence] = cache


@pytest.mark.parametrize(("family", "settings"), CASES, ids=str)
def test_no_column_sees_a_row(family: str, settings: dict[str, Any]) -> None:
    """The decode is to the bit that of the same rule without rows; each forward feeds the rows besides."""
    model, sizes = exact(family), {"max_new_tokens": 13, "stop_at_eos": False, **settings}
    ids = left_pad([prompts(1, 3 + 8 * b, seed=b)[0] for b in range(3)])
    with uncaptured():
        beside, plain = (model.generate(*ids, rule=rule, **sizes) for rule in (Watching(), fdpp.Quota(2)))
    model.forget_captures()
    assert beside.sequences.equal(plain.sequences) and beside.commit_step.equal(plain.commit_step)
    assert beside.confidence.equal(plain.confidence) and beside.nfe.equal(plain.nfe)
    assert (beside.query_tokens > plain.query_tokens).all()


@pytest.mark.parametrize("engine", ["eager", "static"])
def test_guidance_and_embeddings_go_with_rows(engine: str) -> None:
    """A row's logits are guided like the block's; prompts may be embeddings."""
    model, ids = exact("LLaDA"), prompts(2, 6)
    settings = {"rule": fdpp.Wino(0.3, 0.6), "max_new_tokens": 12, "block_length": 6, "engine": engine}
    with uncaptured():
        told, shown = (
            model.generate(**given, **settings)
            for given in ({"input_ids": ids}, {"inputs_embeds": model.get_input_embeddings()(ids).detach()})
        )
        assert shown.sequences.equal(told.sequences[:, 6:]) and shown.commit_step.equal(told.commit_step)
        firsts = []
        for prompt, scale in ((ids, 0.0), (torch.full_like(ids, MASK), 0.0), (ids, 1.5)):
            SIGHTS.clear()
            model.generate(prompt, **settings | {"rule": Watching(), "cfg_scale": scale})
            firsts.append(SIGHTS[0].rows.clone())
    model.forget_captures()
    plain, unprompted, guided = firsts
    torch.testing.assert_close(guided, unprompted + 2.5 * (plain - unprompted), rtol=0, atol=1e-9)


def test_the_kernel_is_asked_for_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a short block and its rows are one launch, a full forward's rows one of their own: here its CPU twin."""
    from fdpp.attention import beside, split_keys

    calls: list[tuple[int, bool]] = []
    model = exact("LLaDA").float()
    del model.project

    def launched(q: Tensor, k: Tensor, v: Tensor, left: Tensor | None, **more: Any) -> Tensor:
        calls.append((q.shape[2], more["stops"] is not None))
        more.pop("tickets")
        return split_keys.block_attention(q, k, v, left, **more)

    def decoded(sequences: int = 2, **settings: Any) -> Any:
        SIGHTS.clear()
        ids = left_pad([prompts(1, 4 + 3 * b, seed=b)[0] for b in range(sequences)])
        out = model.generate(*ids, rule=Watching(), max_new_tokens=10, block_length=5, stop_at_eos=False, **settings)
        return out, [sight.rows for sight in SIGHTS]

    cases: list[dict[str, Any]] = [
        {"cache": "dual"},
        {"cache": "none"},
        {"cache": "dual", "drafts": 2},
        {"cache": "prefix", "drafts": 2, "sequences": 1, "engine": "static"},  # padded to a bucket
    ]
    for settings in cases:
        plain, rows = decoded(**settings)
        with monkeypatch.context() as patched:
            patched.setattr(beside, "goes_to_kernel", lambda q: True)
            patched.setattr(beside, "splits_keys", lambda q, k: q.shape[2] < 12)
            patched.setattr(beside, "block_attention", launched)
            ours, ours_rows = decoded(**settings)
        assert ours.sequences.equal(plain.sequences)
        for mine, theirs in zip(ours_rows, rows, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert {(11, True), (6, False)} <= set(calls)


def test_what_does_not_go_with_rows_is_named() -> None:
    model, ids = exact("LLaDA"), prompts(1, 4)
    with pytest.raises(ValueError, match=r"branches='tree' has no columns for the rows that .*expected 'batch'"):
        model.generate(ids, rule=fdpp.Wino(), drafts=2, branches="tree")
    with pytest.raises(ValueError, match="keeps no logits"):
        model.generate(ids, rule=fdpp.Wino(), head="fused")
    for family in ("Dream", "Fast-dLLM v2"):
        with pytest.raises(ValueError, match="reads a row's token off the one before"):
            exact(family).generate(ids, rule=fdpp.Wino(), max_new_tokens=8)
