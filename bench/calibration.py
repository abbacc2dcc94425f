"""How often a proposal is right at its confidence, over states that are drawn from the task itself.

The response is masked and filled in block by block, without a cache. Each forward is scored at the block's masked
positions, then the response's own tokens are committed at the most confident ones, whatever was proposed. So every
state is part of a drawn problem, and the probability of the own token there is what a calibrated confidence equals,
however many responses are right.
"""

from __future__ import annotations

from typing import Any

import torch
from quality_runs import batches, digest, model_of

import fdpp
from fdpp import tiny

EDGES = (*(index / 20 for index in range(20)), 0.98, 0.99, 1.0)
"""Of the bins, the last of which holds 1; finer where most confidences are."""
COMMITTED = 2
"""Positions of a step."""
ENOUGH = 200
"""Proposals from which on a bin counts as an overconfidence."""


@torch.no_grad()
def scored(task_name: str, split: str, count: int) -> dict[str, Any]:
    """Bins of `count` problems of a split, with their expected calibration error and allowances (see `summed_up`)."""
    task = tiny.TASKS[task_name]
    model, tokenizer = model_of(task_name, "plain")
    mask_id, N, T = model.config.mask_token_id, task.max_new_tokens, task.block_length
    # Other problems than those that are decoded.
    problems = task.generate(split, count, 1)
    prompts, responses = (
        [tokenizer(getattr(p, part))["input_ids"] for p in problems] for part in ("prompt", "response")
    )
    confidences, corrects = [], []
    for batch in batches(prompts, mask_id):
        prompt = torch.tensor([prompts[index] for index in batch])
        own = torch.full((len(batch), N), tokenizer.eos_token_id)
        told = torch.zeros(own.shape, dtype=torch.bool)
        for row, index in enumerate(batch):
            own[row, : len(responses[index])] = torch.tensor(responses[index])
            told[row, : len(responses[index])] = True
        tokens = torch.cat((prompt, torch.full_like(own, mask_id)), dim=1)
        P = prompt.shape[1]
        for first in range(0, N, T):
            part, block = slice(first, first + T), slice(P + first, P + first + T)
            while told[:, part].any() and (tokens[:, block] == mask_id).any():
                logits = model.project(model.model(tokens)[:, block])
                step = fdpp.select(logits, tokens[:, block], rule=fdpp.Quota(COMMITTED), mask_id=mask_id)
                counted = (tokens[:, block] == mask_id) & told[:, part]
                confidences.append(step.confidence[counted])
                corrects.append((step.proposal == own[:, part])[counted])
                tokens[:, block] = torch.where(step.committed, own[:, part], tokens[:, block])
    about = {"task": task_name, "checkpoint": digest(task_name), "split": split, "problems": count}
    return about | summed_up(binned(torch.cat(confidences), torch.cat(corrects)))


def binned(confidence: torch.Tensor, correct: torch.Tensor) -> list[dict[str, float]]:
    """Lower edge, mean confidence, share of correct ones and count of `[n]` proposals, for every bin that holds any."""
    edges = torch.tensor(EDGES, dtype=torch.float64)
    # Confidences are float32: one of 0.95 belongs above the edge, whatever side of it the rounding took.
    place = torch.bucketize(confidence.double() + 1e-7, edges, right=True).clamp(max=len(EDGES) - 1) - 1
    bins = []
    for index, low in enumerate(EDGES[:-1]):
        chosen = place == index
        if chosen.any():
            mean, share = float(confidence[chosen].double().mean()), float(correct[chosen].double().mean())
            bins.append({"from": low, "confidence": mean, "correct": share, "count": int(chosen.sum())})
    return bins


def summed_up(bins: list[dict[str, float]]) -> dict[str, Any]:
    """The `bins` with numbers that sum them up.

    - "error": the expected calibration error, the mean of |confidence - share that is right|.
    - "allowance": the largest overconfidence, confidence - share, of a bin above 0.5 with enough proposals; at least 0.
    - "allowance_mean": the mean overconfidence of the proposals above 0.5, where it is positive.
    """
    total = sum(b["count"] for b in bins)
    over = [(max(b["confidence"] - b["correct"], 0.0), b["count"]) for b in bins if b["from"] >= 0.5]
    trusted = sum(count for _, count in over)
    return {
        "proposals": total,
        "error": sum(b["count"] * abs(b["confidence"] - b["correct"]) for b in bins) / total,
        "allowance": max((excess for excess, count in over if count >= ENOUGH), default=0.0),
        "allowance_mean": sum(excess * count for excess, count in over) / trusted if trusted else 0.0,
        "bins": bins,
    }
