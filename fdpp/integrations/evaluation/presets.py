"""The settings behind the published tables, by name."""

from __future__ import annotations

from dataclasses import dataclass

from fdpp.rules import Frechet, Quota, Rule, Threshold
from fdpp.rules.dawn import Dawn


@dataclass(frozen=True)
class Preset:
    """How a row of a published table was made: LLaDA-8B-Instruct, batch size 1, greedy, chat template.

    Attributes:
        task, shots: task of lm-evaluation-harness and its few-shot examples.
        rule, cache, drafts, gen_length, block_length: as in `DiffusionGenerationConfig`.
        stop_early: False where every block is decoded, whether or not the answer has ended.
        multiturn: the few-shot examples are turns of a chat; False: all of the prompt is one turn.
    """

    task: str
    shots: int
    rule: Rule
    cache: str
    gen_length: int = 256
    block_length: int = 32
    drafts: int = 1
    stop_early: bool = False
    multiturn: bool = False


SHOTS = {"gsm8k": 5, "minerva_math": 4, "humaneval": 0, "mbpp": 3}
DAWN_TAU_LOW = {"gsm8k": 0.75, "minerva_math": 0.75, "humaneval": 0.8, "mbpp": 0.7}
FREEDAVE_SHOTS = {"gsm8k": 5, "minerva_math500": 4, "humaneval_instruct": 0, "mbpp_instruct": 3}

PRESETS: dict[str, Preset] = {
    # Fast-dLLM++, arXiv 2606.02955: prefix cache at length 256; its other columns by --rule threshold, factor.
    **{f"fast-dllm++/{task}": Preset(task, shots, Frechet(0.25), "prefix") for task, shots in SHOTS.items()},
    "fast-dllm++/gsm8k-1024": Preset("gsm8k", 5, Frechet(0.25), "dual", gen_length=1024),
    # Fast-dLLM, arXiv 2505.22618.
    **{f"fast-dllm/{task}": Preset(task, shots, Threshold(0.9), "prefix") for task, shots in SHOTS.items()},
    # DAWN, arXiv 2602.06953, uncached.
    **{f"dawn/{task}": Preset(task, shots, Dawn(tau_low=DAWN_TAU_LOW[task]), "none") for task, shots in SHOTS.items()},
    # FreeDave, arXiv 2510.00294: four states a forward; "++" adds a confidence threshold.
    **{
        f"{name}/{task}": Preset(task, shots, rule, "dual", 1024, drafts=4, stop_early=True, multiturn=True)
        for name, rule in (("freedave", Quota(1)), ("freedave++", Threshold(0.95)))
        for task, shots in FREEDAVE_SHOTS.items()
    },
}
