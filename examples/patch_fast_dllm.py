"""A script of the Fast-dLLM family on fdpp's step, by one line.

python examples/patch_fast_dllm.py
python examples/patch_fast_dllm.py PATH_TO_FAST_DLLM/llada/generate.py

Without a path it takes the stand-in of the tests, whose functions have the published names, parameters and results.
"""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import fdpp
from fdpp import tiny

STAND_IN = Path(__file__).parents[1] / "tests" / "helpers" / "script_like.py"


def load(path: Path) -> ModuleType:
    """The script as a module; in code of your own that is `import generate`."""
    sys.path.insert(0, str(path.parent))  # what it imports lies beside it
    spec = spec_from_file_location("generate", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise SystemExit(f"expected a Python file, got {path}")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    generate = load(Path(sys.argv[1]) if len(sys.argv) == 2 else STAND_IN)
    model, tokenizer = tiny.load()
    problem = tiny.generate("held-out", 1)[0]
    prompt = tokenizer(problem.prompt, return_tensors="pt")["input_ids"]
    settings = {"steps": 128, "gen_length": 128, "block_length": 32, "threshold": 0.9}
    settings["mask_id"] = model.config.mask_token_id
    before, nfe = generate.generate(model, prompt, **settings)

    fdpp.patch(generate)  # the line

    after, nfe_after = generate.generate(model, prompt, **settings)
    print(tokenizer.decode(after[0, prompt.shape[1] :], skip_special_tokens=True))
    print(f"{nfe} forwards before the patch, {nfe_after} after; the same tokens: {before.equal(after)}")
    fdpp.unpatch(generate)  # and everything is as it was


if __name__ == "__main__":
    main()
