"""`generate` from asyncio: many tasks, streams to an async reader, and readers that go away."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import documents
import pytest
import torch
from small import prompts, small_model
from torch import Tensor
from transformers import AsyncTextIteratorStreamer, TextIteratorStreamer

import fdpp
from fdpp import LLaDAModelLM, tiny
from fdpp.decoding import static

SERVING = Path(__file__).parents[1] / "docs" / "serving.md"
SETTINGS: dict[str, Any] = {"max_new_tokens": 128, "rule": fdpp.Threshold(0.9)}
PROBLEMS = tiny.generate("held-out", 6, seed=3)
PATIENCE = 60.0


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """`asyncio.run`; what waits for ever fails."""

    async def limited() -> Any:
        return await asyncio.wait_for(coroutine, PATIENCE)

    return asyncio.run(limited())


@pytest.fixture(scope="module")
def page() -> Iterator[SimpleNamespace]:
    """What the page on serving defines in its section on asyncio."""
    [code] = [block.code for block in documents.blocks(SERVING) if "asyncio" in block.code]
    names: dict[str, Any] = {}
    exec(compile(code.replace("asyncio.run(main())", ""), str(SERVING), "exec"), names)
    yield SimpleNamespace(**{name: value for name, value in names.items() if name != "__builtins__"})
    names["threads"].shutdown()


@pytest.fixture(scope="module")
def texts(page: SimpleNamespace) -> list[str]:
    """The answers of calls alone."""
    return [decoded(page, problem.prompt) for problem in PROBLEMS]


def decoded(page: SimpleNamespace, prompt: str) -> str:
    ids = page.tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = page.model.generate(ids, **SETTINGS)
    return page.tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True)


async def read(stream: AsyncIterator[str]) -> str:
    return " ".join(" ".join([part async for part in stream]).split())


class Watched(LLaDAModelLM):
    """Counts forwards. From the given one on each waits until it is let go."""

    def watch(self, held_from: int = 10**9) -> Watched:
        self.forwards, self.held_from, self.let_go, self.held = 0, held_from, threading.Event(), threading.Event()
        return self

    def project(self, hidden: Tensor) -> Tensor:
        self.forwards += 1
        if self.forwards >= self.held_from:
            self.held.set()
            assert self.let_go.wait(PATIENCE)
        return super().project(hidden)


def model_of_words() -> LLaDAModelLM:
    """Untrained, with as many ids as the embedded model's tokenizer."""
    return small_model(vocab_size=86)


def watched(held_from: int) -> Watched:
    llada = model_of_words()
    llada.__class__ = Watched
    return llada.watch(held_from)


LONG: dict[str, Any] = {"max_new_tokens": 32, "block_length": 8, "rule": fdpp.Quota(), "stop_at_eos": False}


# Answers


def test_tasks_in_the_default_executor_get_the_answers_of_calls_alone() -> None:
    llada = small_model()
    requests = [prompts(1 + n % 3, 5 + n, seed=n) for n in range(8)]
    alone = [llada.generate(ids, **LONG).sequences for ids in requests]

    async def all_at_once(**more: Any) -> list[Any]:
        return await asyncio.gather(*(asyncio.to_thread(llada.generate, ids, **LONG, **more) for ids in requests))

    for engine in ("eager", "static"):
        outs = run(all_at_once(engine=engine))
        assert all(out.sequences.equal(want) for out, want in zip(outs, alone, strict=True))


def test_streams_that_are_read_at_once_are_the_answers_of_calls_alone(page: SimpleNamespace, texts: list[str]) -> None:
    async def all_at_once() -> list[str]:
        return await asyncio.gather(*(read(page.blocks(p.prompt, **SETTINGS)) for p in PROBLEMS))

    assert run(all_at_once()) == texts


