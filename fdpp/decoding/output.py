"""What a decode returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class DiffusionGenerationOutput(ModelOutput):
    """What `generate` returns.

    Attributes:
        sequences: `[B, P + max_new_tokens]` int64, prompt and response.
        nfe: `[B]` int64, the forwards each sequence took part in, full and cached ones alike. Drafts that are evaluated
            together count as one forward, and so do the two passes of a guided step.
        tokens_per_forward: `[B]` float64, response tokens before the first EOS over `nfe`.
        commit_step: `[B, max_new_tokens]` int64, the step (from 0) of its sequence that committed a position, -1 where
            none did.
        confidence: `[B, max_new_tokens]` float32, the probability of the token at the step that committed it, 1 where
            none did. It is the confidence that the rule saw: without temperature, after guidance, processors and the
            rule's own weights. With `confidence_eos_eot_inf` it is 0 for EOS and EoT.
        log_prob: `[B, max_new_tokens]` float32, the logarithm of `confidence`.
        query_tokens: `[B]` int64, positions fed to the model over all forwards, with drafts, a rule's rows and both
            passes of a guided step. All rows of a batch are fed the same number of drafts, which static steps round up.
            So it depends on the batch and the engine, as `nfe` does with drafts="auto"; tokens and steps do not.
        acceptance: `[B, drafts - 1]` float64, the share of offered drafts that were accepted, by depth (NaN where none
            was offered); None without drafts.
    """

    sequences: torch.Tensor | None = None
    nfe: torch.Tensor | None = None
    tokens_per_forward: torch.Tensor | None = None
    commit_step: torch.Tensor | None = None
    confidence: torch.Tensor | None = None
    log_prob: torch.Tensor | None = None
    query_tokens: torch.Tensor | None = None
    acceptance: torch.Tensor | None = None
