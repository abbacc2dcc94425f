"""What `fdpp.ops` held."""

from fdpp.selection import DTYPES, MAX_POSITIONS, check, check_temperature, expect
from fdpp.step.operators import select
from fdpp.step.terms import pack, streams

__all__ = ["DTYPES", "MAX_POSITIONS", "check", "check_temperature", "expect", "pack", "select", "streams"]
