"""A folder with the files of a published Dream: its configuration and tokenizer name code that must never run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|beginoftext|>", "<|mask|>")
MERGES = ("h e", "l l", "he ll", "hell o", "Ġ hello")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in MERGES)]
EOS, START, TURN, BOS, MASK = range(len(WORDS), len(WORDS) + len(SPECIAL))
V = MASK + 3
IDS = {"vocab_size": V, "mask_token_id": MASK, "eos_token_id": EOS, "pad_token_id": EOS, "bos_token_id": EOS}


def write_tokenizer(folder: Path, **changes: Any) -> None:
    """As published: the class of its own code is Qwen2's tokenizer in Python, and not all that is special is listed."""
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(WORDS)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES, ""]))
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    settings = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
        "added_tokens_decoder": {str(EOS + i): {"content": token, **flags} for i, token in enumerate(SPECIAL)},
        "additional_special_tokens": ["<|beginoftext|>", "<|mask|>"],
        "bos_token": "<|beginoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "unk_token": None,
        "chat_template": TEMPLATE,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": 131072,
        "split_special_tokens": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **changes}))
    (folder / "tokenization_dream.py").write_text("raise AssertionError('code of a repository was run')\n")


def write_checkpoint(folder: Path, model: Any) -> None:
    """The weights of `model`, a small Dream with the ids `IDS`, and all else that a published repository has."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"}
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["DreamModel"], "auto_map": code}))
    for name in ("configuration_dream", "modeling_dream"):
        (folder / f"{name}.py").write_text("raise AssertionError('code of a repository was run')\n")
    write_tokenizer(folder)
