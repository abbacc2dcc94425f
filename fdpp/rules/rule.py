"""What a rule is: which proposals of a step may be committed together. To write one, read this page from the top.

A sequence's profile is its masked positions sorted by confidence, c_(1) >= ... >= c_(n), the lower position first among
equals. A rule's predicate accepts some prefixes of it. A step commits the longest accepted prefix, and at least one
position while any is masked. The predicate is compiled into the fused step, and many rules are no more than that.

A rule that has to see more says what it `needs` and overrides hooks. Each forward of a decode evaluates D states of b
sequences (D = 1 without drafts), whose block has T columns. It calls these in turn; N stands for b * D:

1. `rows(block)` before the forward, with `Needs.rows`: the mask rows that are fed beside the sequence;
2. `observe(sight, before)` after it: the memory of the D states, tensors `[b, D, ...]`;
3. `weigh(logits, memory)`, if there is a memory: the logits `[N, T, V]` to decide by;
4. the predicate, in the fused step;
5. `decide(proposed)`: the decision, fields `[N, T]`.

A memory lives for one block. That of the last accepted state is handed to the next forward; a block's first forward
gets none. With drafts, every guess of a state takes a memory from `again` before the forward, then 3 to 5 with N = b.
`fdpp.select` calls the predicate and `decide` alone, without a memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from fdpp.attention.probe import Probe
from fdpp.selection import Selection, masked_again, recommit

ORDERS = ("confidence", "margin", "entropy")

TEMPERED = " of softmax(l / T)"
"""Ends what `Rule.tested` returns where a step with a temperature T > 0 takes l / T for the logits, drawing at 1."""


class Needs(NamedTuple):
    """What a rule has to see beyond the logits of masked positions; a decode asks this and not the rule's class.

    A decode with what is refused raises `ValueError`.

    Attributes:
        logits: the logits of all positions of the block; a sharded vocabulary is gathered. Refused: `head="fused"`.
        block: proposals and confidences at the block's committed positions too (see `Proposed`).
        fed: the model's confidence at every column that is fed (`Sight.fed_confidence`). Refused: a partial `refresh`,
            which leaves columns out.
        attention: queries and keys of the layers `Rule.probed`. Refused: `engine="static"`, since they are read at
            columns given as numbers ("auto" runs such a decode eagerly); a sharded head, since no process has the
            queries and keys of all heads; `cfg_scale`; a partial `refresh`.
        rows: mask rows beside the sequence (`Rule.rows`). Refused: `head="fused"`; drafts in tree layout; attention
            as well; a model whose columns predict the next token, since a row has no column before it.
    """

    logits: bool = False
    block: bool = False
    fed: bool = False
    attention: bool = False
    rows: bool = False


class Rows(NamedTuple):
    """E mask tokens that are fed beside every sequence, in each of its drafted states beside that. No column sees them.

    A row sees all rows, and what the block's columns see but for one: the tokens fed and, under a cache, the keys and
    values that it keeps of the others.

    Attributes:
        columns: `[E]` int64, the columns whose position ids they have.
        holes: `[E]` int64, the column that each of them does not see; -1: it sees all.
    """

    columns: Tensor
    holes: Tensor


class Sight(NamedTuple):
    """What one forward shows of D states of b sequences, whose block has T columns.

    Attributes:
        states: `[b, D, T]` int64, the block's tokens in each state.
        logits: `[b, D, T, V]` of the block, after guidance and all settings that change logits.
        tokens: `[b, D, n]` int64, all that was fed.
        block, fed: the columns of the block and of what was fed, each a slice or an int64 tensor of columns.
        full: whether everything was fed, as in every block's first forward (with a partial `refresh` in some).
        length: columns of a sequence, L.
        padding: `[b]` int64, columns on the left that hold no token; None: there are none.
        mask_id: the id that marks a masked position.
        rows: `[b, D, E, V]`, the logits of `Rule.rows`; None without `Needs.rows`.
        probe: the forward's queries and keys; None without `Needs.attention`.
        fed_confidence: returns the model's confidence at what was fed, float32 `[b, D, n]`; needs `Needs.fed`.
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
"""What a rule remembers of states, for one block: a NamedTuple of tensors `[b, D, ...]`, in a step `[b * D, ...]`, and
of other memories, or None, in the place of some."""


