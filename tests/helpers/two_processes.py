"""What each of two processes does in `test_parallel.py`: `torchrun --nproc-per-node 2 two_processes.py FOLDER`.

The folder holds the checkpoints to decode with, if any. The cases are defined here and computed again, by one process,
in the test.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from inputs import RULES, Lead, Problem, random_problem
from small import BLOCK_CAUSAL, SMALL, left_pad, prompts, small_model
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers.distributed import DistributedConfig

import fdpp
from fdpp import Dawn, EntropyBound, Factor, Frechet, Klass, LLaDAModelLM, LocalLeap, Quota, Threshold
from fdpp.models.language_model import DiffusionLM
from fdpp.step import operators, parallel
from fdpp.step.terms import Terms, pack

INF, NAN = float("inf"), float("nan")
V, MASK = 41, 6


def peculiar(rule: fdpp.Rule, cut: int, temperature: float) -> Problem:
    """Rows with ties across the cut, or with everything that matters on one side of it."""
    problem = random_problem(3, 1, 16, V, rule, mask_id=MASK, masked=1.0, temperature=temperature)
    rows = problem.logits[0]
    rows[0] = 0.0
    rows[0, [cut - 1, cut]] = 5.0
    rows[1, :cut] = -INF
    rows[2, cut:] = -INF
    rows[3, MASK] = 200.0
    rows[4, :cut] -= 300.0
    rows[4, MASK] = 2.0
    rows[5, cut + 1] = NAN
    rows[6, 0] = INF
    rows[7] = -INF
    rows[8] = -INF
    rows[8, MASK] = 0.0
    rows[9, cut:] -= 1000.0
    rows[10] -= 300.0
    rows[11, MASK] = INF
    rows[12, MASK] = NAN
    rows[13, cut:] = -INF
    rows[13, cut] = NAN
    return problem


def problems() -> dict[str, tuple[Problem, int]]:
    """Problems by name, and how many of their vocabulary's ids the first process holds."""
    cases = {}
    for rule in (*RULES, LocalLeap(0.9, 0.4, 2)):
        for cut in (1, 17, V - 1):
            for temperature in (0.0, 0.7):
                problem = random_problem(
                    len(cases),
                    3,
                    12,
                    V,
                    rule,
                    mask_id=(MASK, V - 1)[len(cases) % 2],
                    active=True,
                    temperature=temperature,
                )
                cases[f"{rule} cut at {cut} temperature {temperature}"] = problem, cut
                cases[f"{rule} peculiar at temperature {temperature}"] = peculiar(rule, 20, temperature), 20
    rule = Frechet(0.25)
    cases["all on one side"] = random_problem(1, 2, 12, V, rule), V
    cases["mask outside"] = random_problem(2, 2, 12, V, rule, mask_id=V + 5), 20
    cases["bfloat16"] = random_problem(5, 2, 12, V, rule, dtype=torch.bfloat16), 20
    cases["nothing masked"] = random_problem(1, 2, 12, V, rule, masked=0.0), 20
    cases["rule per sequence"] = random_problem(9, 2, 12, V, Frechet(0.25), Frechet(0.6)), 20
    # Long rows are scanned in runs and taken in several chunks.
    cases["long rows"] = random_problem(4, 1, 12, 200_003, rule), 70_001
    cases["hot and long"] = random_problem(6, 2, 6, 9_001, EntropyBound(3.0), temperature=4.0), 5_000
    # Groups of 64 ids that the cut parts or does not, and slices without an id.
    for i, cut in enumerate((0, 1, 63, 64, 65, 100, 150, 190, 200)):
        problem = random_problem(20 + i, 2, 12, 200, (Frechet(0.2), Lead(0.3))[i % 2], mask_id=130, temperature=1.3)
        cases[f"sampled, cut at {cut} of 200"] = problem, cut
    return cases


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except ValueError as error:
        return str(error)
    return "no error"


