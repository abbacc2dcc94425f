"""The settings behind the published tables, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fdpp.rules import Credit, Frechet, Hierarchy, Quota, Rule, Saber, Threshold, Wino
from fdpp.rules.dawn import Dawn


class Checkpoint(NamedTuple):
    """A model of the tables: its Hugging Face id, and the `model_type` of its config.json."""

    name: str
    model_type: str


LLADA = Checkpoint("GSAI-ML/LLaDA-8B-Instruct", "llada")
DREAM_BASE = Checkpoint("Dream-org/Dream-v0-Base-7B", "Dream")
DREAM_INSTRUCT = Checkpoint("Dream-org/Dream-v0-Instruct-7B", "Dream")


@dataclass(frozen=True)
class Preset:
    """How a row of a published table was made, at batch size 1 and greedy.

    Attributes:
        task, shots: task of lm-evaluation-harness and its few-shot examples.
        rule, cache, drafts, gen_length, block_length: as in `DiffusionGenerationConfig`.
        model: the checkpoint of the table. A model of another family is refused.
        chat_template: prompts are turns in the tokenizer's chat template; False: they are passed as they are.
        add_bos_token: BOS is put before a prompt, which Dream's tokenizer does not do.
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
    model: Checkpoint = LLADA
    chat_template: bool = True
    add_bos_token: bool = False
    stop_early: bool = False
    multiturn: bool = False


def plain(model: Checkpoint, task: str, shots: int, rule: Rule, cache: str) -> Preset:
    """A row for which prompts were passed as they are, after BOS."""
    return Preset(task, shots, rule, cache, model=model, chat_template=False, add_bos_token=True)


SHOTS = {"gsm8k": 5, "minerva_math": 4, "humaneval": 0, "mbpp": 3}
DAWN_TAU_LOW = {"gsm8k": 0.75, "minerva_math": 0.75, "humaneval": 0.8, "mbpp": 0.7}
DREAM_TAU_LOW = {"gsm8k": 0.75, "minerva_math": 0.8, "humaneval": 0.8, "mbpp": 0.8}
FREEDAVE_SHOTS = {"gsm8k": 5, "minerva_math500": 4, "humaneval_instruct": 0, "mbpp_instruct": 3}

WHOLE_ANSWERS = {"humaneval": "humaneval_chat"}
"""Tasks of which Fast-dLLM's scripts for Dream score answers that no stop string cuts, and the task here that does."""

SABER = {"gsm8k": 128, "humaneval": 256, "mbpp": 256}
"""The tasks of Saber's configurations, which give no examples, and their block lengths."""

WINO_TAU = {"gsm8k": 0.6, "minerva_math500": 0.7, "humaneval": 0.7, "mbpp": 0.8}
"""Tasks of WINO's configurations, which give no examples, and their thresholds."""

PRESETS: dict[str, Preset] = {
    # Fast-dLLM++, arXiv 2606.02955: prefix cache at length 256; its other columns by --rule threshold, factor.
    **{f"fast-dllm++/{task}": Preset(task, shots, Frechet(0.25), "prefix") for task, shots in SHOTS.items()},
    "fast-dllm++/gsm8k-1024": Preset("gsm8k", 5, Frechet(0.25), "dual", gen_length=1024),
    # Fast-dLLM, arXiv 2505.22618.
    **{f"fast-dllm/{task}": Preset(task, shots, Threshold(0.9), "prefix") for task, shots in SHOTS.items()},
    # Both on Dream; table 4 of Fast-dLLM++, its length 512 by --gen-length.
    **{
        f"{name}/dream-base/{task}": plain(DREAM_BASE, WHOLE_ANSWERS.get(task, task), shots, rule, "prefix")
        for name, rule in (("fast-dllm++", Frechet(0.25)), ("fast-dllm", Threshold(0.9)))
        for task, shots in SHOTS.items()
    },
    # DAWN, arXiv 2602.06953, uncached.
    **{f"dawn/{task}": Preset(task, shots, Dawn(tau_low=DAWN_TAU_LOW[task]), "none") for task, shots in SHOTS.items()},
    # Dream's attention is that of the last 4 of its 28 layers, in the published code.
    **{
        f"dawn/dream-base/{task}": plain(
            DREAM_BASE, task, shots, Dawn(0.03, 0.05, 0.75, DREAM_TAU_LOW[task], layers=4), "none"
        )
        for task, shots in SHOTS.items()
    },
    **{
        f"dawn/dream-instruct/{task}": plain(DREAM_INSTRUCT, task, shots, Dawn(0.03, 0.1, 0.75, 0.8, layers=4), "none")
        for task, shots in SHOTS.items()
    },
    # FreeDave, arXiv 2510.00294: four states a forward, eight of Dream; "++" adds a confidence threshold.
    **{
        f"{name}/{folder}{task}": Preset(
            task,
            shots,
            rule,
            "dual",
            1024,
            drafts=drafts,
            model=model,
            add_bos_token=bos,
            stop_early=True,
            multiturn=True,
        )
        for folder, model, drafts, bos in (("", LLADA, 4, False), ("dream-instruct/", DREAM_INSTRUCT, 8, True))
        for name, rule in (("freedave", Quota(1)), ("freedave++", Threshold(0.95)))
        for task, shots in FREEDAVE_SHOTS.items()
    },
    # SSD, arXiv 2510.04147, is FreeDave's chain for one position a step. Its settings are in no published code: these
    # are Fast-dLLM's and four states.
    **{f"ssd/{task}": Preset(task, shots, Quota(1), "dual", drafts=4) for task, shots in SHOTS.items()},
    # Saber, arXiv 2510.18165, uncached.
    **{
        f"saber/{task}": Preset(task, 0, Saber(2), "none", block_length=block_length)
        for task, block_length in SABER.items()
    },
    # WINO, arXiv 2507.18578, uncached.
    **{f"wino/{task}": Preset(task, 0, Wino(tau, 0.9), "none", block_length=128) for task, tau in WINO_TAU.items()},
    # CreditDecoding, arXiv 2510.06133, and hierarchical decoding, with dInfer's default numbers. Its own evaluation is
    # of another model and with a cache of its own; all else is as in Fast-dLLM's rows, uncached.
    **{
        f"{name}/{task}": Preset(task, shots, rule, "none")
        for name, rule in (("credit", Credit()), ("hierarchy", Hierarchy()))
        for task, shots in SHOTS.items()
    },
}
