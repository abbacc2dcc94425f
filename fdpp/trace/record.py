"""Run a decode and keep what every step saw."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fdpp.decoding.adapters import model_within
from fdpp.decoding.advance import Advance
from fdpp.decoding.block_causal import loop_of
from fdpp.decoding.evidence import Evidence
from fdpp.decoding.loop import BlockLoop
from fdpp.decoding.model import DiffusionModel
from fdpp.decoding.output import DiffusionGenerationOutput
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.decoding.state import BlockState, Window
from fdpp.models.language_model import DiffusionLM
from fdpp.selection import Selection


@dataclass(frozen=True)
class Step:
    """One step of a sequence. The lists run over positions of the block, sorted by confidence, descending: the masked
    ones, and decided ones that got another token.

    Attributes:
        forward: number of the forward that evaluated it, from 0; with drafts a forward evaluates several steps.
        positions: counted from the response's first one.
        proposals: token ids.
        missing: 1 - confidence, in float64: confidences near 1 have too few digits to tell positions apart.
        committed: bools, which of the positions the step committed.
        entropies: nats, empty unless the rule sorts by them.
        shown: what the rule shows of its memory, by name; for `fdpp.Klass` "held still", the number of steps over
            which the prediction did. NaN where there is nothing to show.
        settled: whether there are none such. The lists then run over the decided positions that it looked at again.
        taken: decided positions that the step made masks again, and the tokens they lost.
        edited: decided positions that got another token, the token they lost, and that which they got.
        decided: positions that earlier steps committed, where the rule revokes and shows something of its memory.
        verdicts: `shown` at the `decided` positions.
    """

    forward: int
    positions: list[int]
    proposals: list[int]
    missing: list[float]
    committed: list[bool]
    entropies: list[float]
    shown: dict[str, list[float]]
    settled: bool = False
    taken: list[tuple[int, int]] = field(default_factory=list)
    edited: list[tuple[int, int, int]] = field(default_factory=list)
    decided: list[int] = field(default_factory=list)
    verdicts: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Trace:
    """A decode of one sequence: its settings with all token ids filled in, `[1, P]` prompt, output and steps.

    Attributes:
        blocks: start and end of what is decided together. The last one of a block-causal model may end behind the
            response: blocks are counted from the prompt's first token.
        behind: of positions behind the response that were decided with its last ones, the token and its step, -1 where
            none committed it.
    """

    config: DiffusionGenerationConfig
    prompt: Tensor
    output: DiffusionGenerationOutput
    steps: list[Step]
    blocks: list[tuple[int, int]]
    behind: list[tuple[int, int]] = field(default_factory=list)

    @property
    def response(self) -> list[int]:
        """The ids of all `max_new_tokens` positions, padding after the end included."""
        assert self.output.sequences is not None
        return self.output.sequences[0, self.prompt.shape[1] :].tolist()

    @property
    def commit_step(self) -> list[int]:
        """For every position the index of its step in `steps`, -1 where none committed it."""
        assert self.output.commit_step is not None
        return self.output.commit_step[0].tolist()


class RecordingAdvance(Advance):
    """An `Advance` of one sequence that keeps its steps in `seen`, by number.

    A step on a draft is kept under the number it would have; if the draft is rejected, the real step overwrites it.
    """

    def __init__(self, model: DiffusionModel, loop: BlockLoop, start: int) -> None:
        """`start`: the column of the response's first token."""
        super().__init__(model, loop.config, loop.advance.eos, grid=loop.grid)
        self.start = start
        self.seen: dict[int, Step] = {}

    def choose(
        self, state: BlockState, evidence: Evidence, states: Tensor, index: Tensor, schedule: Tensor, window: Window
    ) -> Selection:
        chosen = super().choose(state, evidence, states, index, schedule, window)
        for depth, number in enumerate(index[0].tolist()):
            free = (state.commit_step[0, window.block] >= 0) | (states[0, 0] == self.mask_id)
            self.seen[number] = self.look(
                int(state.nfe), evidence, states, chosen, depth, window.block_start - self.start, free
            )
        return chosen

    def look(
        self,
        forward: int,
        evidence: Evidence,
        states: Tensor,
        chosen: Selection,
        depth: int,
        start: int,
        free: Tensor,
    ) -> Step:
        """What the step from the state at `depth` of `states` `[1, D, T]` saw.

        The block starts at position `start`; of its positions those that are `free` `[T]` were not given.
        """
        before, after = states[0, depth], chosen.tokens[0, depth]
        masked = before == self.mask_id
        edited = ~masked & (after != self.mask_id) & (after != before)
        lost, new = (where.nonzero().flatten() for where in (~masked & (after == self.mask_id), edited))
        settled = not bool((masked | edited).any())
        looked = (free if settled else masked | edited).nonzero().flatten()
        proposals = chosen.proposal[0, depth, looked]
        # Without drafts the forward on a CPU leaves out the rows that are not masked.
        logits = evidence.logits if evidence.logits.dim() == 2 else evidence.logits[0, depth, looked]
        log_p = logits.double().log_softmax(-1)
        missing = -torch.expm1(log_p.gather(1, proposals[:, None])[:, 0])
        if self.config.last_ids:
            # `last_ids` change the confidence (`ranked_last`), not the logits.
            missing = 1.0 - chosen.confidence[0, depth, looked].double()
        shown = {} if evidence.memory is None else self.rule.shown(evidence.memory)
        decided = (free & ~masked & (self.rule.revokes and bool(shown))).nonzero().flatten()
        order = missing.argsort(stable=True)
        looked, log_p = looked[order], log_p[order]
        by_entropy = self.config.rule.order == "entropy"
        return Step(
            forward=forward,
            positions=(start + looked).tolist(),
            proposals=proposals[order].tolist(),
            missing=missing[order].tolist(),
            committed=chosen.committed[0, depth, looked].tolist(),
            entropies=(-(log_p.exp() * log_p).nan_to_num(nan=0.0).sum(1)).tolist() if by_entropy else [],
            shown={name: value[0, depth, looked].tolist() for name, value in shown.items()},
            settled=settled,
            taken=list(zip((start + lost).tolist(), before[lost].tolist(), strict=True)),
            edited=list(zip((start + new).tolist(), before[new].tolist(), after[new].tolist(), strict=True)),
            decided=(start + decided).tolist(),
            verdicts={name: value[0, depth, decided].tolist() for name, value in shown.items() if len(decided)},
        )


