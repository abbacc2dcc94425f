"""A patched DiffusionGemma decodes as transformers' own, given the same draws; what is unknown is left alone."""

from __future__ import annotations

import copy
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from gemma import CANVAS, V, decoded, prompt, replayed, tiny_gemma
from torch import Tensor, nn
from transformers import LogitsProcessor, LogitsProcessorList, TextDiffusionStreamer
from transformers.models.diffusion_gemma import generation_diffusion_gemma as theirs

import fdpp
from fdpp.patching import diffusion_gemma
from fdpp.step.canvas.outcome import CanvasStep

Config = theirs.EntropyBoundSamplerConfig

SETTINGS: dict[str, dict[str, Any]] = {
    "as published": {},
    "cold": {"t_min": 0.05, "t_max": 0.3},
    "bold": {"sampler_config": Config(5.0), "confidence_threshold": 1.0},
    "stops late": {"stability_threshold": 3, "confidence_threshold": 2.0, "t_min": 0.1},
    "stops at once": {"stability_threshold": 0, "confidence_threshold": 2.5},
    "one step": {"max_denoising_steps": 1},
}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_gemma()


class Counted:
    """A callable in the place of another, which it counts the calls of."""

    def __init__(self, function: Any) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.function(*args, **kwargs)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Counted:
    """Counts fdpp's steps."""
    counted = Counted(diffusion_gemma.step)
    monkeypatch.setattr(diffusion_gemma, "step", counted)
    return counted


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("conditioning", diffusion_gemma.CONDITIONING)
def test_decodes_are_transformers_own(model: Any, settings: dict[str, Any], conditioning: str, fused: Counted) -> None:
    """Sequences and forwards, with the original's draws replayed; in float32 streamed conditioning rounds alike."""
    ids = prompt(2)
    with replayed():
        wanted = [decoded(model, ids, seed, **settings) for seed in range(2)]
    with fdpp.patch(model, conditioning=conditioning):
        assert [decoded(model, ids, seed, **settings) for seed in range(2)] == wanted
    assert fused.calls > 0


def test_ragged_batches(model: Any) -> None:
    """Prompts padded on the left, rows that finish at different steps and canvases, an EOS inside."""
    ids = prompt(3)
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * 7, [0, 1, 1, 1, 1, 1, 1]])
    settings = {"attention_mask": mask, "eos_token_id": list(range(20, 30)), **SETTINGS["stops late"]}
    with replayed():
        wanted = [decoded(model, ids, seed, **settings) for seed in range(4)]
    assert len({tuple(forwards) for _, forwards in wanted}) > 1 and any(len(set(f)) > 1 for _, f in wanted)
    with fdpp.patch(model):
        assert [decoded(model, ids, seed, **settings) for seed in range(4)] == wanted


def test_without_noise_nothing_is_replayed(model: Any) -> None:
    """As the temperature goes to 0 and all is accepted, no draw is left but that of the first canvas."""
    settings = {"t_min": 1e-6, "t_max": 2e-6, "sampler_config": Config(1e9), "max_new_tokens": CANVAS}
    for seed in range(4):
        wanted = decoded(model, prompt(2, seed=seed), seed, **settings)
        with fdpp.patch(model):
            assert decoded(model, prompt(2, seed=seed), seed, **settings) == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = tiny_gemma(1, dtype)
    with replayed():
        wanted = decoded(model, prompt(2))
    with fdpp.patch(model):
        assert decoded(model, prompt(2)) == wanted
    with fdpp.patch(model, conditioning="streamed"):
        assert decoded(model, prompt(2)) == decoded(model, prompt(2))


def test_a_seed_reproduces(model: Any) -> None:
    with fdpp.patch(model):
        first, second, other = (decoded(model, prompt(2), seed) for seed in (3, 3, 4))
    assert first == second != other


