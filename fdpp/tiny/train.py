"""Train the embedded model from scratch: `python -m fdpp.tiny.train`.

The objective is LLaDA's masked-diffusion fine-tuning loss (arXiv 2502.09992, algorithm 2): the prompt stays clean,
each response token is masked with probability t ~ U(0, 1), the cross-entropy of the masked tokens is weighted 1/t. It
is used in the paper's equivalent form of lower variance (equation 6): l of the L response tokens are masked without
replacement, l uniform in 1..L, in place of t = l/L. Each third of the examples masks another part of the response so:

- all of it, as LLaDA does;
- one random block, as block-wise decoding meets it: the blocks before are clean, the later ones fully masked and
  without a loss;
- its results, one token in twelve, which confident decoding leaves for last. This gives them more weight.

LLaDA does not train for the last two. Their gain was not measured separately.

A model trained so loses most of its answers under a key/value cache: positions outside of the block keep part of a
running sum, which a cache freezes. So of the last `--cached-steps` steps two in three train as the dual cache decodes
(Fast-dLLM, arXiv 2505.22618). Their sequence is the one at the block's start, followed by the block as it is now. The
block's positions see each other and everything but the block's old content.

Every batch is a function of the seed and the step, so a run stopped at any step and resumed from its state file ends
with the same weights as one that was not stopped (on the same machine and number of threads).
"""

from __future__ import annotations

import argparse
import math
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from fdpp.decoding.settings import CACHES, DiffusionGenerationConfig
from fdpp.models.llada import LLaDAConfig, LLaDAModelLM
from fdpp.rules import Quota
from fdpp.tiny.problems import MAX_STEPS, MIN_STEPS, Problem, generate, is_exact
from fdpp.tiny.tokenizer import build_tokenizer

BLOCK = 32
MAX_RESPONSE = 128
PARTS = 2
SEED_STRIDE = 1_000_003
CPU = torch.device("cpu")
"""Where batches are made, whatever the default device."""

CHECKPOINT = Path(__file__).parent / "checkpoint"


