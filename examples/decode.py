"""Answer one prompt, with the embedded model or with any LLaDA, Dream, SDAR, LLaDA2 or Fast-dLLM v2.

python examples/decode.py
python examples/decode.py GSAI-ML/LLaDA-8B-Instruct "Why is the sky blue?"
python examples/decode.py Dream-org/Dream-v0-Instruct-7B "Why is the sky blue?"
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers import AutoTokenizer

import fdpp
from fdpp import tiny
from fdpp.models import families
from fdpp.models.language_model import DiffusionLM

# Any rule of fdpp, and one of your own (own_rule.py), goes in the place of this one.
SETTINGS = {"max_new_tokens": 128, "rule": fdpp.Frechet(margin=0.25), "cache": "dual"}


def load(path: str) -> tuple[DiffusionLM, Any]:
    """A checkpoint as it is published, on the GPU if there is one."""
    device, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    model = families.load(path, dtype=dtype).eval().to(device)
    return model, AutoTokenizer.from_pretrained(path)


def encode(tokenizer: Any, prompt: str) -> torch.Tensor:
    """The prompt's ids `[1, P]`: a turn of a chat where the tokenizer knows of any."""
    if not tokenizer.chat_template:
        return tokenizer(prompt, return_tensors="pt")["input_ids"]
    turn = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]


def main() -> None:
    if len(sys.argv) == 3:
        model, tokenizer = load(sys.argv[1])
        prompt = sys.argv[2]
    elif len(sys.argv) == 1:
        # It solves word problems and knows no other words.
        model, tokenizer = tiny.load()
        prompt = tiny.generate("held-out", 1)[0].prompt
    else:
        raise SystemExit("usage: decode.py [PATH_OR_ID PROMPT]")
    ids = encode(tokenizer, prompt).to(model.device)
    out = model.generate(ids, **SETTINGS)
    print(prompt)
    print(tokenizer.decode(out.sequences[0, ids.shape[1] :], skip_special_tokens=True).strip())
    print(f"{out.nfe.item()} forwards, {out.tokens_per_forward.item():.2f} tokens per forward")


if __name__ == "__main__":
    main()