def test_starting_canvas_and_logits_of_a_user(model: Any) -> None:
    given = {
        "decoder_input_ids": torch.arange(2 * CANVAS).view(2, CANVAS),
        "self_conditioning_logits": torch.randn(2, CANVAS, V, generator=torch.Generator().manual_seed(0)),
        "max_new_tokens": CANVAS,
    }
    before = {key: value.clone() for key, value in given.items() if isinstance(value, Tensor)}
    with replayed():
        wanted = decoded(model, prompt(2), **given)
    for conditioning in diffusion_gemma.CONDITIONING:
        with fdpp.patch(model, conditioning=conditioning):
            assert decoded(model, prompt(2), **given) == wanted
    assert all(before[key].equal(given[key]) for key in before)


class Banned(LogitsProcessor):
    """Bans the lower half of the vocabulary, and sees the logits before the temperature."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, int]] = []

    def __call__(self, input_ids: Tensor, scores: Tensor, cur_step: Tensor) -> Tensor:
        self.seen.append((scores.clone(), int(cur_step)))
        return torch.where(torch.arange(V) < V // 2, -torch.inf, scores)


def test_processors_of_a_user_run_first(model: Any, fused: Counted) -> None:
    ours, own = Banned(), Banned()
    with replayed():
        wanted = decoded(model, prompt(2), logits_processor=LogitsProcessorList([own]))
    with fdpp.patch(model):
        assert decoded(model, prompt(2), logits_processor=LogitsProcessorList([ours])) == wanted
    assert fused.calls == len(ours.seen) == len(own.seen)
    assert all(a[1] == b[1] and torch.allclose(a[0], b[0], atol=1e-5) for a, b in zip(ours.seen, own.seen, strict=True))
    assert min(wanted[0][0][7:]) >= V // 2


def test_only_the_last_schedule_is_folded() -> None:
    first, last = (theirs.LinearTemperatureScheduleLogitsProcessor(0.4, t, 8) for t in (0.8, 0.9))
    schedule, others = diffusion_gemma.folded(LogitsProcessorList([first, last]))
    assert schedule is last and list(others) == [first]
    schedule, others = diffusion_gemma.folded(LogitsProcessorList([last, Banned()]))
    assert schedule is None and len(others) == 2
    assert diffusion_gemma.folded(LogitsProcessorList()) == (None, [])


def test_temperatures_are_the_schedules(model: Any) -> None:
    """All of them, bit for bit, without a copy from the host at any but the first step."""
    step = diffusion_gemma.DenoisingStep(model, False)
    schedule = theirs.LinearTemperatureScheduleLogitsProcessor(0.37, 0.81, 48)
    for cur_step in range(48, 0, -1):
        x = schedule(None, torch.ones(()), torch.tensor(cur_step, dtype=torch.int32))
        bound, t = step.numbers(0.1, schedule, cur_step, torch.device("cpu"))[0]
        assert bound == 0.1 and torch.ones(()) / t.float() == x
    assert len(step.tables) == 1
    assert step.numbers(0.1, None, 5, torch.device("cpu")).tolist() == [[0.1, 1.0]]


def test_stops_are_the_criterions(model: Any) -> None:
    """Stops and history, over random canvases, and after a reset."""
    generator = torch.Generator().manual_seed(0)
    for k in (0, 1, 3):
        ours, own = (theirs.StableAndConfidentStoppingCriteria(k, 0.7) for _ in range(2))
        stopped = 0
        for i in range(60):
            if i == 30:
                ours.reset()
                own.reset()
            argmax = torch.randint(0, 2, (4, 1), generator=generator).expand(4, 3).contiguous()
            logits = torch.randn(4, 3, 5, generator=generator) * 4
            entropy = torch.distributions.Categorical(logits=logits).entropy()
            zero = torch.zeros(())
            out = CanvasStep(argmax, argmax, argmax, entropy, zero, zero, entropy.mean(1))
            wanted = own(argmax, logits)
            stopped_now, ours.argmax_canvas_history = diffusion_gemma.stops(out, k, 0.7, ours.argmax_canvas_history)
            assert stopped_now.equal(wanted)
            stopped += int(wanted.sum())
            if k:
                assert ours.argmax_canvas_history.equal(own.argmax_canvas_history)
        assert 0 < stopped < 240


class Drafts(TextDiffusionStreamer):
    """Keeps what it is given."""

    def __init__(self, takes_logits: bool) -> None:
        self._takes_logits, self.drafts = takes_logits, []

    def put(self, value: Tensor) -> None: ...

    def end(self) -> None: ...

    def put_draft(self, value: Tensor | None = None, logits: Tensor | None = None) -> None:
        self.drafts.append((logits if value is None else value).clone())


@pytest.mark.parametrize("takes_logits", [False, True])
def test_streamers(model: Any, takes_logits: bool) -> None:
    """Of drafts or of logits; those of finished rows stay."""
    own = Drafts(takes_logits)
    with replayed():
        decoded(model, prompt(3), streamer=own, **SETTINGS["stops late"])
    for conditioning in diffusion_gemma.CONDITIONING:
        ours = Drafts(takes_logits)
        with fdpp.patch(model, conditioning=conditioning):
            decoded(model, prompt(3), streamer=ours, **SETTINGS["stops late"])
        assert len(ours.drafts) == len(own.drafts)
        for a, b in zip(ours.drafts, own.drafts, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


class OtherSampler(theirs.EntropyBoundSampler):
    pass


class OtherCriterion(theirs.StableAndConfidentStoppingCriteria):
    pass


@pytest.mark.parametrize("kind", [OtherSampler, OtherCriterion, None], ids=["sampler", "criterion", "overridden"])
def test_what_is_unknown_goes_to_the_models_own(
    model: Any, kind: type | None, fused: Counted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Token by token what an unpatched model gives, with torch's own draws."""
    if kind is OtherCriterion:
        monkeypatch.setattr(
            model, "_prepare_diffusion_stopping_criteria", lambda _: OtherCriterion(1, 0.005), raising=False
        )
    else:
        prepare = type(model)._prepare_sampler

        def prepared(config: Any) -> Any:
            sampler = prepare(model, config)
            if kind is None:
                sampler.accept_canvas = lambda canvas, *rest: type(sampler).accept_canvas(sampler, canvas, *rest)
            else:
                sampler.__class__ = kind
            return sampler

        monkeypatch.setattr(model, "_prepare_sampler", prepared, raising=False)
    wanted = decoded(model, prompt(2))
    with fdpp.patch(model):
        assert decoded(model, prompt(2)) == wanted
    assert fused.calls == 0