def build_model(seed: int) -> LLaDAModelLM:
    """The untrained model (1.2 M parameters), with the settings that decode it."""
    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    model = LLaDAModelLM(
        LLaDAConfig(
            vocab_size=len(tokenizer),
            d_model=128,
            n_layers=6,
            n_heads=4,
            mlp_hidden_size=352,
            max_sequence_length=256,
            rope_theta=10000.0,
            mask_token_id=tokenizer.mask_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.generation_config = DiffusionGenerationConfig(max_new_tokens=MAX_RESPONSE, block_length=BLOCK)
    return model


class Batch(NamedTuple):
    """Attributes:
    noisy: ids `[B, L]`; in a cached batch the block as it stands now follows, `[B, L + 32]`.
    target: ids of the same shape, -100 where no loss is taken.
    weight: of the same shape.
    first: `[B]`, the first column that the copied block replaces, in a cached batch; else -1.
    """

    noisy: Tensor
    target: Tensor
    weight: Tensor
    first: Tensor


def uniform(shape: int | tuple[int, ...], noise: torch.Generator) -> Tensor:
    """Float32 numbers in [0, 1)."""
    return torch.rand(shape, generator=noise, dtype=torch.float32, device=CPU)


def make_batch(tokenizer: Any, seed: int, tokens: int, cached: bool = False) -> Batch:
    """One batch of about `tokens` tokens.

    All problems of a batch have the same number of steps and so the same lengths. The response is padded with EOS to
    the end of its block, or to 128 tokens in a sixth of the batches.
    """
    noise = torch.Generator().manual_seed(seed)
    steps = int(torch.randint(MIN_STEPS, MAX_STEPS + 1, (1,), generator=noise, dtype=torch.int64, device=CPU))
    sample = generate("train", 1, seed, steps)[0]
    prompt = len(tokenizer(sample.prompt)["input_ids"])
    response = math.ceil((len(tokenizer(sample.response)["input_ids"]) + 1) / BLOCK) * BLOCK
    if uniform(1, noise) < 1 / 6:
        response = MAX_RESPONSE
    B = max(1, tokens // (prompt + response))
    clean = encode(tokenizer, generate("train", B, seed, steps), prompt + response)

    position = torch.arange(response, device=CPU)
    block = torch.randint(0, response // BLOCK, (B, 1), generator=noise, dtype=torch.int64, device=CPU)
    kind = torch.randint(0, 3, (B, 1), generator=noise, dtype=torch.int64, device=CPU)
    in_block, later = position // BLOCK == block, position // BLOCK > block
    stated = results(tokenizer, clean[:, prompt:])
    if cached:
        current = torch.where((kind == 0) & (in_block & stated).any(1, keepdim=True), in_block & stated, in_block)
        later = later | in_block
    else:
        current = (kind == 0) | ((kind == 1) & in_block) | ((kind == 2) & stated)
        later = (kind == 1) & later
    size = current.sum(1, keepdim=True)
    masked_count = (uniform((B, 1), noise) * size).floor() + 1
    order = uniform((B, response), noise).masked_fill(~current, 2.0).argsort(1).argsort(1)
    chosen = current & (order < masked_count)

    noisy, target = clean.clone(), torch.full_like(clean, -100)
    noisy[:, prompt:][later | chosen] = tokenizer.mask_token_id
    target[:, prompt:][chosen] = clean[:, prompt:][chosen]
    weight = torch.zeros(clean.shape, dtype=torch.float32, device=CPU)
    weight[:, prompt:] = (1 / (B * masked_count)).expand(B, response)
    if not cached:
        return Batch(noisy, target, weight, clean.new_full((B,), -1))
    first = prompt + BLOCK * block
    columns = first + torch.arange(BLOCK, device=CPU)
    now = clean.gather(1, columns).masked_fill(target.gather(1, columns) != -100, tokenizer.mask_token_id)
    return Batch(
        torch.cat((noisy, now), dim=1),
        torch.cat((torch.full_like(clean, -100), target.gather(1, columns)), dim=1),
        torch.cat((weight, weight.gather(1, columns)), dim=1),
        first.flatten(),
    )


def dual_cache(first: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """What a cached batch's positions see, bool `[B, 1, length + 32, length + 32]`, and their position ids.

    The first `length` columns see each other; the copied block sees itself and all columns but those it replaces.
    """
    B = first.shape[0]
    column = torch.arange(length, device=first.device)
    replaced = (column >= first[:, None]) & (column < first[:, None] + BLOCK)
    copy = torch.ones(B, BLOCK, dtype=torch.bool, device=first.device)
    old = torch.cat((torch.ones_like(replaced), ~copy), dim=1)[:, None].expand(-1, length, -1)
    new = torch.cat((~replaced, copy), dim=1)[:, None].expand(-1, BLOCK, -1)
    positions = torch.cat((column.expand(B, -1), first[:, None] + torch.arange(BLOCK, device=first.device)), dim=1)
    return torch.cat((old, new), dim=1)[:, None], positions


def results(tokenizer: Any, response: Tensor) -> Tensor:
    """Where `response` `[B, L]` states a result: bool `[B, L]`, the word after "has", "makes", "are" or ":"."""
    words = response.new_tensor(tokenizer.convert_tokens_to_ids(["has", "makes", "are", ":"]))
    return torch.isin(response.roll(1, dims=1), words)


def encode(tokenizer: Any, problems: list[Problem], length: int) -> Tensor:
    """Prompt and response of problems with equal lengths, padded with EOS: ids `[B, length]`."""
    rows = tokenizer([f"{problem.prompt} {problem.response}" for problem in problems])["input_ids"]
    padded = [row + [tokenizer.eos_token_id] * (length - len(row)) for row in rows]
    return torch.tensor(padded, dtype=torch.int64, device=CPU)


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


def diffusion_loss(model: LLaDAModelLM, batch: Batch) -> Tensor:
    """Weighted cross-entropy of the masked tokens, a scalar; the head runs on the masked positions only."""
    noisy, target, weight, first = batch
    masked = target != -100
    sees, positions = (None, None) if first[0] < 0 else dual_cache(first, noisy.shape[1] - BLOCK)
    with PlainAttention(), torch.autocast(noisy.device.type, dtype=torch.bfloat16):
        logits = model.project(model.model(noisy, sees, positions)[masked])
    return (cross_entropy(logits.float(), target[masked], reduction="none") * weight[masked]).sum()


def build_optimizers(model: LLaDAModelLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embedding, head and norms; the learning rate is set every step."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".blocks." in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or ".blocks." not in name]
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


def evaluate(model: LLaDAModelLM, tokenizer: Any, problems: list[Problem], cache: str = "none") -> float:
    """Share of exact answers, decoded one token per forward, most confident first, in blocks of 32."""
    batch = tokenizer([problem.prompt for problem in problems], padding=True, return_tensors="pt").to(model.device)
    out = model.generate(**batch, rule=Quota(1), max_new_tokens=MAX_RESPONSE, block_length=BLOCK, cache=cache)
    texts = tokenizer.batch_decode(out.sequences[:, batch["input_ids"].shape[1] :])
    return sum(is_exact(text, problem) for text, problem in zip(texts, problems, strict=True)) / len(problems)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fdpp.tiny.train", description="Train the embedded model.")
    option = parser.add_argument
    option("--out", type=Path, default=CHECKPOINT, help="folder of the checkpoint (default: the package's own)")
    option("--state", type=Path, default=Path("tiny-train.pt"), help="state file, resumed from if it exists")
    option("--steps", type=int, default=3500, help="optimizer steps without a cache (default: %(default)s)")
    option("--cached-steps", type=int, default=1500, help="steps after them, most as the dual cache decodes")
    option("--minutes", type=float, default=math.inf, help="stop after so many minutes; the same command resumes")
    option("--tokens", type=int, default=8192, help="tokens per step (default: %(default)s)")
    option("--lr", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    option("--seed", type=int, default=0, help="seed of the weights and the data (default: %(default)s)")
    option("--save-every", type=int, default=500, help="steps between saves (default: %(default)s)")
    option("--eval-problems", type=int, default=500, help="held-out problems of the final evaluation")
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s")
    args = parser.parse_args(argv)

    tokenizer = build_tokenizer()
    model = build_model(args.seed).to(args.device)
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

    parameters = list(model.parameters())

    def gradients(part: tuple[Tensor, ...]) -> tuple[float, tuple[Tensor, ...]]:
        loss = diffusion_loss(model, Batch(*(tensor.to(args.device) for tensor in part)))
        return loss.item(), torch.autograd.grad(loss, parameters)

    # Two threads with half a batch each wait for each other once per step, not in every operator.
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(PARTS, initializer=torch.set_num_threads, initargs=(1,))
    sample = generate("held-out", 40, seed=1)
    deadline = time.monotonic() + 60 * args.minutes
    average = 0.0
    total = args.steps + args.cached_steps
    bar = tqdm(initial=step, total=total, unit="step", mininterval=5)
    while step < total and time.monotonic() < deadline:
        cached = step >= args.steps and step % 3 > 0
        batch = make_batch(tokenizer, args.seed * SEED_STRIDE + step, args.tokens, cached)
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
            exact = ", ".join(f"{cache} {evaluate(model, tokenizer, sample, cache):.0%}" for cache in CACHES)
            bar.write(f"step {step}: loss {average:.4f}, exact of 40: {exact}")
    bar.close()
    pool.shutdown()
    save()
    if step == total and args.eval_problems:
        problems = generate("held-out", args.eval_problems)
        for cache in CACHES:
            share = evaluate(model, tokenizer, problems, cache)
            print(
                f"{share:.1%} exact answers on {len(problems)} held-out problems, one token per forward, cache {cache}"
            )


if __name__ == "__main__":
    main()
