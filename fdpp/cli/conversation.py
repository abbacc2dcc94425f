"""A conversation with a model: its turns, their prompt within the model's window, and its answers."""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, TextIO

import torch

from fdpp.cli.live import LiveView, PlainView
from fdpp.cli.options import ended_by_turn
from fdpp.cli.terminal import is_live, word_wrap
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.models.language_model import DiffusionLM


@dataclass(frozen=True)
class Prompt:
    """A question with the turns before it.

    Attributes:
        question: its text.
        ids: `[1, P]` int64.
        dropped: how many of the oldest questions, with their answers, were left out for good to fit the window.
        unknown: how many of the ids are the tokenizer's unknown token.
    """

    question: str
    ids: torch.Tensor
    dropped: int
    unknown: int


@dataclass(frozen=True)
class Answer:
    text: str
    tokens: int
    nfe: int
    seconds: float

    def figures(self) -> str:
        per_forward, per_second = self.tokens / self.nfe, self.tokens / self.seconds
        counts = f"{self.tokens} tokens, {self.nfe} forwards (NFE), {per_forward:.2f} tokens per forward"
        return f"{counts}, {per_second:.0f} tok/s"


class Chat:
    """Turns in the tokenizer's chat template; without one every question is a prompt of its own.

    Attributes:
        remembers: whether the tokenizer has a chat template.
        turns: messages of user and assistant, in turn; a question whose answer was not finished leaves none.
    """

    def __init__(self, model: DiffusionLM, tokenizer: Any, config: DiffusionGenerationConfig) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, ended_by_turn(config, model, tokenizer)
        self.remembers = bool(tokenizer.chat_template)
        self.turns: list[dict[str, str]] = []
        self.asked = 0

    def encode(self, question: str, dropped: int) -> list[int]:
        """Ids of the question and the turns before it, without the first `dropped` questions and their answers."""
        if not self.remembers:
            return self.tokenizer(question)["input_ids"]
        turns = [*self.turns[2 * dropped :], {"role": "user", "content": question}]
        text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prepare(self, question: str) -> Prompt:
        """The prompt that asks `question`; forgets the oldest turns if they leave no room for an answer.

        A question that is too long even by itself forgets no turn; `answer` refuses it.
        """
        room = self.model.config.max_position_embeddings - self.config.max_new_tokens
        ids, dropped = self.encode(question, 0), 0
        while len(ids) > room and 2 * dropped < len(self.turns):
            dropped += 1
            ids = self.encode(question, dropped)
        if len(ids) > room:
            dropped = 0
        del self.turns[: 2 * dropped]
        unknown = self.tokenizer.unk_token_id
        return Prompt(
            question=question,
            ids=torch.tensor([ids], dtype=torch.int64, device=self.model.device),
            dropped=dropped,
            unknown=0 if unknown is None else ids.count(unknown),
        )

    def answer(self, prompt: Prompt, out: TextIO) -> Answer:
        """Answer on `out`: unmasked before the reader's eyes in a terminal, block by block elsewhere.

        Raises what `generate` raises; the turns are then as before.
        """
        config = self.config
        if config.temperature > 0.0:
            # A repeated question gets another sample.
            config = replace(config, seed=((config.seed or 0) + self.asked) % 2**63)
        self.asked += 1
        live = is_live(out)
        view: Any = nullcontext(PlainView(self.tokenizer, out))
        if live:
            view = LiveView(self.tokenizer, self.model.config.mask_token_id, out)
        started = time.perf_counter()
        with view as streamer:
            decoded: Any = self.model.generate(
                prompt.ids, generation_config=config, streamer=streamer, tokenizer=self.tokenizer
            )
        seconds = time.perf_counter() - started
        response = decoded.sequences[0, prompt.ids.shape[1] :]
        text = self.tokenizer.decode(response, skip_special_tokens=True).strip()
        if live:
            print(word_wrap(out)(text), file=out, flush=True)
        if self.remembers:
            asked, said = {"role": "user", "content": prompt.question}, {"role": "assistant", "content": text}
            self.turns += [asked, said]
        nfe = int(decoded.nfe)
        return Answer(text, round(float(decoded.tokens_per_forward) * nfe), nfe, seconds)

    def forget(self) -> None:
        """Start over."""
        self.turns.clear()
