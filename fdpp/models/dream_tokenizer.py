"""Dream's tokenizer: Qwen2's, under the name of the class that a published repository brings as code of its own."""

from __future__ import annotations

from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from fdpp.models.dream_config import DreamConfig


class DreamTokenizer(Qwen2Tokenizer):
    """Byte-level BPE, with the same splitting of a text as the published class, but compiled."""


AutoTokenizer.register(DreamConfig, tokenizer_class=DreamTokenizer, exist_ok=True)
