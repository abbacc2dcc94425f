"""The base of rotary angles, under the two names that configurations have for it."""

from __future__ import annotations

from typing import Any


def theta_of(family: str, given: float | None, default: float, options: dict[str, Any]) -> float:
    """`rope_theta` as `given`, or from the table `rope_parameters`, which is taken out of the other `options`.

    transformers 5 makes such a table of the former key in configurations that it does not know.

    Raises:
        ValueError: the two contradict each other, or the table asks for scaled positions.
    """
    table = options.pop("rope_parameters", None)
    if not table:
        return default if given is None else given
    theta, others = table.get("rope_theta"), table.keys() - {"rope_theta", "rope_type"}
    if others or theta is None or table.get("rope_type", "default") != "default":
        raise ValueError(
            f"{family} config: rope_parameters={table!r} is not implemented, expected a rope_theta and no scaling"
        )
    if given not in (None, theta):
        raise ValueError(f"{family} config: rope_parameters={table!r} contradicts rope_theta={given}")
    return float(theta)
