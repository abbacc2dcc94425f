"""What changes logits and the choice of positions between the model and the rule."""

from __future__ import annotations

import pytest
import torch
from decoding import Scripted
from inputs import IMPLEMENTATIONS, Problem, on_gpu, run
from plain import CACHES, SIZES, Boost, model_with_ends, plain_llada, ragged
from small import EOS, MASK, V, exact_model, prompts, small_model
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from fdpp import LLaDAModelLM, Quota, Threshold
from fdpp.decoding.shaping import drawn, ranked_last


@pytest.fixture(scope="module")
def llada() -> LLaDAModelLM:
    """Shared: no test may change it."""
    return exact_model()


# The interpreter computes with NumPy, which warns of infinities.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@on_gpu(lambda dtype: dtype == torch.bfloat16)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ranking_last_on_every_implementation(implementation: str, dtype: torch.dtype) -> None:
    """The other positions' confidence leaves the ids out; of equal confidences the lower position comes first."""
    B, T, ids, mask_id = 3, 12, (3, 5), 7
    logits = torch.randn(B, T, 40, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, ::2, 3] += 9.0
    logits[0, 1, 5] += 12.0
    logits = logits.to(dtype)
    tokens = torch.full((B, T), mask_id)
    tokens[:, 4:6] = 3
    plain = run(implementation, Problem(logits, tokens, [Quota(1)], mask_id))
    changed = ranked_last(logits, plain.proposal, ids, mask_id)
    out = run(implementation, Problem(changed, tokens, [Quota(8)], mask_id))
    assert torch.equal(out.proposal, plain.proposal) and not bool(out.nonfinite.any())
    others = logits.double()
    others[..., list(ids)] = -torch.inf
    masked, last = tokens == mask_id, torch.isin(plain.proposal, torch.tensor(ids))
    expected = others.softmax(-1).gather(2, plain.proposal[..., None])[..., 0].masked_fill(last | ~masked, 0.0)
    torch.testing.assert_close(out.confidence.double(), expected, rtol=1e-5, atol=0)
    for b in range(B):
        order = sorted(masked[b].nonzero().flatten().tolist(), key=lambda t: (-float(expected[b, t]), t))
        assert sorted(order[:8]) == out.committed[b].nonzero().flatten().tolist()
        assert 0 < int((~last & masked)[b].sum()) < 8


def test_every_set_of_positions_is_as_likely() -> None:
    tokens = torch.tensor([[MASK, 1, MASK, MASK, 2, MASK]]).expand(6000, -1)
    chosen = drawn(tokens, torch.full((6000,), 2.0), torch.arange(6000), MASK)
    assert bool((chosen.sum(1) == 2).all()) and not bool(chosen[:, [1, 4]].any())
    _, counts = chosen.unique(dim=0, return_counts=True)
    assert len(counts) == 6
    # 1000 each; the standard deviation is 29.
    assert int(counts.min()) > 870 and int(counts.max()) < 1130


def test_more_positions_than_masks() -> None:
    tokens = torch.tensor([[MASK, 1, MASK], [1, 1, 1]])
    assert drawn(tokens, torch.tensor([9.0, 9.0]), torch.arange(2), MASK).tolist() == [
        [True, False, True],
        [False, False, False],
    ]


# Logits processors


