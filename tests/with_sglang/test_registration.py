"""From the entry point to an algorithm: SGLang's loader, registry, command line and configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, ClassVar

import pytest

import fdpp

pytest.importorskip("sglang", reason="`make sglang-check` runs it, in an environment of its own")

NAMES = {
    "FrechetProfile": fdpp.Frechet,
    "ThresholdProfile": fdpp.Threshold,
    "FactorProfile": fdpp.Factor,
    "EntropyBoundProfile": fdpp.EntropyBound,
    "LocalLeapProfile": fdpp.LocalLeap,
    "HierarchyProfile": fdpp.Hierarchy,
    "QuotaProfile": fdpp.Quota,
    "ThresholdQuotaProfile": fdpp.ThresholdQuota,
    "ThresholdLeftmostProfile": fdpp.ThresholdLeftmost,
    "EntropySumProfile": fdpp.EntropySum,
    "LeftmostProfile": fdpp.Leftmost,
    "LeftmostRunProfile": fdpp.LeftmostRun,
    "EditingProfile": fdpp.Editing,
}
SHIPPED = {"LowConfidence", "JointThreshold", "JointThresholdInDel", "Gemma4Renoise"}


@pytest.fixture
def registry(plugin: Any) -> Iterator[dict[str, type]]:
    """SGLang's registry with the plugin in it, put back as it was."""
    from sglang.srt.dllm.algorithm import algo_name_to_cls

    before = dict(algo_name_to_cls)
    yield algo_name_to_cls
    algo_name_to_cls.clear()
    algo_name_to_cls.update(before)


def test_the_entry_point_names_the_plugin() -> None:
    (found,) = [entry for entry in entry_points(group="sglang.srt.plugins") if entry.name == "fdpp"]
    assert found.value == "fdpp.integrations.sglang:register"


def test_the_registry_holds_our_algorithms_beside_the_shipped_ones(registry: dict[str, type]) -> None:
    from sglang.srt.dllm.algorithm import get_algorithm_cls
    from sglang.srt.dllm.algorithm.base import DllmAlgorithm

    assert set(registry) == SHIPPED | set(NAMES)
    for name, rule in NAMES.items():
        found: Any = get_algorithm_cls(name)
        assert issubclass(found, DllmAlgorithm) and found.__name__ == name and found.rule is rule


def test_registering_again_changes_nothing_and_a_taken_name_is_refused(plugin: Any, registry: dict[str, type]) -> None:
    plugin.register()
    assert set(registry) == SHIPPED | set(NAMES)
    registry["FactorProfile"] = registry["LowConfidence"]
    with pytest.raises(ValueError, match="FactorProfile: SGLang already has"):
        plugin.register()


@dataclasses.dataclass(frozen=True)
class Pairs(fdpp.Rule):
    """A user's rule: at most two positions."""

    least: float = 0.5
    predicate: ClassVar[Callable[..., Any]] = fdpp.Quota.predicate

    def params(self) -> tuple[float, float]:
        return 2.0, self.least


def test_a_rule_of_ones_own_is_served(plugin: Any, registry: dict[str, type], algorithm: Callable[..., Any]) -> None:
    plugin.register(Pairs)
    assert algorithm("PairsProfile", least=0.25).denoise.rule == Pairs(0.25)


@pytest.mark.parametrize(
    ("name", "settings", "rule"),
    [
        ("FrechetProfile", {}, fdpp.Frechet()),
        ("FrechetProfile", {"margin": 0.5, "calibration": 0.1, "block_size": 8}, fdpp.Frechet(0.5, 0.1)),
        ("LocalLeapProfile", {"radius": 2}, fdpp.LocalLeap(radius=2)),
        ("QuotaProfile", {"k": 4}, fdpp.Quota(4)),
    ],
)
def test_settings_are_the_fields_of_the_rule(
    algorithm: Callable[..., Any], name: str, settings: dict[str, Any], rule: fdpp.Rule
) -> None:
    assert algorithm(name, **settings).denoise.rule == rule


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "FrechetProfile",
            {"threshold": 0.9},
            r"Frechet: unknown settings \['threshold'\].*\['margin', 'calibration'\]",
        ),
        ("FactorProfile", {"f": -1}, "Factor: expected f in"),
        ("ThresholdProfile", {"tau": "0.9"}, "Threshold: expected tau in"),
        ("QuotaProfile", {}, "Quota: k is None"),
    ],
)
def test_wrong_settings_are_named(
    algorithm: Callable[..., Any], name: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        algorithm(name, **settings)


CHECKPOINTS = {"LLaDA2MoeModelLM": (32, 156895), "SDARForCausalLM": (4, 151669), "SDARMoeForCausalLM": (4, 151669)}


def launched(tmp_path: Path, architecture: str, settings: str, *options: str) -> Any:
    """`ServerArgs` of a launch command, for a checkpoint of which only `config.json` is there."""
    from sglang.srt.server_args import prepare_server_args

    (tmp_path / "config.json").write_text(
        f'{{"architectures": ["{architecture}"], "model_type": "qwen3", "hidden_size": 64, "head_dim": 16,'
        ' "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 2, "intermediate_size": 128,'
        ' "vocab_size": 157184, "max_position_embeddings": 512, "torch_dtype": "bfloat16"}'
    )
    (tmp_path / "settings.yaml").write_text(settings)
    command = ["--model-path", str(tmp_path), "--device", "cpu", "--dllm-algorithm", "FrechetProfile"]
    return prepare_server_args([*command, "--dllm-algorithm-config", str(tmp_path / "settings.yaml"), *options])


@pytest.mark.parametrize("architecture", CHECKPOINTS)
@pytest.mark.parametrize("options", [(), ("--no-dllm-fdfo",)])
def test_the_launch_command_builds_the_algorithm(
    plugin: Any, tmp_path: Path, architecture: str, options: tuple[str, ...]
) -> None:
    from sglang.srt.dllm.algorithm.base import DllmAlgorithm

    server_args = launched(tmp_path, architecture, "margin: 0.4\n", *options)
    server_args.resolve_once()
    built = DllmAlgorithm.from_server_args(server_args)
    assert type(built).__name__ == "FrechetProfile" and built.denoise.rule == fdpp.Frechet(0.4)
    assert (built.block_size, built.denoise.mask_id) == CHECKPOINTS[architecture]
    assert built.fdfo is not bool(options)


def test_a_block_size_in_the_settings_is_sglangs(plugin: Any, tmp_path: Path) -> None:
    from sglang.srt.dllm.algorithm.base import DllmAlgorithm

    assert DllmAlgorithm.from_server_args(launched(tmp_path, "SDARForCausalLM", "block_size: 16\n")).block_size == 16


def test_wrong_settings_stop_the_launch_before_the_model_loads(plugin: Any, tmp_path: Path) -> None:
    server_args = launched(tmp_path, "SDARForCausalLM", "margins: 0.4\n")
    with pytest.raises(ValueError, match=r"unknown settings \['margins'\]"):
        server_args.resolve_once()