class Proposed(NamedTuple):
    """What a rule decides on: N states of a block of at least one position, and what the prefix test made of them.

    Attributes:
        step: the prefix test's decision, fields `[N, T]`.
        tokens: `[N, T]` int64, the states.
        candidate: `[N, T]` bool, the masked positions that may commit.
        mask_id: the id that marks a masked position.
        memory: of these states, `[N, ...]`; None if the rule keeps none, and outside of a decode (`fdpp.select`).
        block: the block's columns, a slice or an int64 tensor `[T]`; None outside of a decode.
        numbers: `[N, 3]` or `[1, 3]` float64, `params` and `calibration` of the step's rule (see `Rule.successive`);
            None outside of a decode.
        fixed, fresh: `[N, T]` float64, random numbers, uniform in (0, 1), for a rule that `draws`: a position has one
            for all steps of its block, and one for this step. A sequence's depend on its seed, and on no other row.
            None for other rules and outside of a decode.
        given: `[N, T]` bool, positions with a token that no step decided, those of a prompt or an infill. None outside
            of a decode.

    In a decode with `Needs.block` the prefix test takes all positions as masked. Committed ones then have a proposal,
    their most likely token, and its confidence. `step.tokens`, `committed` and `remaining` are those of a block of
    masks: make them anew from `tokens`.
    """

    step: Selection
    tokens: Tensor
    candidate: Tensor
    mask_id: int
    memory: Memory | None = None
    block: slice | Tensor | None = None
    numbers: Tensor | None = None
    fixed: Tensor | None = None
    fresh: Tensor | None = None
    given: Tensor | None = None

    def commit(self, committed: Tensor) -> Selection:
        """`step` with another commit mask `[N, T]`, of candidates alone."""
        return recommit(self.step, self.tokens, self.candidate, committed)

    def take_back(self, step: Selection, taken: Tensor) -> Selection:
        """`step` with the positions `taken` `[N, T]`, of which it commits none, masked again."""
        return masked_again(step, taken, self.mask_id)


