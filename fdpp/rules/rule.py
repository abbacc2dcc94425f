"""What a rule is: which proposals of a step may be committed together.

A profile is the sequence's masked positions sorted by confidence, c_(1) >= ... >= c_(n), equal ones by position. A rule
accepts some prefix lengths; a step commits the longest accepted one, and at least one position while any is masked.
That much is the predicate, and compiled into the fused step. A rule that has to see more says what it `needs`, keeps
what it finds in a memory of its own (`observe`) and changes the step's decision (`decide`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from fdpp.attention.probe import Probe
from fdpp.selection import Selection


class Needs(NamedTuple):
    """What a rule has to see beyond the logits of masked positions; a decode asks this and not the rule's class.

    Attributes:
        logits: the logits of whole positions, all of the block's: no fused head, a sharded vocabulary is gathered.
        block: proposals and confidences at the block's committed positions too.
        fed: the model's confidence at every column that is fed (`Sight.fed_confidence`).
        attention: queries and keys of the layers `Rule.probed`. They are read at columns given as numbers, so such a
            decode is not captured, and no process of a sharded model has those of all heads.
        rows: mask rows beside the sequence (`Rule.rows`). Full forwards alone feed them (`cache="none"`), and what a
            draft's rows would be is not defined.
    """

    logits: bool = False
    block: bool = False
    fed: bool = False
    attention: bool = False
    rows: bool = False


class Rows(NamedTuple):
    """E mask tokens that are fed beside a sequence of L columns and that no column of it sees.

    Attributes:
        columns: `[E]` int64, the columns in whose place they stand: their position ids are those of these columns.
        sees: `[E, L + E]` bool, which columns and which of the rows each of them sees.
    """

    columns: Tensor
    sees: Tensor


class Sight(NamedTuple):
    """What one forward shows of D states of b sequences, whose block has T columns.

    Attributes:
        states: `[b, D, T]` int64, the block's tokens in each state.
        logits: `[b, D, T, V]` of the block.
        tokens: `[b, D, n]` int64, all that was fed.
        block, fed: the columns of the block and of what was fed, each a slice or an int64 tensor of columns.
        full: whether everything was fed, as in every block's first forward.
        length: columns of a sequence, L.
        padding: `[b]` int64, columns on the left that hold no token; None: there are none.
        mask_id: the id that marks a masked position.
        rows: `[b, D, E, V]`, the logits of `Rule.rows`; None without `Needs.rows`.
        probe: the forward's queries and keys; None without `Needs.attention`.
        fed_confidence: the model's confidence at what was fed, float32 `[b, D, n]`, where `Needs.fed`.
    """

    states: Tensor
    logits: Tensor
    tokens: Tensor
    block: slice | Tensor
    fed: slice | Tensor
    full: bool
    length: int
    padding: Tensor | None
    mask_id: int
    rows: Tensor | None
    probe: Probe | None
    fed_confidence: Callable[[], Tensor]


Memory = Any
"""What a rule remembers of D states: a NamedTuple of tensors `[b, D, ...]`, or of `[b * D, ...]` in a step."""


class Number(NamedTuple):
    """A field of a rule: the numbers that it may be, and how the command line has it.

    Attributes:
        interval: such as `"[0, 1)"`; of a `whole` number the least one.
        about: what it is, in a few words.
        unit: what stands for it in the help.
        option: its name on the command line, where that is not the field's.
        optional: whether None is allowed.
        line: whether confidences are compared with it.
    """

    interval: str
    about: str
    unit: str = "P"
    option: str | None = None
    whole: bool = False
    optional: bool = False
    line: bool = False

    def check(self, rule: str, name: str, value: Any) -> None:
        """Raise `ValueError` unless `value` may be the field `name` of a `rule`."""
        if value is None and self.optional:
            return
        if self.whole:
            if not isinstance(value, int) or isinstance(value, bool) or value < int(self.interval):
                expected = f"{name} as an int of at least {self.interval}{', or None' if self.optional else ''}"
                raise ValueError(f"{rule}: expected {expected}, got {value!r}")
            return
        low, high = (float(bound) for bound in self.interval[1:-1].split(","))
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        excluded = (self.interval[0] == "(" and value == low) or (self.interval[-1] == ")" and value == high)
        # Not by `math.isfinite`, which PyTorch 2.11's compiler cannot follow; a NaN is in no interval.
        if not is_number or not low <= value <= high or excluded or value in (math.inf, -math.inf):
            raise ValueError(f"{rule}: expected {name} in {self.interval}, got {value!r}")


def number(default: float, interval: str, about: str, **more: Any) -> Any:
    """A field of a rule that is a finite number in `interval`; `more` are those of `Number`."""
    return dataclasses.field(default=default, metadata={"number": Number(interval, about, **more)})


def whole(default: int | None, least: int, about: str, **more: Any) -> Any:
    """A field of a rule that is an int of at least `least`, or None where that is the `default`."""
    spec = Number(str(least), about, "N", whole=True, optional=default is None, **more)
    return dataclasses.field(default=default, metadata={"number": spec})


@dataclass(frozen=True)
class Curve:
    """A score of every prefix length that falls as the prefix grows, and the limit that it must stay above."""

    name: str
    limit: float
    scores: list[float]


class Rule:
    """Base of all rules: a frozen dataclass and one predicate, in one file.

    A subclass names `predicate`, a `@triton.jit` function `(n, last, total, p0, p1) -> bool` of plain arithmetic. For
    every prefix of the sorted profile at once it sees the prefix's length `n`, the cost `last` of its last position and
    the sum `total` of its costs, all float64, and `params`, two numbers of the rule's. It is compiled into the fused
    kernel on a GPU and applied to PyTorch tensors on the CPU.

    Fields that are made with `number` and `whole` are checked, and are options of the command line where the rule has
    a `name`.

    Attributes of the class:
        predicate: the prefix test.
        order: "confidence" sorts by confidence, descending, and a position costs 1 - c, or min(1, 1 - c + calibration);
            "entropy" sorts by entropy, ascending, and a position costs its entropy in nats.
        needs: what it has to see.
        revokes: whether a committed token may still be taken back or edited while its block is decoded. Then an EOS
            ends a sequence only once its block is finished.
        counts: whether the rule commits a given number of positions, `p0`, which may then be drawn at random.
        name: how commands call it; None: they don't offer it.
        title: how tables and plots call it, before its first number.
        about: what it commits, in a few words, for the command line.
    """

    predicate: ClassVar[Callable[..., Any]]
    order: ClassVar[str] = "confidence"
    needs: ClassVar[Needs] = Needs()
    revokes: ClassVar[bool] = False
    counts: ClassVar[bool] = False
    name: ClassVar[str | None] = None
    title: ClassVar[str | None] = None
    about: ClassVar[str] = ""
    calibration: float = 0.0

    registry: ClassVar[dict[str, type[Rule]]] = {}
    numbers: ClassVar[dict[str, Number]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.order not in ("confidence", "entropy"):
            raise ValueError(f'{cls.__name__}.order: expected "confidence" or "entropy", got {cls.order!r}')
        if not callable(getattr(cls, "predicate", None)):
            raise TypeError(f"{cls.__name__} must name a @triton.jit predicate(n, last, total, p0, p1)")
        if hasattr(cls, "extend"):
            raise TypeError(f"{cls.__name__}.extend: expected `decide`, which has taken its place")
        own = {field: value.metadata for field, value in vars(cls).items() if isinstance(value, dataclasses.Field)}
        cls.numbers = cls.numbers | {field: about["number"] for field, about in own.items() if "number" in about}
        if cls.observe is not Rule.observe and not cls.needs.logits:
            raise TypeError(f"{cls.__name__}.observe sees logits, expected needs = Needs(logits=True, ...)")
        if cls.needs.block and cls.decide is Rule.decide:
            raise TypeError(
                f"{cls.__name__} needs the block's committed positions, and says nothing of them in `decide`"
            )
        Rule.registry[cls.key()] = cls

    def __post_init__(self) -> None:
        for field, limits in self.numbers.items():
            limits.check(type(self).__name__, field, getattr(self, field))

    @classmethod
    def key(cls) -> str:
        """The name under which the operators find the rule."""
        return f"{cls.__module__}.{cls.__qualname__}"

    @staticmethod
    def named() -> dict[str, type[Rule]]:
        """The rules that commands offer, by name; those that need least come first."""
        offered = [kind for kind in Rule.registry.values() if kind.name is not None]
        offered.sort(key=lambda kind: (sum(kind.needs), kind.decide is not Rule.decide, kind.name))
        return {str(kind.name): kind for kind in offered}

    def label(self, steps: int | None = None) -> str:
        """The rule with its main number, in a few words; `steps` are those of a schedule."""
        title = self.title or type(self).__name__
        main = next(iter(self.numbers), None)
        return title if main is None else f"{title} {getattr(self, main):g}"

    def params(self) -> tuple[float, float]:
        """The predicate's `p0` and `p1`; the first of the rule's numbers, unless it says otherwise."""
        main = next(iter(self.numbers), None)
        return (0.0 if main is None else float(getattr(self, main))), 0.0

    def probed(self, n_layers: int) -> range:
        """The layers of an `n_layers` model whose queries and keys a rule with `Needs.attention` sees."""
        return range(0)

    def takes_steps(self) -> bool:
        """Whether the rule follows a schedule of `steps`."""
        return False

    def successive(self, start: int, stop: int, length: int, steps: int | None) -> list[Rule]:
        """The rules of the successive steps of a block, positions `start` to `stop` of a response of `length`; the last
        one goes on for as long as is needed. `steps` are those of the whole response, None without a schedule."""
        return [self]

    def rows(self, block: Tensor, length: int) -> Rows:
        """The rows that a rule with `Needs.rows` feeds beside a sequence of `length` columns.

        `block` `[T]` int64 are the block's columns. No operation may wait for the device.
        """
        raise NotImplementedError(f"{type(self).__name__} needs rows and does not say which")

    def observe(self, sight: Sight, before: tuple[Tensor, Memory] | None) -> Memory | None:
        """What to remember of every state in `sight`; a NamedTuple of tensors `[b, D, ...]`, or None.

        `before` has the logits `[b, 1, T, V]` and the memory `[b, 1, ...]` of the state before the first one, None in
        a block's first forward. The D states follow one another. No operation may wait for the device or depend in
        shape on data, so that a step can be captured.
        """
        return None

    def again(self, logits: Tensor, memory: Memory) -> Memory:
        """The memory of the state after the one that `logits` and `memory` are of, had the predictions held still.

        It is for the guesses of drafts: a bad one costs a forward's gain and changes no token.
        """
        return memory

    def weigh(self, logits: Tensor, memory: Memory) -> Tensor:
        """The logits `[N, T, V]` to decide by, from the model's and the memory of N states."""
        return logits

    def decide(
        self,
        step: Selection,
        tokens: Tensor,
        candidate: Tensor,
        memory: Memory | None,
        block: slice | Tensor | None,
        mask_id: int,
    ) -> Selection:
        """The step's decision, after the prefix test made it `step`: fields `[N, T]`, of N states.

        `candidate` `[N, T]` are the masked positions that may commit. `memory` is that of these states, None where the
        rule keeps none. `block` are the block's columns, None where the step is not one of a decode (`fdpp.select`);
        then there is no memory either. The block is finished when `remaining` is 0.

        In a decode with `Needs.block` all positions were asked for as if masked: proposals and confidences stand at
        committed ones too, those of the most likely token, and `step.committed` may name such a position.
        """
        return step

    def shown(self, memory: Memory) -> dict[str, Tensor]:
        """What a trace shows of the memory, `[b, D, T]` by name."""
        return {}

    def curve(self, missing: list[float]) -> Curve | None:
        """The rule's criterion over a sorted profile, given by its 1 - c, as a curve to draw."""
        return None

    def accepts(self, residuals: list[float], entropies: list[float]) -> bool:
        """The specification of the predicate, in float64, of a sorted prefix: r, of which c = 1 / (1 + r), and H."""
        costs = entropies if self.order == "entropy" else [min(1.0, shortfall(r) + self.calibration) for r in residuals]
        predicate = getattr(type(self).predicate, "fn", type(self).predicate)
        return bool(predicate(len(residuals), costs[-1], sum(costs), *self.params()))

    def reference(
        self,
        step: Selection,
        tokens: Tensor,
        candidate: Tensor,
        memory: Memory | None,
        block: slice | Tensor | None,
        mask_id: int,
    ) -> Selection:
        """The specification of `decide`, with the same arguments; the confidences of `step` are in float64."""
        return step


def shortfall(residual: float) -> float:
    """1 - c."""
    return residual / (1.0 + residual) if residual < math.inf else 1.0
