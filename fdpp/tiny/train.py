"""Train an embedded model from scratch: `python -m fdpp.tiny.train --task NAME`.

The objective is LLaDA's masked-diffusion fine-tuning loss (arXiv 2502.09992, algorithm 2): the prompt stays clean,
each response token is masked with probability t ~ U(0, 1), the cross-entropy of the masked tokens is weighted 1/t. It
is used in the paper's equivalent form of lower variance (equation 6): l of the L response tokens are masked without
replacement, l uniform in 1..L, in place of t = l/L. Each third of the examples masks another part of the response so:

- all of it, as LLaDA does;
- one random block, as block-wise decoding meets it: the blocks before are clean, the later ones fully masked and
  without a loss;
- what confident decoding leaves for last (`Recipe.late`), such as a sum's results, one token in twelve. This gives them
  more weight.

LLaDA does not train for the last two. Their gain was not measured separately. With `Recipe.holes` one batch in four is
a response without its prompt, masked as LLaDA does, so that the model also fills holes.

A model trained so loses most of its answers under a key/value cache: positions outside of the block keep part of a
running sum, which a cache freezes. So of the last `--cached-steps` steps two in three train as the dual cache decodes
(Fast-dLLM, arXiv 2505.22618). Their sequence is all that such a decode feeds, one forward after the other: everything
at the block's start, then the block as it is now. Each forward sees of every column what was fed last. With
`Recipe.recent` half of these batches begin blocks without feeding everything: the first block's start, then at each
block's start that block and the one before it, then the block as it is now.

A block-diffusion model (`Task.family` "sdar") has batches of its own, see `fdpp.tiny.block_diffusion`.

Every batch is a function of the seed and the step, so a run stopped at any step and resumed from its state file ends
with the same weights as one that was not stopped (on the same machine and number of threads).
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from fdpp.decoding.settings import CACHES, DiffusionGenerationConfig
from fdpp.models.language_model import DiffusionLM
from fdpp.models.llada import LLaDAConfig, LLaDAModelLM
from fdpp.models.sdar import SDARConfig, SDARModelLM
from fdpp.rules import Quota
from fdpp.tiny import MODELS
from fdpp.tiny.batch import CPU, Batch, after, encode, seen, uniform, whole_number
from fdpp.tiny.block_diffusion import make_block_batch
from fdpp.tiny.task import Task
from fdpp.tiny.tokenizer import build_tokenizer

PARTS = 2
SEED_STRIDE = 1_000_003


def build_model(task: Task, seed: int) -> DiffusionLM:
    """The untrained model (1.2 M parameters), with the settings that decode it."""
    tokenizer = build_tokenizer(task.words)
    torch.manual_seed(seed)
    ids: dict[str, Any] = {name: getattr(tokenizer, name) for name in ("mask_token_id", "eos_token_id", "pad_token_id")}
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 352,
    }
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 256}
    model: DiffusionLM
    if task.family == "sdar":
        heads = {"num_key_value_heads": 4, "head_dim": 32, "block_size": task.block_length}
        model = SDARModelLM(SDARConfig(**sizes, **ids, **heads, rope_theta=10000.0))
    else:
        model = LLaDAModelLM(LLaDAConfig(**sizes, **ids, rope_theta=10000.0))
    model.generation_config = DiffusionGenerationConfig(
        max_new_tokens=task.max_new_tokens, block_length=task.block_length
    )
    return model


def make_batch(task: Task, tokenizer: Any, seed: int, tokens: int, cached: bool = False) -> Batch:
    """One batch of about `tokens` tokens.

    All problems of a batch have prompts of equal length. The response is padded with EOS: to the task's
    `max_new_tokens`, or to the end of its block in most batches of a task of several sizes.
    """
    noise, block_length = torch.Generator().manual_seed(seed), task.block_length
    size = [] if task.sizes is None else [int(whole_number(task.sizes.start, task.sizes.stop, noise))]
    sample = task.generate("train", 1, seed, *size)[0]
    prompt = len(tokenizer(sample.prompt)["input_ids"])
    response = math.ceil((len(tokenizer(sample.response)["input_ids"]) + 1) / block_length) * block_length
    if uniform(1, noise) < 1 / 6 or task.sizes is None:
        response = task.max_new_tokens
    holes = bool(task.recipe.holes and not cached and uniform(1, noise) < 1 / 4)
    if holes:
        prompt, response = 0, len(tokenizer(sample.response)["input_ids"])
    B = max(1, tokens // (prompt + response))
    problems = task.generate("train", B, seed, *size)
    texts = [problem.response if holes else f"{problem.prompt} {problem.response}" for problem in problems]
    clean = encode(tokenizer, texts, prompt + response)

    position = torch.arange(response, device=CPU)
    recent = bool(task.recipe.recent and cached and uniform(1, noise) < 1 / 2)
    block = whole_number(0, max(response // block_length, 1), noise, (1 if recent else B, 1)).expand(B, 1)
    kind = whole_number(0, 3 if task.recipe.late else 2, noise, (B, 1)) * (not holes)
    in_block, later = position // block_length == block, position // block_length > block
    late = after(task.recipe.late, tokenizer, clean[:, prompt:])
    if cached:
        only_late = (kind == 0) & (in_block & late).any(1, keepdim=True)
        current = torch.where(only_late, in_block & late, in_block)
        later = later | in_block
    else:
        current = (kind == 0) | ((kind == 1) & in_block) | ((kind == 2) & late)
        later = (kind == 1) & later
    size_of = current.sum(1, keepdim=True)
    masked_count = (uniform((B, 1), noise) * size_of).floor() + 1
    order = uniform((B, response), noise).masked_fill(~current, 2.0).argsort(1).argsort(1)
    chosen = current & (order < masked_count)

    noisy, target = clean.clone(), torch.full_like(clean, -100)
    noisy[:, prompt:][later | chosen] = tokenizer.mask_token_id
    target[:, prompt:][chosen] = clean[:, prompt:][chosen]
    weight = torch.zeros(clean.shape, dtype=torch.float32, device=CPU)
    weight[:, prompt:] = (1 / (B * masked_count)).expand(B, response)
    column = torch.arange(prompt + response, device=CPU).expand(B, -1)
    if not cached:
        return Batch(noisy, target, weight, column, torch.zeros_like(column))

    def at_start(of: int) -> Tensor:
        """The sequences when block `of` begins."""
        return clean.where(column < prompt + of * block_length, tokenizer.mask_token_id)

    fed = [(noisy, column)]
    if recent:
        this = int(block[0])
        fed = [(at_start(0), column)]
        for of in range(1, this + 1):
            two = slice(prompt + (of - 1) * block_length, prompt + (of + 1) * block_length)
            fed.append((at_start(of)[:, two], column[:, two]))
    here = prompt + block * block_length + torch.arange(block_length, device=CPU)
    now, target, weight = clean.gather(1, here), target.gather(1, here), weight.gather(1, here)
    fed.append((now.masked_fill(target != -100, tokenizer.mask_token_id), here))
    before = sum(ids.shape[1] for ids, _ in fed[:-1])
    return Batch(
        torch.cat([ids for ids, _ in fed], dim=1),
        pad(target, (before, 0), value=-100),
        pad(weight, (before, 0)),
        torch.cat([columns for _, columns in fed], dim=1),
        torch.cat([torch.full_like(ids, index) for index, (ids, _) in enumerate(fed)], dim=1),
    )


class PlainAttention(TorchFunctionMode):
    """Within this context attention is two matrix products and a softmax.

    The backward of the fused attention would take half of a training step on a CPU.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = args
        score = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        mask = (kwargs or {}).get("attn_mask")
        if mask is not None:
            score = score.masked_fill(~mask, -torch.inf)
        return torch.softmax(score, dim=-1, dtype=torch.float32).to(v.dtype) @ v


