"""The key/value cache of a decode, and a block's attention over it."""

from fdpp.attention.beside import Beside
from fdpp.attention.cache import BlockCache
from fdpp.attention.probe import Probe
from fdpp.attention.split_keys import block_attention, visible

__all__ = ["Beside", "BlockCache", "Probe", "block_attention", "visible"]
