"""SSD (Self Speculative Decoding, arXiv 2510.04147) is one position a step with drafts.

Its authors have published no code. The loop here is written from descriptions of it, none of fdpp's own code in it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from small import EOS, MASK, PAD, SMALL, exact, prompts
from torch import Tensor

from fdpp import Quota
from fdpp.models.language_model import DiffusionLM

LENGTH = 22


def ended(tokens: Tensor) -> bool:
    """Whether an EOS stands in a response `[L]` with everything before it."""
    ends = (tokens == EOS).nonzero()
    return bool(len(ends)) and not bool((tokens[: int(ends[0])] == MASK).any())


def ssd(model: DiffusionLM, prompt: Tensor, block: int, n: int, stop: bool) -> tuple[Tensor, int, Counter[int]]:
    """The response `[L]`, the forwards, and how often a forward accepted so many nodes.

    From the last node accepted stepwise decoding takes the most confident column: that is the next node 0. The n most
    confident of those then masked, by the same predictions, are the draft, and node k is node 0 with k of them filled
    in. All nodes are the rows of one forward. Node k + 1 is accepted if stepwise decoding from node k takes draft
    k + 1.
    """
    P, forwards, accepted = prompt.shape[1], 0, Counter[int]()
    tokens = torch.cat((prompt[0], torch.full((LENGTH,), MASK)))

    def order(node: Tensor, logits: Tensor, columns: range) -> list[tuple[int, int]]:
        """The masked columns of a node and what they predict, the most confident first."""
        p = logits.softmax(-1)
        p[:, MASK] = 0.0
        c, x0 = p.max(-1)
        masked = sorted((t for t in columns if node[t] == MASK), key=lambda t: (-float(c[t]), t))
        return [(t, int(x0[t])) for t in masked]

    for start in range(P, P + LENGTH, block):
        columns = range(start, min(start + block, P + LENGTH))
        draft: list[tuple[int, int]] = []
        while (tokens[columns.start : columns.stop] == MASK).any():
            nodes = [tokens]
            for column, token in draft:
                nodes.append(nodes[-1].index_fill(0, torch.tensor(column), token))
            with torch.no_grad():
                logits = model.project(model.model(torch.stack(nodes))).roll(model.shift, dims=1)
            forwards += 1
            for k, node in enumerate(nodes):
                taken, *others = order(node, logits[k], columns)
                tokens = node.index_fill(0, torch.tensor(taken[0]), taken[1])
                if k == len(draft) or taken != draft[k] or not others or (stop and ended(tokens[P:])):
                    break
            accepted[k + 1] += 1
            draft = others[:n]
            if stop and ended(tokens[P:]):
                response = tokens[P:]
                response[int((response == EOS).nonzero()[0]) + 1 :] = PAD
                return response, forwards, accepted
    return tokens[P:], forwards, accepted


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("block", [22, 9])
def test_ssd_is_one_position_a_step_with_drafts(family: str, block: int) -> None:
    """Same tokens, and same forwards; the tokens are those without drafts."""
    tally: Counter[int] = Counter()
    stopped = 0
    for seed in range(2):
        model, lift = exact(family, seed), torch.zeros(64)
        lift[EOS] = 3.0
        plain = model.project
        model.project = lambda hidden, plain=plain, lift=lift: plain(hidden) + lift
        prompt = prompts(1, 6, seed)
        for stop in (False, True):
            settings: dict[str, Any] = {"max_new_tokens": LENGTH, "block_length": block, "stop_at_eos": stop}
            settings |= {"rule": Quota(1), "cache": "none"}
            one = model.generate(prompt, **settings)
            for n in (1, 3, 7):
                response, forwards, accepted = ssd(model, prompt, block, n, stop)
                out = model.generate(prompt, drafts=n + 1, branches="batch", **settings)
                assert out.sequences[0, 6:].equal(response) and int(out.nfe) == forwards
                assert out.sequences.equal(one.sequences) and out.commit_step.equal(one.commit_step)
                assert sum(count * nodes for nodes, count in accepted.items()) == int(one.nfe)
                tally += accepted
            stopped += int(one.nfe) < LENGTH
    assert min(tally[k] for k in (1, 2)) > 2 and stopped, (tally, stopped)