class Recorder(LogitsProcessor):
    """Keeps what it is called with and changes nothing."""

    def __init__(self) -> None:
        self.calls: list[tuple[Tensor, Tensor]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.calls.append((input_ids.clone(), scores.clone()))
        return scores


class DiffusionRecorder(Recorder):
    def __call__(self, input_ids: Tensor, scores: Tensor, cur_step: Tensor) -> Tensor:
        return super().__call__(input_ids, scores)


def test_a_processor_that_takes_cur_step_sees_blocks(llada: LLaDAModelLM) -> None:
    ids, mask = ragged()
    recorder = DiffusionRecorder()
    settings = {"rule": Quota(4), "stop_at_eos": False, **SIZES}
    out = llada.generate(ids, mask, logits_processor=LogitsProcessorList([recorder]), **settings)
    shapes = [(tuple(before.shape), tuple(scores.shape)) for before, scores in recorder.calls]
    assert shapes == [((4, 9 + 8 * block), (4, T, V)) for block, T in enumerate((8, 8, 4)) for _ in range(T // 4)]
    assert torch.equal(recorder.calls[-1][0], out.sequences[:, :-4])
    assert torch.equal(out.sequences, llada.generate(ids, mask, **settings).sequences)


def test_any_other_processor_sees_positions_each_with_its_context(llada: LLaDAModelLM) -> None:
    """Without padding: of the first forward that is each prompt, then what has been committed as well."""
    recorder, settings = Recorder(), {"rule": Quota(4), "stop_at_eos": False, **SIZES}
    out = llada.generate(prompts(2, 5), logits_processor=[recorder], **settings)
    before, scores = recorder.calls[0]
    assert torch.equal(before, prompts(2, 5).repeat_interleave(8, dim=0)) and scores.shape == (16, V)
    calls = iter(recorder.calls[1:])
    after = out.sequences.masked_fill(torch.nn.functional.pad(out.commit_step, (5, 0), value=-1) > 0, MASK)
    expected = [row[:t][row[:t] != MASK].tolist() for row in after for t in range(5, 13)]
    seen = []
    while len(seen) < 16:
        before, scores = next(calls)
        assert before.shape[0] == scores.shape[0] and scores.shape[1:] == (V,)
        seen += before.tolist()
    assert sorted(seen) == sorted(expected) and len({len(row) for row in seen}) > 1

    ids, mask = ragged()
    llada.generate(ids, mask, logits_processor=[recorder := Recorder()], **settings)
    rows = [row.tolist() for before, _ in recorder.calls[:4] for row in before]
    assert sorted(rows) == sorted([row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)] * 8)


class Warmer(LogitsProcessor):
    """A temperature that falls with the masks left, as DiffusionGemma's."""

    def __call__(self, input_ids: Tensor, scores: Tensor, cur_step: Tensor) -> Tensor:
        return scores / (1.0 + cur_step / 4.0)


AUTOREGRESSIVE: dict[str, list[LogitsProcessor]] = {
    "penalty": [RepetitionPenaltyLogitsProcessor(1.5)],
    "never again": [RepetitionPenaltyLogitsProcessor(1e6)],
    "bigrams": [NoRepeatNGramLogitsProcessor(2)],
    "unigrams": [NoRepeatNGramLogitsProcessor(1)],
    "bad words": [
        NoBadWordsLogitsProcessor([[t, u] for t in range(40) for u in range(t % 3, V, 3)] + [[9], [1, 2, 3]])
    ],
    "suppressed": [SuppressTokensLogitsProcessor(list(range(30)), device="cpu")],
    "length": [MinLengthLogitsProcessor(17, EOS)],
    "new tokens": [MinNewTokensLengthLogitsProcessor(6, 13, EOS)],
    "bias": [SequenceBiasLogitsProcessor([[[t, (t * 7) % V], 4.0] for t in range(1, V) if t * 7 % V] + [[[3], -2.0]])],
    "top k": [TopKLogitsWarper(4)],
    "top p": [TopPLogitsWarper(0.7)],
    "min p": [MinPLogitsWarper(0.3)],
    "typical": [TypicalLogitsWarper(0.4)],
    "temperature": [TemperatureLogitsWarper(0.6)],
    "mixed": [
        RepetitionPenaltyLogitsProcessor(1.4),
        Boost(),
        NoRepeatNGramLogitsProcessor(2),
        Warmer(),
        TopPLogitsWarper(0.8),
    ],
}


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_processors_of_autoregressive_generation_against_one_position_at_a_time(name: str) -> None:
    model, processors = model_with_ends(), AUTOREGRESSIVE[name]
    settings = {"rule": Quota(), "steps": 9, "cache": "none", "stop_at_eos": False, "max_new_tokens": 24}
    changed = 0
    for seed in range(2):
        prompt = prompts(1, 6, seed=seed)
        out = model.generate(prompt, block_length=8, logits_processor=processors, **settings)
        assert torch.equal(out.sequences[0], plain_llada(model, prompt[0], steps=9, processors=processors))
        free = model.generate(prompt, block_length=8, **settings)
        changed += not out.confidence.equal(free.confidence)
    assert changed


def test_what_a_huge_penalty_forbids_is_never_proposed() -> None:
    """The prompt's 7 at no position, and no token twice, once the one before is committed."""
    penalty = [RepetitionPenaltyLogitsProcessor(1e6)]
    model = Scripted([7] * 8, [0.9, 0.8] * 4, prompt=2)
    model.logits[2:, 9:17] += torch.eye(8)  # what is second best
    settings = {"max_new_tokens": 8, "rule": Quota(8), "stop_at_eos": False, "logits_processor": penalty}
    assert model.generate(torch.tensor([[7, 8]]), **settings).sequences.tolist() == [[7, 8, *range(9, 17)]]
    assert model.generate(torch.tensor([[6, 8]]), **settings).sequences.tolist() == [[6, 8, *[7] * 8]]
    assert model.generate(torch.tensor([[6, 8]]), **settings | {"rule": Quota(1)}).sequences.tolist() == [
        [6, 8, 7, *range(10, 17)]
    ]


@pytest.mark.parametrize("cache", CACHES)
def test_autoregressive_processors_with_drafts_guidance_and_batches(llada: LLaDAModelLM, cache: str) -> None:
    ids, mask = ragged()
    processors = [*AUTOREGRESSIVE["bad words"], *AUTOREGRESSIVE["length"], *AUTOREGRESSIVE["mixed"]]
    settings = {"rule": Quota(2), "cache": cache, "cfg_scale": 0.5, "stop_at_eos": False, **SIZES}
    plain = llada.generate(ids, mask, logits_processor=processors, **settings)
    drafted = {"drafts": 3, "branches": "tree"}
    out = llada.generate(ids, mask, logits_processor=processors, **drafted, **settings)
    assert torch.equal(out.sequences, plain.sequences) and torch.equal(out.commit_step, plain.commit_step)
    for b in (0, 3):
        alone = llada.generate(ids[b : b + 1, int((~mask[b].bool()).sum()) :], logits_processor=processors, **settings)
        assert torch.equal(plain.sequences[b, -20:], alone.sequences[0, -20:])
        assert torch.equal(plain.commit_step[b], alone.commit_step[0])


def test_processors_of_transformers(llada: LLaDAModelLM) -> None:
    prompt, settings = prompts(2, 5), {"rule": Quota(1), "stop_at_eos": False, **SIZES}
    free = llada.generate(prompt, **settings)
    banned = free.sequences[:, 5:].unique().tolist()[:3]
    processors = [SuppressTokensLogitsProcessor(banned, device="cpu")]
    out = llada.generate(prompt, logits_processor=processors, **settings)
    assert not bool(torch.isin(out.sequences[:, 5:], torch.tensor(banned)).any())
    # Half the temperature is twice the logits: the same proposals, other confidences.
    sharper = llada.generate(
        prompt, logits_processor=[TemperatureLogitsWarper(0.5)], rule=Threshold(0.9), stop_at_eos=False, **SIZES
    )
    assert bool((sharper.nfe < llada.generate(prompt, rule=Threshold(0.9), stop_at_eos=False, **SIZES).nfe).all())


@pytest.mark.parametrize("cache", CACHES)
def test_processors_with_drafts_guidance_and_batches(llada: LLaDAModelLM, cache: str) -> None:
    ids, mask = ragged()
    settings = {"rule": Quota(1), "cache": cache, "cfg_scale": 0.5, "stop_at_eos": False, **SIZES}
    plain = llada.generate(ids, mask, logits_processor=[Boost()], **settings)
    assert not torch.equal(plain.sequences, llada.generate(ids, mask, **settings).sequences)
    out = llada.generate(ids, mask, logits_processor=[Boost()], drafts=3, **settings)
    assert torch.equal(out.sequences, plain.sequences)
    assert torch.equal(out.commit_step, plain.commit_step)
    alone = llada.generate(ids[1:2], mask[1:2], logits_processor=[Boost()], **settings)
    assert torch.equal(out.sequences[1], alone.sequences[0])


def test_a_processor_has_the_last_word_but_for_eos(llada: LLaDAModelLM) -> None:
    def all_eos(input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores + 100.0 * (torch.arange(V) == EOS)

    settings = {"rule": Quota(1), "stop_at_eos": False, "logits_processor": [all_eos], **SIZES}
    assert bool((llada.generate(prompts(1, 4), **settings).sequences[:, 4:] == EOS).all())
    assert not bool((llada.generate(prompts(1, 4), logits_eos_inf=True, **settings).sequences[:, 4:] == EOS).any())


def test_processors_that_do_not_fit(llada: LLaDAModelLM) -> None:
    with pytest.raises(ValueError, match=r"logits_processor: expected scores of \[8, 64\], got \[8\]"):
        llada.generate(prompts(1, 4), logits_processor=[lambda ids, scores: scores[:, 0]], **SIZES)
    with pytest.raises(ValueError, match=r"logits_processor: expected scores of \[1, 8, 64\], got \[1, 64\]"):
        llada.generate(prompts(1, 4), logits_processor=[lambda ids, scores, cur_step: scores[:, 0]], **SIZES)
    with pytest.raises(
        ValueError, match=r"logits_processor: expected one called with.*function asks for ids, scores, x"
    ):
        llada.generate(prompts(1, 4), logits_processor=[lambda ids, scores, x: scores], **SIZES)
    with pytest.raises(ValueError, match="engine='static': logits_processor"):
        llada.generate(prompts(1, 4), logits_processor=[Boost()], engine="static", **SIZES)


@pytest.mark.gpu
def test_a_processor_runs_eagerly_on_a_gpu() -> None:
    """Where "auto" would capture the steps."""
    model, settings = small_model().cuda(), {"rule": Quota(1), "stop_at_eos": False, **SIZES}
    boosted = model.generate(prompts(2, 5).cuda(), logits_processor=[Boost()], **settings)
    eager = model.generate(prompts(2, 5).cuda(), logits_processor=[Boost()], engine="eager", **settings)
    assert torch.equal(boosted.sequences, eager.sequences)
    assert not torch.equal(boosted.sequences, model.generate(prompts(2, 5).cuda(), **settings).sequences)
