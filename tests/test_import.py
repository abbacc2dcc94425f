"""What `import fdpp` and the command line's help load, and when the `Auto` classes know its families."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fdpp

HELPERS = Path(__file__).parent / "helpers"
HEAVY = ("transformers", "torchao", "peft", "datasets", "lm_eval", "matplotlib", "torch.distributed.tensor")
"""What takes long to import and no step needs."""


def run(code: str) -> str:
    """What a fresh process prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_step_and_the_help_load_no_model() -> None:
    code = f"""
import sys, torch, fdpp
from fdpp import cli
fdpp.select(torch.zeros(1, 2, 3), torch.full((1, 2), 2), rule=fdpp.Rule.of("balanced"), mask_id=2)
fdpp.DiffusionGenerationConfig(rule=fdpp.Frechet(0.5), stop_strings="x")
assert "LLaDAModelLM" in dir(fdpp) and "DreamModelLM" in dir(fdpp)
assert cli.main(["--help"]) == 0
for command in cli.COMMANDS:
    assert cli.main([command.__name__.rpartition(".")[2], "--help"]) == 0
print("loaded:", [module for module in {HEAVY} if module in sys.modules])
"""
    assert run(code).splitlines()[-1] == "loaded: []"


ORDERS = {
    "fdpp first": "import fdpp; from transformers import AutoConfig, AutoModelForCausalLM",
    "transformers first": "from transformers import AutoConfig, AutoModelForCausalLM; import fdpp",
    "between the two": "from transformers import AutoConfig; import fdpp; "
    "from transformers import AutoModelForCausalLM",
    "from the middle": "import fdpp, transformers.modeling_utils; from transformers import AutoConfig, "
    "AutoModelForCausalLM",
}


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_know_all_families_in_any_order_of_imports(order: str) -> None:
    """Before anybody asks fdpp for a model."""
    code = f"""
{ORDERS[order]}
sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=16, vocab_size=20)
for kind in ("llada", "Dream", "sdar", "Fast_dLLM_Qwen", "llada2_moe"):
    print(type(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))).__module__)
"""
    files = ("llada", "dream", "sdar", "fast_dllm", "llada2")
    assert run(code).splitlines()[-5:] == [f"fdpp.models.{file}" for file in files]


def test_a_family_of_somebody_elses_registers_itself_where_it_is_imported() -> None:
    code = """
import family_of_others
from transformers import AutoConfig, AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_config(AutoConfig.for_model("gist"))).__module__)
from fdpp.models.families import families
print([kind for kind in families() if kind in ("llada", "Dream", "gist")])
"""
    found = run(f"import sys; sys.path.insert(0, {str(HELPERS)!r})\n{code}").splitlines()[-2:]
    assert found == ["family_of_others", "['llada', 'Dream', 'gist']"]


@pytest.mark.parametrize("name", fdpp.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(fdpp, name) is not None and name in dir(fdpp)


def test_a_name_that_is_not_there_is_named() -> None:
    with pytest.raises(AttributeError, match="'fdpp' has no attribute 'LLaDA'"):
        fdpp.LLaDA  # noqa: B018
