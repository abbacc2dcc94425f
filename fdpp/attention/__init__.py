"""Keys and values of a decode, and how a block's queries meet them."""

from fdpp.attention.cache import BlockCache
from fdpp.attention.probe import Probe
from fdpp.attention.split_keys import block_attention, visible

__all__ = ["BlockCache", "Probe", "block_attention", "visible"]