def select_all() -> dict[str, Any]:
    rank, results = dist.get_rank(), {}
    numbers: list[int] = []
    exchange = parallel.exchange
    parallel.exchange = lambda mine, group: numbers.append(mine.numel()) or exchange(mine, group)
    for name, (problem, cut) in problems().items():
        numbers.clear()
        mine = problem.logits[..., :cut] if rank == 0 else problem.logits[..., cut:]
        before = mine.clone()
        params = torch.cat([pack(rule) for rule in problem.rules])
        terms = Terms(params, problem.rules[0].key(), problem.mask_id, problem.temperature, problem.seeds)
        first_id = 0 if rank == 0 else cut
        step = parallel.prefix_step(mine, problem.tokens, problem.active, terms, first_id=first_id)
        selection = operators.decided(step, problem.tokens, problem.active, problem.rules[0], problem.mask_id)
        unchanged = mine.equal(before) or bool(before.isnan().any())
        results[name] = selection, list(numbers), unchanged
    logits, tokens = torch.randn(2, 5, V, generator=torch.Generator().manual_seed(0)), torch.full((2, 5), MASK)
    arguments = {"rule": Frechet(0.2), "mask_id": MASK, "temperature": 0.9, "seed": 11}
    recorded = logits.clone().requires_grad_()  # of a model that is called as it is, without no_grad
    slices = recorded[..., : V // 2], recorded[..., V // 2 :]
    results["public"] = (
        parallel.select(slices[rank], tokens, first_id=rank * (V // 2), **arguments),
        fdpp.select(logits, tokens, **arguments),
    )
    weight, data_parallel = torch.randn(V, 4), init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    tensor_parallel = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    shardings = {
        "rows": (tensor_parallel, Shard(0)),
        "replicated": (tensor_parallel, Replicate()),
        "columns": (tensor_parallel, Shard(1)),
        "fsdp": (data_parallel, Shard(0)),
    }
    for name, (mesh, placement) in shardings.items():
        head = distribute_tensor(weight, mesh, [placement])
        results[name] = error_of(partial(parallel.slice_of, head, V))
    return results


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "uneven": ("LLaDA", {"vocab_size": 65, "embedding_size": 71}),
    "grouped, tied": ("LLaDA", {"n_kv_heads": 2, "weight_tying": True}),
    "few ids": ("LLaDA", {"embedding_size": 200}),
    "Dream, uneven": ("Dream", {"vocab_size": 65}),
    "Dream, tied": ("Dream", {"tie_word_embeddings": True}),
    "SDAR": ("SDAR", {}),
}
"""Families in `MADE` and their configurations. The slices hold 36 and 29 ids, 32 and 32, 64 and none, 33 and 32, 32 and
32, 32 and 32. Dream has grouped heads and biases, SDAR grouped heads with norms."""

MADE = {**SMALL, **BLOCK_CAUSAL}

ragged, ragged_mask = left_pad([prompts(1, 9)[0], prompts(1, 4, seed=1)[0], prompts(1, 6, seed=2)[0]])
DECODES: dict[str, dict[str, Any]] = {
    "none": {"cache": "none", "rule": Frechet(0.1)},
    "prefix": {"cache": "prefix", "rule": Frechet(0.1)},
    "dual": {"cache": "dual", "rule": Frechet(0.1)},
    "schedule": {"cache": "dual", "rule": Quota(), "steps": 10},
    "entropy": {"cache": "dual", "rule": EntropyBound(0.6)},
    "relaxed": {"cache": "prefix", "rule": LocalLeap(0.8, 0.4, 2)},
    "sampled": {"cache": "dual", "rule": Threshold(0.5), "temperature": 0.6, "seed": 5},
    "stable": {"cache": "dual", "rule": Klass(0.4, 0.1, 1)},
    "runs": {"cache": "dual", "rule": fdpp.Hierarchy(0.2, 0.8)},
    "credit": {"cache": "prefix", "rule": fdpp.Credit(0.7), "drafts": 2},
    "taken back": {"cache": "dual", "rule": fdpp.Saber(2), "drafts": 2},
    "early": {"cache": "prefix", "rule": fdpp.Prophet(None, 3, 1.5, 1.0, 0.5)},
    "verified": {"cache": "dual", "rule": fdpp.Wino(0.3, 0.8), "drafts": 2},
    "drafts": {"cache": "dual", "rule": Quota(1), "drafts": 3},
    "tree": {"cache": "prefix", "rule": Frechet(0.1), "drafts": "auto", "branches": "tree"},
    "guided": {"cache": "dual", "rule": Frechet(0.1), "cfg_scale": 0.7},
    "without EOS": {"cache": "dual", "rule": Frechet(0.1), "logits_eos_inf": True},
    "filtered": {
        **{"cache": "dual", "rule": Frechet(0.1), "top_p": 0.7, "repetition_penalty": 1.3},
        **{"suppress_tokens": [3, 60], "bad_words_ids": [[50], [1, 61]]},
    },
    "ragged": {"cache": "dual", "rule": Factor(0.9), "attention_mask": ragged_mask},
}


def cases(name: str) -> list[str]:
    """The decodes of a model: of other families than LLaDA the ones whose forwards differ."""
    others = {"Dream": ["none", "prefix", "dual", "tree", "ragged"], "SDAR": ["prefix", "tree", "ragged"]}
    return others.get(MODELS[name][0], list(DECODES))


def decode(model: DiffusionLM, settings: dict[str, Any]) -> tuple[Tensor, ...]:
    ids = ragged if "attention_mask" in settings else prompts(2, 7)
    out = model.generate(ids, **{"max_new_tokens": 20, "block_length": 8, **settings})
    return out.sequences, out.nfe, out.commit_step


def in_float64(model: DiffusionLM) -> DiffusionLM:
    """`model`, computing in float64, so that the order of a sum decides no commit."""
    model.double().project_slice = lambda hidden: type(model).project_slice(model, hidden).float()
    return model


QUESTIONS = [prompts(1, P, seed=P)[0] for P in (9, 3, 7, 5, 8)]


def answers(model: DiffusionLM, questions: list[Tensor]) -> list[list[int]]:
    """The responses, decoded as one batch."""
    ids, mask = left_pad(questions)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=20, block_length=8, rule=Frechet(0.1))
    return out.sequences[:, ids.shape[1] :].tolist()


def answer_all() -> list[list[int]]:
    """Data parallel: every process answers its share of the questions, and all get all answers in their order."""
    from accelerate import PartialState
    from accelerate.utils import gather_object

    model = in_float64(small_model())
    with PartialState(cpu=True).split_between_processes(QUESTIONS) as mine:
        return gather_object(answers(model, mine))


def decode_all(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    results["answers"] = answer_all()
    plan = DistributedConfig(tp_plan="auto")
    model = in_float64(LLaDAModelLM.from_pretrained(folder / "tiny", distributed_config=plan, dtype=torch.float64))
    ids = torch.load(folder / "tiny.pt")
    results["tiny"] = model.generate(ids, max_new_tokens=48, cache="dual", rule=Frechet(0.25)).sequences
    for name in MODELS:
        kind = type(MADE[MODELS[name][0]]())
        model = in_float64(kind.from_pretrained(folder / name, tp_plan="auto", dtype=torch.float64))
        held = model.vocabulary_slice()
        results[name] = {
            "decodes": {case: decode(model, DECODES[case]) for case in cases(name)},
            "logits": model(prompts(2, 7)).logits,
            "held": (held.first, held.held),
            "weights": {n: p.to_local().numel() for n, p in model.named_parameters() if hasattr(p, "to_local")},
        }
    torch.manual_seed(dist.get_rank())
    results["drawn seed"] = decode(model, {"rule": Threshold(0.5), "temperature": 0.6})
    results["dawn"] = error_of(lambda: decode(model, {"rule": Dawn()}))
    results["static"] = error_of(lambda: decode(model, {"engine": "static"}))
    for family in SMALL:
        kind = type(SMALL[family]())
        results[f"heads of {family}"] = error_of(
            partial(kind.from_pretrained, folder / f"one kv head of {family}", tp_plan="auto")
        )
    return results


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    dist.init_process_group("gloo")
    results = {"select": select_all(), "decode": decode_all(folder) if (folder / "tiny").exists() else {}}
    torch.save(results, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()