class Number(NamedTuple):
    """A numeric field of a rule: its allowed values, and its option on the command line.

    Attributes:
        interval: such as `"[0, 1)"`; for a `whole` number the least one.
        about: what it is, in a few words.
        unit: its placeholder in the help.
        option: the option's name, if not the field's.
        whole: whether it is an int.
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
    """A field of a rule that is a finite number in `interval`; `more` are other attributes of `Number`."""
    return dataclasses.field(default=default, metadata={"number": Number(interval, about, **more)})


def whole(default: int | None, least: int, about: str, **more: Any) -> Any:
    """A field of a rule that is an int of at least `least`, or None where that is the `default` or it is `optional`."""
    spec = Number(str(least), about, "N", whole=True, **{"optional": default is None, **more})
    return dataclasses.field(default=default, metadata={"number": spec})


@dataclass(frozen=True)
class Curve:
    """A score for every prefix length, falling as the prefix grows, and the limit that it must stay above."""

    name: str
    limit: float
    scores: list[float]


class Rule:
    """Base of all rules: a frozen dataclass and one predicate, in one file.

    The predicate is a `@triton.jit` function `(n, last, total, p0, p1) -> bool` of plain arithmetic and comparisons. It
    is compiled into the fused kernel on a GPU and applied to PyTorch tensors on the CPU. It sees every prefix of the
    sorted profile at once: its length `n`, an int, and in float64 the cost `last` of its last position, the sum `total`
    of its costs, and `p0` and `p1`, which `params` returns.

    Fields made with `number` and `whole` are checked. They are options of the command line if the rule has a `name`.

    Static steps capture `rows`, `observe`, `again`, `weigh` and `decide` in a CUDA graph, unless the rule needs
    attention. A replay runs none of their Python, so what changes must be in the memory. No operation in them may wait
    for the device, copy from the host or have a shape that depends on data:

    - no `item`, `tolist`, `cpu` or `torch.equal`, and no `if` on a tensor;
    - no `nonzero`, `unique`, `masked_select` or `x[mask]` (use `torch.where`), no `repeat_interleave` by a tensor;
    - no `torch.isin` of many ids (use `==`);
    - no `torch.tensor(..., device=...)`, and no `x[columns] = number` for a tensor of columns (use `index_fill`).

    Attributes of the class:
        predicate: the prefix test.
        order: "confidence" sorts by confidence, descending, and a position costs 1 - c, or min(1, 1 - c + calibration);
            "margin" sorts by m = p1 - p2, the probabilities of the two most likely tokens, descending, and a position
            costs 1 - m so; "entropy" sorts by entropy, ascending, and a position costs its entropy in nats. The mask id
            is none of the two, whatever is proposed.
        needs: what it has to see.
        revokes: whether `decide` may take back or edit a token that an earlier step of the block committed. Then an EOS
            ends a sequence only once its block is finished, and the commit step of a position taken back is -1.
        draws: whether `decide` reads random numbers, so that a decode needs a seed.
        counts: whether `p0` is the number of positions to commit; `remasking="random"` then draws them.
        name: its name in commands; None: they don't offer it.
        title: its name in tables and plots, before its first number.
        about: what it commits, in a few words, for the command line.
    """

    predicate: ClassVar[Callable[..., Any]]
    order: ClassVar[str] = "confidence"
    needs: ClassVar[Needs] = Needs()
    revokes: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    counts: ClassVar[bool] = False
    name: ClassVar[str | None] = None
    title: ClassVar[str | None] = None
    about: ClassVar[str] = ""
    calibration: float = 0.0

    registry: ClassVar[dict[str, type[Rule]]] = {}
    presets: ClassVar[dict[str, Rule]] = {}
    numbers: ClassVar[dict[str, Number]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.order not in ORDERS:
            raise ValueError(f"{cls.__name__}.order: expected one of {', '.join(ORDERS)}, got {cls.order!r}")
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
        # A subclass goes by another name than its base, or by none.
        cls.name = vars(cls).get("name")
        taken = Rule.named().get(cls.name) if cls.name is not None else None
        if taken is not None and taken.key() != cls.key():
            raise ValueError(f"{cls.__name__}.name: expected one that is free, got {cls.name!r} of {taken.key()}")
        Rule.registry[cls.key()] = cls

    def __post_init__(self) -> None:
        for field, limits in self.numbers.items():
            limits.check(type(self).__name__, field, getattr(self, field))

    @classmethod
    def key(cls) -> str:
        """The name under which the operators find the rule."""
        return f"{cls.__module__}.{cls.__qualname__}"

    def tested(self) -> str:
        """The key of the rule whose predicate and order the prefix test takes: its own, unless it wraps one.

        With `TEMPERED` behind it all of the step, confidence, order and draw, is of softmax(l / T).
        """
        return self.key()

    @staticmethod
    def named() -> dict[str, type[Rule]]:
        """The rules that commands offer, by name; those that need least come first."""
        offered = [kind for kind in Rule.registry.values() if kind.name is not None]
        offered.sort(key=lambda kind: (sum(kind.needs), kind.decide is not Rule.decide, kind.name))
        return {str(kind.name): kind for kind in offered}

    @classmethod
    def saved_name(cls) -> str:
        """The name in files: the class for a rule of this package, module and class for others."""
        return cls.__name__ if cls.__module__.split(".")[0] == "fdpp" else cls.key()

    def saved(self) -> dict[str, Any]:
        """The rule by its name and numbers, `{"name": "Frechet", "margin": 0.25, ...}`."""
        return {"name": self.saved_name(), **dataclasses.asdict(self)}  # type: ignore[call-overload]

    @staticmethod
    def of(given: Any) -> Rule:
        """A rule as people give it: itself, a preset ("balanced"), its name in files or commands ("frechet"), or
        `saved()` with some numbers.

        Raises:
            ValueError: anything else; a name or a number that does not exist, or a number that does not fit.
        """
        if isinstance(given, Rule):
            return given
        if isinstance(given, str) and given in Rule.presets:
            return Rule.presets[given]
        numbers = {"name": given} if isinstance(given, str) else dict(given) if isinstance(given, dict) else {}
        kinds = Rule.named() | {kind.saved_name(): kind for kind in Rule.registry.values()}
        kind = kinds.get(numbers.pop("name", ""))
        if kind is None:
            raise ValueError(
                f'rule: expected a Rule, a name or {{"name": ..., <its numbers>}}, with a name of '
                f"{', '.join([*Rule.presets, *sorted(kinds)])}; got {given!r}"
            )
        try:
            return kind(**numbers)
        except TypeError as error:
            raise ValueError(f"rule {kind.__name__}: {error}") from error

    def label(self, steps: int | None = None) -> str:
        """The rule with its main number, in a few words; `steps` are those of a schedule."""
        title = self.title or type(self).__name__
        main = next(iter(self.numbers), None)
        return title if main is None else f"{title} {getattr(self, main):g}"

    def params(self) -> tuple[float, float]:
        """The predicate's `p0` and `p1`; by default the rule's first number (0 if it has none) and 0."""
        main = next(iter(self.numbers), None)
        return (0.0 if main is None else float(getattr(self, main))), 0.0

    def probed(self, n_layers: int) -> range:
        """The layers of an `n_layers` model whose queries and keys a rule with `Needs.attention` sees."""
        return range(0)

    def takes_steps(self) -> bool:
        """Whether the rule follows a schedule of `steps`."""
        return False

    def successive(self, start: int, stop: int, length: int, steps: int | None) -> list[Rule]:
        """The rules of a block's successive steps; the last one repeats until the block is finished.

        The block is positions `start` to `stop` of a response of `length`. `steps` are those of the whole response,
        None without a schedule. Only `params` and `calibration` of these rules count: the hooks are `self`'s.
        """
        return [self]

    def rows(self, block: Tensor) -> Rows:
        """The rows that a rule with `Needs.rows` feeds beside a sequence.

        `block` `[T]` int64 are the block's columns. There are as many rows for any block of T.
        """
        raise NotImplementedError(f"{type(self).__name__} needs rows and does not say which")

    def observe(self, sight: Sight, before: tuple[Tensor, Memory] | None) -> Memory | None:
        """The memory of every state in `sight`: a NamedTuple of tensors `[b, D, ...]`, or None.

        The D states are successive. `before` has the logits `[b, 1, T, V]` and the memory `[b, 1, ...]` of the state
        before the first one; it is None in a block's first forward. To override it takes `Needs.logits`.
        """
        return None

    def again(self, logits: Tensor, memory: Memory) -> Memory:
        """The memory of the next state, had the predictions held still, for the guesses of drafts.

        `logits` `[b, 1, T, V]` and `memory` `[b, 1, ...]` are those of the state before it. A bad guess costs what the
        draft would have saved and changes no token.
        """
        return memory

    def weigh(self, logits: Tensor, memory: Memory) -> Tensor:
        """The logits `[N, T, V]` to decide by, from the model's and the memory `[N, ...]` of N states.

        Not called without a memory.
        """
        return logits

    def decide(self, proposed: Proposed) -> Selection:
        """The step's decision, fields `[N, T]`; `Proposed.commit` makes one from a commit mask.

        Its `tokens` are the next states. A block is finished when `remaining` is 0. Apart from an EOS nothing else ends
        it, so a rule that revokes must reach 0 by itself.
        """
        return proposed.step

    def shown(self, memory: Memory) -> dict[str, Tensor]:
        """What a trace shows of the memory, `[b, D, T]` by name; NaN: nothing. Of a rule that revokes it shows decided
        positions, too."""
        return {}

    def curve(self, missing: list[float]) -> Curve | None:
        """The rule's criterion as a curve to draw, over a sorted profile whose 1 - c are `missing`; None: no curve."""
        return None

    def accepts(self, residuals: list[float], entropies: list[float]) -> bool:
        """The predicate's specification in float64, given a sorted prefix's r, where c = 1 / (1 + r), and H in nats.

        By margin the r are the odds against it: m = 1 / (1 + r).
        """
        costs = entropies if self.order == "entropy" else [min(1.0, shortfall(r) + self.calibration) for r in residuals]
        predicate = getattr(type(self).predicate, "fn", type(self).predicate)
        return bool(predicate(len(residuals), costs[-1], sum(costs), *self.params()))

    def reference(self, proposed: Proposed) -> Selection:
        """The specification of `decide`; the confidences of `proposed.step` are in float64."""
        return proposed.step


def shortfall(residual: float) -> float:
    """1 - c."""
    return residual / (1.0 + residual) if residual < math.inf else 1.0
