"""lm-evaluation-harness model `fdpp`: a diffusion model decoded by rules, block by block (the extra `eval`).

`python -m fdpp eval` runs it. In Python, importing this module registers the name:

    import lm_eval
    import fdpp.integrations.lm_eval
    lm_eval.simple_evaluate("fdpp", model_args={"pretrained": "tiny", "rule": "frechet", "margin": 0.25}, tasks=[...])

Data parallel: under `accelerate launch -m fdpp eval ...` every process takes its share of the requests.
"""

from __future__ import annotations

import os
from dataclasses import fields, replace
from typing import Any

import torch
from transformers import AutoTokenizer

import fdpp
from fdpp import tiny
from fdpp.decoding.settings import DiffusionGenerationConfig
from fdpp.integrations.evaluation.evaluator import Evaluator, Request, Tally
from fdpp.integrations.extras import install
from fdpp.models import families
from fdpp.models.adapters import merge_adapter
from fdpp.models.language_model import DiffusionLM

MISSING = "this needs {name}, which is not installed: " + install("eval")

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.utils import simple_parse_args_string
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(MISSING.format(name=f"lm-evaluation-harness (module {error.name})")) from error


def processes() -> Any:
    """accelerate's state if this is one of several processes of `accelerate launch` or `torchrun`, else None.

    It also makes this process's GPU the current one, so call it before a model is put there.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    try:
        from accelerate import PartialState
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(MISSING.format(name="accelerate")) from error
    return PartialState(cpu=not torch.cuda.is_available())


@register_model("fdpp")
class FdppLM(LM):
    """An `LM` of lm-evaluation-harness; arguments are those of `Evaluator`."""

    def __init__(
        self,
        model: DiffusionLM,
        tokenizer: Any,
        config: DiffusionGenerationConfig | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.state = processes()
        if self.state is not None:
            self._rank, self._world_size = self.state.process_index, self.state.num_processes
        self._device = model.device
        self.tokenizer = tokenizer
        self.evaluator = Evaluator(model, tokenizer, config, rank=self._rank, **settings)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> FdppLM:
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None) -> FdppLM:
        """From flat arguments: `pretrained` (folder, id, "tiny" or "tiny:TASK"), `peft` (folder or id of an adapter),
        `dtype`, `device`, `rule` (its name), the fields of the rule and of `DiffusionGenerationConfig`, and the keyword
        arguments of `Evaluator`. Those fields stay, whatever a task asks for.

        Raises:
            ValueError: an argument that is none of these, or a value that does not fit.
        """
        given = {**arg_dict, **{name: value for name, value in (additional_config or {}).items() if value is not None}}
        given.pop("max_batch_size", None)
        if "max_new_tokens" in given:
            given["gen_length"] = given.pop("max_new_tokens")
        if "batch_size" in given:
            if not str(given["batch_size"]).isdecimal():
                raise ValueError(f"batch_size: expected an int of at least 1, got {given['batch_size']!r}")
            given["batch_size"] = int(given["batch_size"])
        if given.get("cache", "dual") is None:
            given["cache"] = "none"  # in a string of arguments the harness reads it as None
        names = ("pretrained", "dtype", "device", "peft")
        pretrained, dtype, device, adapter = (given.pop(name, None) for name in names)
        name = given.pop("rule", "frechet")
        rules, presets = fdpp.Rule.named(), fdpp.Rule.presets
        if name not in {*rules, *presets}:
            raise ValueError(f"rule: expected one of {', '.join([*presets, *rules])}, got {name!r}")
        numbers = {} if name in presets else taken(given, rules[name])
        settings = taken(given, DiffusionGenerationConfig)
        stays = {*settings, *(["rule"] if numbers or "rule" in arg_dict else [])}
        pretrained = pretrained or "tiny"
        task = tiny.task_of(pretrained)
        if task is not None:
            settings.setdefault("block_length", task.block_length)
        rule = fdpp.Rule.of({"name": name, **numbers} if numbers else name)
        config = DiffusionGenerationConfig(rule=rule, **settings)
        unknown = sorted(
            given.keys() - {"gen_length", "batch_size", "mc_num", "check_greedy", "add_bos_token", "resume"}
        )
        if unknown:
            raise ValueError(f"model_args: unknown {unknown} with rule={name}")
        processes()
        model, tokenizer = load(pretrained, dtype or "auto", device)
        model = model if adapter is None else merge_adapter(model, adapter)
        return cls(model, tokenizer, config, given=stays, **given)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.state is None:
            return tensor
        from accelerate.utils import gather

        return gather(tensor)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        if self.state is None:
            return [obj]
        objects = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object(obj, objects, dst=dst)
        return objects

    def barrier(self) -> None:
        if self.state is not None:
            self.state.wait_for_everyone()

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return self.tokenizer.chat_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def generate_until(self, requests: list[Any]) -> list[str]:
        return self.evaluator.responses([Request(request.task_name or "", *request.args) for request in requests])

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return self.evaluator.likelihoods([request.args for request in requests])

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        raise NotImplementedError(
            "fdpp: perplexity tasks are not implemented; a masked-diffusion model bounds the likelihood of a target "
            "as a whole, not token by token"
        )

    def report(self) -> dict[str, dict[str, float]]:
        """What the responses of every task cost (`Tally.report`), over all processes, which must all call it.

        Only the first process gets the costs, the others an empty dict. The processes run in parallel, so the seconds
        are those of the slowest.
        """
        merged: dict[str, Tally] = {}
        for tallies in self.gather_object(self.evaluator.tallies) or []:
            for task, tally in tallies.items():
                total = merged.setdefault(task, Tally())
                total.add(replace(tally, seconds=max(tally.seconds - total.seconds, 0.0)))
        return {task: tally.report() for task, tally in merged.items()}


def taken(given: dict[str, Any], kind: type) -> dict[str, Any]:
    """The entries of `given` that are fields of the dataclass `kind`, taken out of it."""
    return {field.name: given.pop(field.name) for field in fields(kind) if field.name in given}


def load(pretrained: str, dtype: str, device: str | None) -> tuple[DiffusionLM, Any]:
    """Model and tokenizer; `dtype` "auto" is bfloat16 on a GPU, float32 elsewhere."""
    at = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kind = getattr(torch, ("bfloat16" if at.type == "cuda" else "float32") if dtype == "auto" else dtype, None)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f'dtype: expected "auto" or the name of a dtype of torch, got {dtype!r}')
    task = tiny.task_of(pretrained)
    if task is not None:
        model, tokenizer = tiny.load(task.name)
        return model.to(at, kind), tokenizer
    return families.load(pretrained, dtype=kind).eval().to(at), AutoTokenizer.from_pretrained(pretrained)
