"""A peft adapter merged into a model's weights, as strictly as a checkpoint is loaded (`pip install peft`)."""

from __future__ import annotations

import warnings
from typing import Any

from fdpp.models.language_model import DiffusionLM


def adapter_config(path: str) -> Any:
    """peft's configuration of the adapter in the folder, or of the Hugging Face id, `path`.

    Raises:
        ModuleNotFoundError: peft is not installed.
        ValueError: there is no adapter, or it is one of prompt learning, which a block decode cannot apply.
    """
    try:
        import peft
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("adapters need peft, which is not installed: pip install peft") from error
    config = peft.PeftConfig.from_pretrained(path)
    if config.is_prompt_learning:
        kind = type(config).__name__
        raise ValueError(f"expected an adapter in the layers such as LoRA, got one of prompt learning ({kind})")
    return config


def merge_adapter(model: DiffusionLM, path: str) -> DiffusionLM:
    """`model`, with the adapter at `path` merged into its weights, in their dtype; it then decodes as fast as before.

    Where the embedding is also the head, an adapter of it is left in its layer: merged, it would change the head, too.

    Raises:
        ModuleNotFoundError, ValueError: as `adapter_config`.
        ValueError, RuntimeError: it was made for other layers, or for layers of other sizes.
    """
    config = adapter_config(path)
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.PeftModel.from_pretrained(model, path, config=config)
        held, came = peft.get_peft_model_state_dict(adapted), peft.utils.load_peft_weights(path, device="cpu")
        lacking, unknown = sorted(held.keys() - came.keys()), sorted(came.keys() - held.keys())
        if lacking or unknown:
            found = [f"missing {key}" for key in lacking[:4]] + [f"unexpected {key}" for key in unknown[:4]]
            raise ValueError(f"the adapter does not fit the model: {', '.join(found)}")
        if model.config.tie_word_embeddings and hasattr(model.get_input_embeddings(), "merge"):
            return model.eval()
        merged: DiffusionLM = adapted.merge_and_unload()
        return merged.eval()
