"""The rule of DAWN (Luo et al., arXiv 2602.06953)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from fdpp.kernels import predicates
from fdpp.rules import Rule, int_from, number_in

ANCHOR = 0.9
"""A committed position induces those that attend to it if its own softmax maximum is at least this, as published."""


@dataclass(frozen=True)
class Dawn(Rule):
    """Dependency-aware commits (DAWN, arXiv 2602.06953, sections 4.1 to 4.3), every sequence for itself.

    Of the masked positions, c their confidence, these commit:

    1. sure ones, c >= tau_high;
    2. induced ones, c >= tau_induce with an edge from an anchor, a committed position of confidence at least 0.9;
    3. of the others with c >= tau_low, those with no edge from a position that is both sure and induced, a greedy
       independent set: the most confident first (the lower position of equals), both directions of an edge conflict;
    4. the most confident one, if none of these is any.

    Clause 3 asks for "both sure and induced" as the published code does; sure positions that no anchor induced block
    nothing there.

    As a `Rule` it is its first clause: `fdpp.select` with it commits what `Threshold(tau_high)` does, since it sees no
    attention. `generate` and `fdpp.dawn.select` apply all of it.

    Attributes:
        tau_sink: mean incoming attention above which a key column is a sink. Uniform attention over fewer than
            1 / tau_sink columns makes every column one, as published.
        tau_edge: attention that makes an edge.
        layers: how many of the last layers are averaged; None: an eighth of them, at least 1 (4 of LLaDA-8B's 32).
    """

    tau_sink: float = 0.01
    tau_edge: float = 0.07
    tau_induce: float = 0.7
    tau_low: float = 0.75
    tau_high: float = 0.9
    layers: int | None = None
    predicate: ClassVar[Callable[..., Any]] = predicates.threshold

    def __post_init__(self) -> None:
        number_in(self, "tau_sink", "[0, 1]")
        for name in ("tau_edge", "tau_induce", "tau_low", "tau_high"):
            number_in(self, name, "(0, 1]")
        int_from(self, "layers", 1, optional=True)

    def params(self) -> tuple[float, float]:
        return float(self.tau_high), 0.0

    def probed(self, n_layers: int) -> range:
        """The layers of an `n_layers` model whose attention counts; `ValueError` if it has fewer than `layers`."""
        count = max(n_layers // 8, 1) if self.layers is None else self.layers
        if count > n_layers:
            raise ValueError(f"Dawn: layers={self.layers}, but the model has {n_layers}")
        return range(n_layers - count, n_layers)