def test_no_criterion(model: Any, fused: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "_prepare_diffusion_stopping_criteria", lambda _: None, raising=False)
    with replayed():
        wanted = decoded(model, prompt(2))
    with fdpp.patch(model):
        assert decoded(model, prompt(2)) == wanted
    assert fused.calls == 24


def test_a_static_cache(fused: Counted, monkeypatch: pytest.MonkeyPatch) -> None:
    """The forward is compiled, here without code, and the bound is that of the call, not of the first one."""
    compile_, compiled = torch.compile, []

    def compiled_eagerly(function: Any, mode: str, fullgraph: bool) -> Any:
        ours = getattr(function, "__name__", "") == "head_outputs"
        compiled.append(ours)
        return compile_(function, backend="eager", fullgraph=fullgraph) if ours else partial(function)

    monkeypatch.setattr(torch, "compile", compiled_eagerly)
    settings = [{"sampler_config": Config(bound), "cache_implementation": "static"} for bound in (0.1, 6.0)]
    with replayed():
        wanted = [decoded(tiny_gemma(), prompt(2), **each) for each in settings]
    for conditioning in diffusion_gemma.CONDITIONING:
        compiled.clear()
        model = tiny_gemma()
        with fdpp.patch(model, conditioning=conditioning):
            assert [decoded(model, prompt(2), **each) for each in settings] == wanted
        assert sum(compiled) == 1
    assert fused.calls > 0


