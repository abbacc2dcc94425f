"""Several threads at once: on one model, on two, while steps are captured."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import pytest
import torch
from captures import captured_on_cpu
from small import left_pad, prompts, small_model
from torch import Tensor

import fdpp
from fdpp import LLaDAModelLM
from fdpp.decoding import static
from fdpp.models import joined
from fdpp.step import gpu

THREADS, DECODES = 8, 200
RULES = (fdpp.Frechet(0.1), fdpp.Quota(2), fdpp.Threshold(0.5))


@pytest.fixture(autouse=True)
def switching_often() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def request(number: int) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """Prompts of one to three rows and of many lengths, and settings, by number."""
    rows = [prompts(1, 3 + (number * 7 + 5 * b) % 40, seed=number + b)[0] for b in range(1 + number % 3)]
    settings = {"rule": RULES[number % 3], "cache": ("dual", "prefix")[number % 2], "drafts": 1 + number % 2}
    return left_pad(rows), {**settings, "max_new_tokens": 12, "block_length": 4}


@pytest.mark.parametrize("engine", ["eager", "static", "captured"])
def test_the_answers_of_many_threads_are_those_of_one(engine: str) -> None:
    """Two models, of which every thread uses both."""
    models = [small_model(seed) for seed in range(2)]
    requests = [request(number) for number in range(24)]
    alone = [[model.generate(*prompt, engine="eager", **settings) for prompt, settings in requests] for model in models]

    def decode(number: int) -> bool:
        which, index = number % 2, number % 24
        prompt, settings = requests[index]
        out = models[which].generate(*prompt, engine=engine if engine == "eager" else "static", **settings)
        want = alone[which][index]
        return out.sequences.equal(want.sequences) and out.nfe.equal(want.nfe)

    with captured_on_cpu() if engine == "captured" else nullcontext(), ThreadPoolExecutor(THREADS) as pool:
        right = list(pool.map(decode, range(DECODES)))
    assert right == [True] * DECODES


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_threads_capture_and_replay(dtype: torch.dtype) -> None:
    """On a GPU, two models that begin without a capture; every answer equals that of the same steps alone."""
    models = [small_model(seed, n_heads=2, n_kv_heads=1).to("cuda", dtype) for seed in range(2)]
    requests = [request(number) for number in range(24)]

    def decode(number: int) -> Tensor:
        prompt, settings = requests[number % 24]
        ids = [part.cuda() for part in prompt]
        return models[number % 2].generate(*ids, engine="static", **settings).sequences.cpu()

    alone = [decode(number) for number in range(24)]
    for model in models:
        model.forget_captures()
    with ThreadPoolExecutor(THREADS) as pool:
        together = list(pool.map(decode, range(DECODES)))
    assert all(out.equal(alone[number % 24]) for number, out in enumerate(together))
    assert all(step.graph is not None for model in models for step in static.steps_of(model))


def test_one_decode_at_a_time_has_the_static_steps() -> None:
    """Per model: another model's static steps are free."""
    llada, other, inside, most = small_model(), small_model(), threading.Lock(), []

    def decode(number: int) -> None:
        model = other if number == 0 else llada
        config = model.settled(None, {"engine": "static"})
        with static.steps_for(model, config, torch.device("cpu")) as held:
            assert held is not None
            if model is llada:
                most.append(inside.acquire(blocking=False))
                threading.Event().wait(0.002)
                inside.release()

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(decode, range(30)))
    assert most == [True] * 29


def test_a_decode_that_waits_can_be_interrupted_and_leaves_nothing_locked() -> None:
    llada = small_model()
    config = llada.settled(None, {"engine": "static"})
    with pytest.raises(KeyboardInterrupt), static.steps_for(llada, config, torch.device("cpu")):
        raise KeyboardInterrupt
    with static.steps_for(llada, config, torch.device("cpu")) as held:
        assert held is not None and held.owner == threading.get_ident()
    assert held.owner is None and not held.lock.locked()


def test_captures_are_forgotten_while_another_thread_decodes() -> None:
    llada, stop = small_model(), threading.Event()
    prompt, settings = request(5)
    want = llada.generate(*prompt, engine="eager", **settings)

    def forget() -> None:
        while not stop.is_set():
            llada.forget_captures()

    thread = threading.Thread(target=forget)
    thread.start()
    try:
        outs = [llada.generate(*prompt, engine="static", **settings) for _ in range(10)]
    finally:
        stop.set()
        thread.join()
    assert all(out.sequences.equal(want.sequences) for out in outs)


class Forgetting(list[int]):
    """A setting of a model that forgets the model's captures when it is looked at, as another thread may just then."""

    def __init__(self, model: LLaDAModelLM) -> None:
        super().__init__([1])
        self.model = model

    def __iter__(self) -> Iterator[int]:
        self.model.forget_captures()
        return super().__iter__()


def test_captures_are_forgotten_while_the_model_is_looked_at() -> None:
    llada = small_model()
    prompt, settings = request(5)
    want = llada.generate(*prompt, engine="static", **settings)
    assert static.steps_of(llada)
    vars(llada)["looked_at"] = Forgetting(llada)
    out = llada.generate(*prompt, engine="static", **settings)
    assert out.sequences.equal(want.sequences)
    assert not static.steps_of(llada)  # this decode kept its own to its end


def test_steps_are_counted_while_another_thread_decodes() -> None:
    llada = small_model()

    def decode(number: int) -> None:
        prompt, settings = request(number)
        llada.generate(*prompt, engine="static", **settings)

    with ThreadPoolExecutor(1) as pool:
        decodes = [pool.submit(decode, number) for number in range(12)]
        while not all(each.done() for each in decodes):
            static.steps_of(llada)
    assert static.steps_of(llada) and all(each.exception() is None for each in decodes)


def test_weights_are_joined_once(monkeypatch: pytest.MonkeyPatch) -> None:
    llada: LLaDAModelLM = small_model()
    made, join = [], joined.Joined.join

    def slow(self: joined.Joined, weights: Any, parts: Any) -> Any:
        made.append(self)
        threading.Event().wait(0.01)
        return join(self, weights, parts)

    monkeypatch.setattr(joined.Joined, "join", slow)
    x = prompts(1, 9)
    with ThreadPoolExecutor(THREADS) as pool:
        outs = list(pool.map(lambda _: llada.generate(x, max_new_tokens=4, engine="eager").sequences, range(THREADS)))
    assert len(made) == len(set(map(id, made))) == 4 and all(out.equal(outs[0]) for out in outs)


def test_no_two_graphs_have_the_same_tickets(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    monkeypatch.setattr(gpu, "spare", {device: torch.zeros(60_000, dtype=torch.int32)})
    with ThreadPoolExecutor(THREADS) as pool:
        given = list(pool.map(lambda B: gpu.ticket_of_graph(device, B % 7 + 1), range(4000)))
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in given)
    assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))
    assert all(t.data_ptr() % 16 == spans[0][0] % 16 for t in given)
