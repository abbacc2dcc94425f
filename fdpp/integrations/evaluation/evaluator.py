"""Requests of an evaluation, answered in batches of similar length, with a journal and a tally of the cost."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import torch

import fdpp
from fdpp.decoding.adapters import model_within
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.integrations.evaluation.journal import Journal, fingerprint, key_of
from fdpp.integrations.evaluation.likelihood import Pair, log_likelihoods
from fdpp.integrations.evaluation.progress import Progress
from fdpp.integrations.evaluation.responses import respond
from fdpp.integrations.evaluation.settings import asked_by
from fdpp.models.language_model import DiffusionLM

DEFAULT_LENGTH = 256
logger = logging.getLogger(__name__)


class Request(NamedTuple):
    """A prompt and how its task wants it answered.

    `settings` are the harness's, `until` (stop strings), `max_gen_toks`, `do_sample` with `temperature`, and fields of
    `DiffusionGenerationConfig` and of rules (`evaluation.settings`).
    """

    task: str
    context: str
    settings: dict[str, Any]


class Group(NamedTuple):
    """Requests that can share a batch: one task's, with the same settings of the decode and stop strings."""

    task: str
    config: DiffusionGenerationConfig
    stops: tuple[str, ...]


class Work(NamedTuple):
    """A request to be decoded: its place in the journal, its group and its prompt's ids."""

    key: str
    group: Group
    ids: list[int]


@dataclass
class Tally:
    """What responses cost; their tokens are those before EOS and before a stop string."""

    responses: int = 0
    tokens: int = 0
    nfe: int = 0
    seconds: float = 0.0

    def add(self, other: Tally) -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)

    def report(self) -> dict[str, float]:
        """The totals, tokens per second, NFE per response and tokens per forward."""
        return {
            **asdict(self),
            "tokens_per_second": self.tokens / self.seconds if self.seconds else 0.0,
            "nfe_per_response": self.nfe / max(self.responses, 1),
            "tokens_per_forward": self.tokens / max(self.nfe, 1),
        }