def test_a_forward_of_somebody_else(model: Any, fused: Counted) -> None:
    """accelerate's hooks stand in `forward`; its logits have had their softcap."""
    hooks = pytest.importorskip("accelerate.hooks")
    with replayed():
        wanted = decoded(model, prompt(2))
    hooked = hooks.add_hook_to_module(tiny_gemma(), hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    for conditioning in diffusion_gemma.CONDITIONING:
        with fdpp.patch(hooked, conditioning=conditioning):
            assert decoded(hooked, prompt(2)) == wanted
    assert fused.calls > 0


def test_threads() -> None:
    """Streamed signals of one thread are not those of another."""
    model = tiny_gemma()
    prompts = [prompt(1, seed=i) for i in range(4)]
    settings = {"t_min": 1e-6, "t_max": 2e-6, "sampler_config": Config(1e9), "max_new_tokens": CANVAS}
    given = [{"decoder_input_ids": prompt(1, CANVAS, seed=10 + i)} for i in range(4)]
    with fdpp.patch(model, conditioning="streamed"):
        alone = [decoded(model, p, **g, **settings) for p, g in zip(prompts, given, strict=True)]
        with ThreadPoolExecutor(4) as pool:
            calls = [pool.submit(decoded, model, p, **g, **settings) for p, g in zip(prompts, given, strict=True)]
            assert [call.result() for call in calls] == alone


@pytest.mark.parametrize("conditioning", diffusion_gemma.CONDITIONING)
def test_unpatched_it_is_what_it_was(conditioning: str) -> None:
    model = tiny_gemma()
    inner = model.model.decoder.self_conditioning
    before = dict(vars(model)), dict(vars(inner)), {name: id(value) for name, value in model.state_dict().items()}
    names = list(model.state_dict())
    patched = fdpp.patch(model, conditioning=conditioning)
    assert "_denoising_step -> fdpp's canvas step" in str(patched)
    assert list(model.state_dict()) == names and isinstance(model, nn.Module)
    again = fdpp.patch(model)
    assert "already patched" in str(again)
    fdpp.unpatch(model)
    assert (dict(vars(model)), dict(vars(inner))) == before[:2]
    assert model._denoising_step.__func__ is theirs.DiffusionGemmaGenerationMixin._denoising_step
    assert "undone" in str(patched)


@pytest.mark.parametrize("conditioning", diffusion_gemma.CONDITIONING)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_step_for_themselves(conditioning: str, copied: Any) -> None:
    model = tiny_gemma()
    fdpp.patch(model, conditioning=conditioning)
    wanted = decoded(model, prompt(2))
    other = copied(model)
    assert other._denoising_step.owner() is other
    if conditioning == "streamed":
        inner = other.model.decoder.self_conditioning
        assert vars(inner)["forward"].owner() is inner
    del model
    assert decoded(other, prompt(2)) == wanted
    fdpp.unpatch(other)
    assert "_denoising_step" not in vars(other)


def test_refusals(model: Any) -> None:
    with pytest.raises(ValueError, match="conditioning: expected one of logits, streamed, got 'fast'"):
        fdpp.patch(model, conditioning="fast")
    with pytest.raises(TypeError, match="takes no option speed"):
        fdpp.patch(model, speed=2)
    with pytest.raises(TypeError, match="takes no option conditioning"):
        fdpp.patch(nn.Linear(1, 1), conditioning="logits")

    class Changed(type(model)):  # type: ignore[misc]
        def _denoising_step(self, decoder_forward: Any, canvas: Any) -> None: ...

    changed = tiny_gemma()
    changed.__class__ = Changed
    with pytest.raises(ValueError, match=f"_denoising_step: expected {re.escape(diffusion_gemma.METHOD)}"):
        fdpp.patch(changed)
    assert "_denoising_step" not in vars(changed)


@pytest.mark.parametrize("added", ["past_key_values", "cache", "cash"])
def test_parameter_names_are_checked(added: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache may have its name of before transformers 5.24 or that of since; no other parameter may be new."""
    model = tiny_gemma()
    names = ", ".join(name for name in diffusion_gemma.PARAMETERS[:-1]) + f", {added}, **model_kwargs"
    made: dict[str, Any] = {}
    exec(f"def _denoising_step({names}): ...", made)
    made["_denoising_step"].__qualname__ = diffusion_gemma.METHOD
    monkeypatch.setattr(theirs.DiffusionGemmaGenerationMixin, "_denoising_step", made["_denoising_step"])
    if added == "cash":
        with pytest.raises(ValueError, match="expected the parameters"):
            fdpp.patch(model)
    else:
        with fdpp.patch(model):
            assert "_denoising_step" in vars(model)
