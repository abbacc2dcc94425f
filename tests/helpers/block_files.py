"""Folders with the files of published block-diffusion models; code that they name must never run.

How their tokenizers are laid out was not seen. Here SDAR and Fast-dLLM v2 have that of the Qwen models that they were
trained from, perhaps with code of their own for it, and LLaDA2 one file in the form of the `tokenizers` library.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import dream_files
from small import BLOCK_CAUSAL
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from fdpp.models.language_model import DiffusionLM

LLADA2_SPECIAL = ("<|endoftext|>", "<role>", "</role>", "<|role_end|>", "<|mask|>")
LLADA2_TEMPLATE = (
    "{% for message in messages %}<role>{{ 'HUMAN' if message['role'] == 'user' else 'ASSISTANT' }}</role>"
    "{{ message['content'] }}<|role_end|>{% endfor %}{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)
TURN = {"SDAR": dream_files.TURN, "Fast-dLLM v2": dream_files.TURN, "LLaDA2": dream_files.EOS + 3}
"""The token that ends a turn."""


def written(family: str, folder: Path) -> DiffusionLM:
    """A small model of `family`; everything that its published repository has is in `folder`."""
    ids = {name: number for name, number in dream_files.IDS.items() if name != "bos_token_id"}
    model = BLOCK_CAUSAL[family](**ids)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    code = {"AutoConfig": "configuration_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": code}))
    for name in ("configuration_own", "modeling_own"):
        (folder / f"{name}.py").write_text("raise AssertionError('code of a repository was run')\n")
    if family == "LLaDA2":
        write_llada2_tokenizer(folder)
    else:
        code = {"AutoTokenizer": ["tokenization_dream.Qwen2Tokenizer", None]}
        dream_files.write_tokenizer(folder, tokenizer_class="Qwen2Tokenizer", auto_map=code, bos_token=None)
    return model


def write_llada2_tokenizer(folder: Path) -> None:
    made = Tokenizer(
        models.BPE(
            vocab={word: number for number, word in enumerate(dream_files.WORDS)},
            merges=[tuple(merge.split(" ")) for merge in dream_files.MERGES],
        )
    )
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in LLADA2_SPECIAL])
    made.save(str(folder / "tokenizer.json"))
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
        "chat_template": LLADA2_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