class Evaluator:
    """A model and a way to decode it.

    Args:
        model, tokenizer: a model of this package, perhaps in peft's wrapper, on its device, and its tokenizer.
        config: how responses are decoded, where a task does not ask for something else. Their length is not its
            `max_new_tokens` but `gen_length`; with `stop_at_eos=False` every block is decoded, and EOS and stop strings
            only cut the text.
        given: the fields of `config` that stay, whatever a task asks for (which is logged once); None: those that
            differ from the defaults.
        gen_length: length of every response; None: what the task asks for (`max_gen_toks`), else 256.
        batch_size: prompts decoded together, and masked rows of a likelihood.
        mc_num: samples of a likelihood's Monte Carlo estimate.
        check_greedy: say for every likelihood whether decoding one token per step gives the target. Without it the
            answer is False, as in the published evaluation: few tasks ask.
        add_bos_token: put BOS before every prompt and context where the tokenizer does not, as the published evaluation
            of Dream does.
        resume: folder of the journal of finished requests; what it holds already is not decoded again.
        rank: number of this process among those that share the requests; the first shows the progress
            on standard error.

    Attributes:
        tallies: what the responses of every task cost, equal greedy requests counted once.
        asked: the fields of `DiffusionGenerationConfig` that every task set.
    """

    def __init__(
        self,
        model: DiffusionLM,
        tokenizer: Any,
        config: DiffusionGenerationConfig | None = None,
        *,
        given: Collection[str] | None = None,
        gen_length: int | None = None,
        batch_size: int = 1,
        mc_num: int = 128,
        check_greedy: bool = False,
        add_bos_token: bool = False,
        resume: str | os.PathLike[str] | None = None,
        rank: int = 0,
    ) -> None:
        for name, value in (("gen_length", gen_length), ("batch_size", batch_size), ("mc_num", mc_num)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
        if add_bos_token and not tokenizer.bos_token:
            raise ValueError("add_bos_token: expected a tokenizer with a BOS token, got one without")
        model = model_within(model)
        self.model, self.tokenizer = model.eval(), tokenizer
        config = DiffusionGenerationConfig() if config is None else config
        self.config = config if config.seed is not None else replace(config, seed=0)
        self.given = set(differing(config) if given is None else given)
        self.gen_length, self.batch_size, self.mc_num = gen_length, batch_size, mc_num
        self.check_greedy, self.rank = check_greedy, rank
        self.add_bos_token = add_bos_token
        self.journal = Journal(resume, rank)
        self.model_key = f"{fdpp.__version__} {fingerprint(model)}"
        self.tallies: dict[str, Tally] = {}
        self.asked: dict[str, dict[str, Any]] = {}
        self.counted: set[str] = set()
        self.warned = False
        self.noted: set[str] = set()

    def encode(self, text: str) -> list[int]:
        """Token ids, with special tokens unless the text already begins with BOS, as from a chat template."""
        bos, first = self.tokenizer.bos_token, self.tokenizer.bos_token_id
        ids = self.tokenizer(text, add_special_tokens=not (bos and text.startswith(bos)))["input_ids"]
        return [first, *ids] if self.add_bos_token and ids[:1] != [first] else ids

    def fit(self, ids: list[int], room: int) -> list[int]:
        """The last ids of a prompt, as many as fit into the model's window with `room` others."""
        window = self.model.config.max_position_embeddings
        if room > window:
            raise ValueError(f"expected responses and targets within the model's window of {window}, got {room} tokens")
        if len(ids) + room > window and not self.warned:
            self.warned = True
            logger.warning("a prompt of %d tokens is cut to its last %d, others may be, too", len(ids), window - room)
        return ids[max(len(ids) + room - window, 0) :]

    def responses(self, requests: Sequence[Request]) -> list[str]:
        """Responses in the order of `requests`, cut before EOS and before the first stop string.

        Prompts are decoded longest first, so that a batch too large for the device is the first one.
        """
        work, repeats = [], Counter[str]()
        for request in requests:
            item = self.work_of(request)
            repeats[item.key] += item.group.config.draws  # a repeated request is another sample
            work.append(item._replace(key=f"{item.key}-{repeats[item.key]}"))
        groups: dict[str, tuple[Group, dict[str, list[int]]]] = {}
        for item in work:
            groups.setdefault(repr(item.group), (item.group, {}))[1][item.key] = item.ids
        keys = {item.key for item in work}
        done = sum(key in self.journal for key in keys)
        with self.progress("responses", len(keys), done) as bar:
            tally = Tally()
            for group, members in groups.values():
                self.decode(group, members, tally, bar)
        for item in work:
            if item.key not in self.counted:
                self.counted.add(item.key)
                record = self.journal[item.key]
                cost = Tally(1, record["tokens"], record["nfe"], record["seconds"])
                self.tallies.setdefault(item.group.task, Tally()).add(cost)
        return [self.journal[item.key]["text"] for item in work]

    def progress(self, what: str, total: int, done: int) -> Progress:
        return Progress(what, total, done, shown=self.rank == 0)

    def work_of(self, request: Request) -> Work:
        group = self.group_of(request.task, request.settings)
        ids = self.fit(self.encode(request.context), group.config.max_new_tokens)
        return Work(key_of(self.model_key, repr(group.config), group.stops, ids), group, ids)

    def group_of(self, task: str, settings: Mapping[str, Any]) -> Group:
        """How requests of a task with these settings are decoded.

        Raises:
            ValueError: a setting that has no meaning here, or a value that does not fit; it names both.
        """
        try:
            asked, stops = asked_by(settings, self.config.rule)
            if self.gen_length is not None:
                asked["max_new_tokens"] = self.overruled(task, "max_new_tokens", self.gen_length, asked)
            for name in self.given & asked.keys() - {"max_new_tokens"}:
                asked[name] = self.overruled(task, name, getattr(self.config, name), asked)
            self.asked.setdefault(task, {}).update(asked)
            config = replace(self.config, **{"max_new_tokens": DEFAULT_LENGTH, **asked})
            return Group(task, self.model.settled(config, {}), stops)
        except (TypeError, ValueError) as error:
            raise ValueError(f"task {task}: {error}") from error

    def overruled(self, task: str, name: str, value: Any, asked: Mapping[str, Any]) -> Any:
        """`value`, with a note if the task asked for another."""
        text = f"task {task} asks for {name}={asked.get(name, value)!r}, {value!r} was given and stays"
        if asked.get(name, value) != value and text not in self.noted:
            self.noted.add(text)
            logger.warning(text)
        return value

    def decode(self, group: Group, members: dict[str, list[int]], tally: Tally, bar: Progress) -> None:
        """Decode what the journal lacks of a group; `tally` counts what it costs.

        A sampled request's noise depends on its place in the order of decoding, whatever the batch size. So a batch
        that is only partly in the journal is decoded again.
        """
        keys = sorted(members, key=lambda key: -len(members[key]))
        if not group.config.draws:
            keys = [key for key in keys if key not in self.journal]
        seed = group.config.seed or 0
        for start in range(0, len(keys), self.batch_size):
            batch = keys[start : start + self.batch_size]
            missing = sum(key not in self.journal for key in batch)
            if not missing:
                continue
            seeded = replace(group.config, seed=seed + start)
            responses = respond(self.model, self.tokenizer, [members[key] for key in batch], seeded, group.stops)
            self.journal.add({key: asdict(response) for key, response in zip(batch, responses, strict=True)})
            for response in responses:
                tally.add(Tally(1, response.tokens, response.nfe, response.seconds))
            shown = tally.report()
            figures = (
                f"{shown['tokens_per_second']:.0f} tok/s, {shown['nfe_per_response']:.1f} NFE, "
                f"{shown['tokens_per_forward']:.2f} tokens per forward"
            )
            bar.update(missing, figures)

    def likelihoods(self, requests: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """The log-likelihood (`evaluation.likelihood`) of every target of `(context, target)`, and whether greedy
        decoding gives it."""
        pairs = [self.pair_of(context, target) for context, target in requests]
        grid = self.config.block_length if self.model.block_causal else None
        asked = (self.mc_num, self.config.seed, self.check_greedy, *([] if grid is None else [grid]))
        keys = [key_of(self.model_key, *asked, *pair) for pair in pairs]
        self.journal.add(
            {
                key: {"value": 0.0, "greedy": True}
                for key, pair in zip(keys, pairs, strict=True)
                if not pair.target and key not in self.journal
            }
        )
        todo = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in self.journal}
        order = sorted(todo, key=lambda key: -sum(map(len, todo[key])))
        unique, seed = len(set(keys)), self.config.seed or 0
        values = log_likelihoods(self.model, [todo[key] for key in order], self.mc_num, self.batch_size, seed, grid)
        with self.progress("likelihoods", unique, unique - len(order)) as bar:
            for key, value in zip(order, values, strict=True):
                greedy = self.check_greedy and self.is_greedy(todo[key])
                self.journal.add({key: {"value": value, "greedy": greedy}})
                bar.update()
        return [(self.journal[key]["value"], self.journal[key]["greedy"]) for key in keys]

    def pair_of(self, context: str, target: str) -> Pair:
        """Ids of both, split where the context ends; its trailing white space goes to the target."""
        split, whole = len(self.encode(context.rstrip())), self.encode(context + target)
        return Pair(self.fit(whole[:split], len(whole) - split), whole[split:])

    def is_greedy(self, pair: Pair) -> bool:
        """Whether decoding one token per step, without a cache, gives the target.

        It is one block, or of a block-causal model as many as it has.
        """
        prompt = torch.tensor([pair.context], dtype=torch.int64, device=self.model.device)
        out = self.model.generate(
            prompt,
            max_new_tokens=len(pair.target),
            block_length=self.config.block_length if self.model.block_causal else min(len(pair.target), 1024),
            rule=fdpp.Quota(1),
            cache="none",
            stop_at_eos=False,
        )
        return out.sequences[0, prompt.shape[1] :].tolist() == pair.target


def differing(config: DiffusionGenerationConfig) -> set[str]:
    """The fields of `config` that do not have their defaults."""
    default = DiffusionGenerationConfig()
    return {field.name for field in fields(config) if getattr(config, field.name) != getattr(default, field.name)}