def test_a_block_is_read_while_the_next_is_decoded(page: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The decode stands still in its second block until the first has been read."""
    llada = watched(held_from=9)
    monkeypatch.setitem(page.blocks.__globals__, "model", llada)

    async def reader() -> int:
        count = 0
        async for _ in page.blocks("Mia has 12 apples", **LONG):
            count += 1
            assert llada.forwards <= 9 or llada.let_go.is_set()
            llada.let_go.set()
        return count

    assert run(reader()) == 4 and llada.forwards == 32


def test_the_loop_goes_on_while_a_thread_decodes() -> None:
    llada = watched(held_from=1)

    async def both() -> None:
        decoding = asyncio.ensure_future(asyncio.to_thread(llada.generate, prompts(1, 5), **LONG))
        while not llada.held.is_set():
            await asyncio.sleep(0.001)
        assert not decoding.done()
        llada.let_go.set()
        assert int((await decoding).nfe) == 32

    run(both())


# Readers that go away


def test_a_decode_in_a_thread_goes_on_when_its_task_is_cancelled() -> None:
    """Which the page says. The task ends at once."""
    llada, ids = watched(held_from=3), prompts(1, 5)

    async def cancelled() -> None:
        task = asyncio.ensure_future(asyncio.to_thread(llada.generate, ids, **LONG))
        while not llada.held.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert llada.forwards == 3
        llada.let_go.set()

    run(cancelled())  # whose end waits for the default executor
    assert llada.forwards == 32
    assert llada.generate(ids, **LONG).sequences.equal(model_of_words().generate(ids, **LONG).sequences)


@pytest.mark.parametrize("engine", ["eager", "static"])
@pytest.mark.parametrize("way", ["cancelled", "closed"])
def test_a_stream_that_nobody_reads_ends_its_decode(
    page: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, way: str, engine: str
) -> None:
    """With the forward that it is in, whether its task is cancelled or it leaves the loop; nothing stays locked."""
    llada, ids = watched(held_from=9), prompts(1, 5)
    monkeypatch.setitem(page.blocks.__globals__, "model", llada)
    pool = ThreadPoolExecutor(1)
    monkeypatch.setitem(page.blocks.__globals__, "threads", pool)
    seen = []

    async def reader() -> None:
        async with aclosing(page.blocks("Mia has 12 apples", engine=engine, **LONG)) as stream:
            async for part in stream:
                seen.append(part)
                if way == "closed":
                    break

    async def leave() -> None:
        task = asyncio.create_task(reader())
        while not llada.held.is_set():
            await asyncio.sleep(0.001)
        if way == "cancelled":
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            await task
        llada.let_go.set()
        await asyncio.get_running_loop().run_in_executor(pool, int)  # the decode's thread is free

    run(leave())
    pool.shutdown()
    assert len(seen) == 1 and 9 <= llada.forwards <= 10
    config = llada.settled(None, {"engine": "static"})
    with static.steps_for(llada, config, torch.device("cpu")) as held:
        assert held is not None
    again = llada.watch().generate(ids, engine=engine, **LONG)
    assert again.sequences.equal(model_of_words().generate(ids, **LONG).sequences)


def test_a_stopping_criterion_ends_the_decode_of_a_client_that_has_gone() -> None:
    """After the block: the sequence is complete up to there."""
    llada, gone, ids = watched(held_from=3), threading.Event(), prompts(2, 5)

    def criterion(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full(input_ids.shape[:1], gone.is_set(), device=input_ids.device)

    async def leave() -> Any:
        decoding = asyncio.to_thread(llada.generate, ids, stopping_criteria=[criterion], **LONG)
        task = asyncio.ensure_future(decoding)
        while not llada.held.is_set():
            await asyncio.sleep(0.001)
        gone.set()
        llada.let_go.set()
        return await task

    out = run(leave())
    whole = model_of_words().generate(ids, **LONG)
    assert llada.forwards == 8 and out.nfe.tolist() == [8, 8]
    assert out.sequences[:, :13].equal(whole.sequences[:, :13])
    assert bool((out.sequences[:, 13:] == llada.config.pad_token_id).all())


def test_a_loop_that_was_closed_does_not_hold_the_decodes_thread(page: SimpleNamespace) -> None:
    """The server's loop has ended; the thread ends with the loop's error."""
    llada, pool = watched(held_from=3), ThreadPoolExecutor(1)

    class Stream(page.Stream):
        def put_draft(self, tokens: Tensor) -> None: ...

    async def begin() -> Any:
        stream = Stream()
        future = pool.submit(llada.generate, prompts(1, 5), streamer=stream, **LONG)
        while not llada.held.is_set():
            await asyncio.sleep(0.001)
        return future

    future = run(begin())
    llada.let_go.set()
    error = future.exception(PATIENCE)
    pool.shutdown()
    assert isinstance(error, RuntimeError) and "closed" in str(error) and llada.forwards == 8


# Errors


def test_an_error_in_one_request_hurts_no_other(page: SimpleNamespace, texts: list[str]) -> None:
    """Prompts that are too long, and logits that are no numbers, between good ones; every reader hears of its own."""

    def spoil(input_ids: Tensor, scores: Tensor, cur_step: Any = None) -> Tensor:
        return scores.fill_(float("nan"))

    async def all_at_once() -> list[Any]:
        good = [read(page.blocks(p.prompt, **SETTINGS)) for p in PROBLEMS]
        long = [read(page.blocks("Mia " * 200, **SETTINGS)) for _ in range(3)]
        spoilt = [read(page.blocks(PROBLEMS[0].prompt, logits_processor=[spoil], **SETTINGS)) for _ in range(3)]
        return await asyncio.gather(*long[:2], *good[:3], *spoilt, *good[3:], *long[2:], return_exceptions=True)

    outcome = run(all_at_once())
    assert [text for text in outcome if isinstance(text, str)] == texts
    errors = [str(error) for error in outcome if not isinstance(error, str)]
    assert sum("prompt of 200 tokens and 128 new ones exceed" in error for error in errors) == 3
    assert sum("logits held NaN" in error for error in errors) == 3 and len(errors) == 6


# The streamers of transformers


def test_the_text_iterator_of_transformers(page: SimpleNamespace, texts: list[str]) -> None:
    streamer = TextIteratorStreamer(page.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=PATIENCE)
    ids = page.tokenizer(PROBLEMS[0].prompt, return_tensors="pt")["input_ids"]
    thread = threading.Thread(target=page.model.generate, args=(ids,), kwargs={"streamer": streamer, **SETTINGS})
    thread.start()
    parts = list(streamer)
    thread.join()
    assert "".join(parts) == texts[0] and len([part for part in parts if part]) > 1


@pytest.mark.skipif(sys.version_info < (3, 11), reason="transformers uses asyncio.timeout")
def test_the_async_text_iterator_of_transformers(page: SimpleNamespace, texts: list[str]) -> None:
    async def stream(prompt: str) -> str:
        streamer = AsyncTextIteratorStreamer(page.tokenizer, skip_prompt=True, skip_special_tokens=True)
        ids = page.tokenizer(prompt, return_tensors="pt")["input_ids"]
        decoding = asyncio.ensure_future(asyncio.to_thread(page.model.generate, ids, streamer=streamer, **SETTINGS))
        text = "".join([part async for part in streamer])
        await decoding
        return text

    async def all_at_once() -> list[str]:
        return await asyncio.gather(*(stream(problem.prompt) for problem in PROBLEMS))

    assert run(all_at_once()) == texts


def test_they_take_one_sequence() -> None:
    tokenizer = tiny.load()[1]
    with pytest.raises(ValueError, match="only supports batch size 1"):
        small_model().generate(prompts(2, 5), streamer=TextIteratorStreamer(tokenizer), **LONG)