@torch.no_grad()
def record(model: DiffusionLM, input_ids: Tensor, config: DiffusionGenerationConfig) -> Trace:
    """Decode as `model.generate(input_ids, generation_config=config)` does, and keep every step.

    Args:
        input_ids: `[1, P]` int64, one prompt without padding.
        config: settings of any rule, cache and drafts.

    Raises:
        ValueError: more than one sequence, a prompt with masks that would be decided, or what `generate` raises it for.
        FloatingPointError: as `generate`.
    """
    model = model_within(model)
    input_ids, _, config = model.asked(input_ids, torch.ones_like(input_ids), config, {})
    if input_ids.shape[0] != 1:
        raise ValueError(f"input_ids: expected one sequence to trace, got {input_ids.shape[0]}")
    model.check_window(input_ids, None, config.max_new_tokens)
    # A captured step does not show what it computes, and a fused head keeps no logits.
    config = replace(config, engine="eager", head="library")
    loop = loop_of(model)(model, input_ids, None, config)
    start, stop = int(loop.end) - config.max_new_tokens, int(loop.end)
    if bool((loop.whole.sequences[0, loop.prompt_length : start] == loop.mask_id).any()):
        raise ValueError("input_ids: expected no mask in the block in which the response begins, got one")
    loop.advance = advance = RecordingAdvance(model, loop, start)
    for block in range(len(loop.blocks)):
        for _outcome in loop.steps(block):
            pass
        if loop.finished():
            break
    steps = [advance.seen[number] for number in range(int(loop.whole.steps))]
    columns = [loop.block_columns(block) for block in range(len(loop.blocks))]
    blocks = [(max(c.start, start) - start, c.stop - start) for c in columns if c.start < stop and c.stop > start]
    last = slice(stop, start + blocks[-1][1])
    behind = zip(loop.whole.sequences[0, last].tolist(), loop.whole.commit_step[0, last].tolist(), strict=True)
    return Trace(config, input_ids, loop.output(), steps, blocks, list(behind))