def diffusion_loss(model: DiffusionLM, batch: Batch) -> Tensor:
    """Weighted cross-entropy of the masked tokens, a scalar; the head runs on the masked positions only."""
    noisy, target, weight, column, feed = batch
    masked = target != -100
    sees, positions = (seen(column, feed), column) if feed.any() else (None, None)
    with PlainAttention(), torch.autocast(noisy.device.type, dtype=torch.bfloat16):
        logits = model.project(model.model(noisy, sees, positions)[masked])
    return (cross_entropy(logits.float(), target[masked], reduction="none") * weight[masked]).sum()


def build_optimizers(model: DiffusionLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embedding, head and norms; the learning rate is set every step."""
    parameters = dict(model.named_parameters())
    in_blocks = {name for name in parameters if ".blocks." in name or ".layers." in name}
    matrices = [p for name, p in parameters.items() if p.ndim == 2 and name in in_blocks]
    others = [p for name, p in parameters.items() if p.ndim != 2 or name not in in_blocks]
    return [
        torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(step: int, steps: int, cached_steps: int) -> float:
    """Linear warm-up over the first 200 steps (at most a tenth of them), then a cosine to zero.

    The cached steps that follow repeat it at half the height.
    """
    height = 1.0
    if step >= steps:
        step, steps, height = step - steps, cached_steps, 0.5
    warmup = min(200, max(1, steps // 10))
    if step < warmup:
        return height * (step + 1) / warmup
    return height * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def evaluate(task: Task, model: DiffusionLM, tokenizer: Any, problems: Sequence[Any], cache: str = "none") -> float:
    """Share of right responses, decoded one token per forward, most confident first."""
    batch = tokenizer([problem.prompt for problem in problems], padding=True, return_tensors="pt").to(model.device)
    out: Any = model.generate(**batch, rule=Quota(1), cache=cache)
    texts = tokenizer.batch_decode(out.sequences[:, batch["input_ids"].shape[1] :])
    return sum(task.is_right(text, problem) for text, problem in zip(texts, problems, strict=True)) / len(problems)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fdpp.tiny.train", description="Train the embedded model.")
    option = parser.add_argument
    option("--task", choices=MODELS, default="sums", help="what it learns (default: %(default)s)")
    option("--out", type=Path, help="folder of the checkpoint (default: the package's own)")
    option("--state", type=Path, help="state file, resumed from if it exists (default: tiny-TASK.pt)")
    option("--steps", type=int, help="optimizer steps without a cache (default: the task's recipe)")
    option("--cached-steps", type=int, help="steps after them, most as caches decode (default: the task's recipe)")
    option("--minutes", type=float, default=math.inf, help="stop after so many minutes; the same command resumes")
    option("--tokens", type=int, help="tokens per step (default: the task's recipe)")
    option("--lr", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    option("--seed", type=int, default=0, help="seed of the weights and the data (default: %(default)s)")
    option("--save-every", type=int, default=500, help="steps between saves (default: %(default)s)")
    option("--eval-problems", type=int, default=500, help="held-out problems of the final evaluation")
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    args = parser.parse_args(argv)
    task = MODELS[args.task]
    args.out, args.state = args.out or task.checkpoint, args.state or Path(f"tiny-{task.name}.pt")
    for name in ("steps", "cached_steps", "tokens"):
        setattr(args, name, getattr(task.recipe, name) if getattr(args, name) is None else getattr(args, name))

    tokenizer = build_tokenizer(task.words)
    model = build_model(task, args.seed).to(args.device)
    optimizers = build_optimizers(model)
    step = 0
    if args.state.exists():
        state = torch.load(args.state, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step = state["step"]

    def save() -> None:
        partial = args.state.with_suffix(".partial")
        saved = [optimizer.state_dict() for optimizer in optimizers]
        torch.save({"step": step, "model": model.state_dict(), "optimizers": saved}, partial)
        os.replace(partial, args.state)
        model.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)

    # What a block-diffusion model stores never changes: every cache decodes alike.
    caches = ("dual",) if model.block_causal else CACHES
    parameters = list(model.parameters())

    def gradients(part: tuple[Tensor, ...]) -> tuple[float, tuple[Tensor, ...]]:
        loss = diffusion_loss(model, Batch(*(tensor.to(args.device) for tensor in part)))
        return loss.item(), torch.autograd.grad(loss, parameters)

    # Two threads with half a batch each wait for each other once per step, not in every operator.
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(PARTS, initializer=torch.set_num_threads, initargs=(1,))
    sample = task.generate("held-out", 40, 1)
    deadline = time.monotonic() + 60 * args.minutes
    average = 0.0
    total = args.steps + args.cached_steps
    bar = tqdm(initial=step, total=total, unit="step", mininterval=5)
    while step < total and time.monotonic() < deadline:
        cached = step >= args.steps and step % 3 > 0
        seed = args.seed * SEED_STRIDE + step
        if model.block_causal:
            batch = make_block_batch(task, tokenizer, seed, args.tokens)
        else:
            batch = make_batch(task, tokenizer, seed, args.tokens, cached)
        parts = list(pool.map(gradients, zip(*(tensor.chunk(PARTS) for tensor in batch), strict=True)))
        for parameter, *shares in zip(parameters, *(part[1] for part in parts), strict=True):
            parameter.grad = torch.stack(shares).sum(0)
        loss = sum(part[0] for part in parts)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * schedule(step, args.steps, args.cached_steps)
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        average += 0.02 * (loss - average) if average else loss
        bar.set_postfix(loss=f"{average:.4f}", refresh=False)
        bar.update()
        if step % args.save_every == 0:
            save()
            exact = ", ".join(f"{cache} {evaluate(task, model, tokenizer, sample, cache):.0%}" for cache in caches)
            bar.write(f"step {step}: loss {average:.4f}, right of 40: {exact}")
    bar.close()
    pool.shutdown()
    save()
    if step == total and args.eval_problems:
        problems = task.generate("held-out", args.eval_problems)
        for cache in caches:
            share = evaluate(task, model, tokenizer, problems, cache)
            print(f"{share:.1%} of {len(problems)} held-out problems right, one token per forward, cache {cache}")


if __name__ == "__main__":
    main()
