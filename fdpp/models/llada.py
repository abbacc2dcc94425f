"""LLaDA as a `transformers` model: bidirectional attention, RMSNorm, SwiGLU, rotary positions, no biases.

Nie et al., Large Language Diffusion Models, arXiv 2502.09992. The parameter names are those of the published
checkpoints, so their safetensors load without a conversion.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from fdpp.attention.cache import BlockCache, attend
from fdpp.attention.rotary import Angles, rotary_angles, rotate
from fdpp.decoding.generate import DiffusionGenerationMixin
from fdpp.decoding.identity import places
from fdpp.models import quantised
from fdpp.models.configuration import BLOCKS_TP_PLAN, LLaDAConfig
from fdpp.models.joined import Joined
from fdpp.models.layers import (
    attention_inputs,
    attention_inputs_gpu,
    block_output,
    compiled,
    keys_to_see,
    on_kernels,
    rms_norm,
    swiglu,
)
from fdpp.models.linear import apply, is_plain, is_product, is_untouched, linear
from fdpp.step import parallel

SPARED = ("inputs_embeds", "labels", "output_attentions", "past_key_values", "use_cache")
"""Arguments of other models' `forward` that are not implemented, and may say so."""


class RMSNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)`, the quotient in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class LLaDABlock(nn.Module):
    """One pre-norm transformer block: attention over all positions, then SwiGLU."""

    def __init__(self, config: LLaDAConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_heads, self.n_kv_heads = config.n_heads, config.n_kv_heads
        self.head_size = config.d_model // config.n_heads
        kv_size = config.n_kv_heads * self.head_size
        self.q_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.k_proj = nn.Linear(config.d_model, kv_size, bias=False)
        self.v_proj = nn.Linear(config.d_model, kv_size, bias=False)
        self.attn_out = nn.Linear(config.d_model, config.d_model, bias=False)
        self.attn_norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.ff_norm = RMSNorm(config.d_model, config.rms_norm_eps)
        self.ff_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.mlp_hidden_size, bias=False)
        self.ff_out = nn.Linear(config.mlp_hidden_size, config.d_model, bias=False)
        self.qkv = Joined(self._modules, "q_proj", "k_proj", "v_proj")
        self.gate_up = Joined(self._modules, "ff_proj", "up_proj")
        self.compile_layers = False

    def forward(
        self,
        x: Tensor,
        angles: Angles,
        attention_mask: Tensor | None,
        cache: BlockCache | None,
        start: int | Tensor,
        wanted: slice | Tensor | None = None,
    ) -> Tensor:
        qkv, gate_up = self.qkv.matrix(), self.gate_up.matrix()
        fused = qkv is not None and gate_up is not None and is_product(self.attn_out) and is_product(self.ff_out)
        fused = fused and all(type(norm) is RMSNorm and is_untouched(norm) for norm in (self.attn_norm, self.ff_norm))
        run: Callable[..., Any] = compiled if self.compile_layers else lambda function: function
        stored, norm, heads = False, self.attn_norm, (self.n_heads, self.n_kv_heads)
        if fused and qkv is not None and not self.compile_layers and on_kernels(x):
            place = None if cache is None else partial(cache.place, self.layer, start)
            q, k, v, stored = attention_inputs_gpu(x, norm.weight, qkv, angles, norm.eps, *heads, place)
            # `block_output` overwrites its input, which a hook on this block may keep.
            x = x if is_untouched(self) else x.clone()
        elif fused:
            q, k, v = run(attention_inputs)(x, norm.weight, qkv, angles, norm.eps, *heads)
        else:
            q, k, v = self.heads(x, angles)
        if wanted is not None:
            x, q = x[:, wanted].contiguous(), q[:, :, wanted]
            if attention_mask is not None and attention_mask.shape[2] > 1:
                attention_mask = attention_mask[:, :, wanted]
        if cache is None:
            h = attend(q, k, v, attention_mask)
        else:
            h = cache.attend(self.layer, q, k, v, attention_mask, start, stored)
        if fused:
            norm = self.ff_norm
            return run(block_output)(x, h, self.attn_out.weight, norm.weight, gate_up, self.ff_out.weight, norm.eps)
        x = x + apply(self.attn_out, h.transpose(1, 2).flatten(2))
        h = self.ff_norm(x)
        return x + apply(self.ff_out, swiglu(apply(self.ff_proj, h), apply(self.up_proj, h)))

    def heads(self, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """`attention_inputs`, layer by layer."""
        h = self.attn_norm(x)
        parts = [apply(layer, h) for layer in (self.q_proj, self.k_proj, self.v_proj)]
        q, k, v = (part.unflatten(2, (-1, self.head_size)).transpose(1, 2) for part in parts)
        return rotate(q, angles), rotate(k, angles), v


class LLaDAPreTrainedModel(PreTrainedModel):
    config_class = LLaDAConfig
    base_model_prefix = "model"
    _no_split_modules = ("LLaDABlock",)
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.init_std)
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)


class LLaDAModel(LLaDAPreTrainedModel):
    """The transformer up to its final norm; it also holds the head's weight, as the published checkpoints do."""

    transformer: Any

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        parts: dict[str, nn.Module] = {
            "wte": nn.Embedding(config.embedding_size, config.d_model),
            "blocks": nn.ModuleList(LLaDABlock(config, layer) for layer in range(config.n_layers)),
            "ln_f": RMSNorm(config.d_model, config.rms_norm_eps),
        }
        if not config.weight_tying:
            parts["ff_out"] = nn.Linear(config.d_model, config.embedding_size, bias=False)
        self.transformer = nn.ModuleDict(parts)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer["wte"]

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.transformer["wte"] = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: BlockCache | None = None,
        start: int | Tensor = 0,
        hidden_states: list[Tensor] | None = None,
        wanted: slice | Tensor | None = None,
    ) -> Tensor:
        """Hidden states `[B, T, d_model]` after the final norm of `input_ids` `[B, T]`.

        Args:
            attention_mask: `[B, S]`, `[B, T, S]` or `[B, heads or 1, T, S]`, True or 1 at keys to see (S: the cache's
                length, else T), see `fdpp.models.layers.keys_to_see`.
            position_ids: `[B, T]`, by default the columns.
            cache: replaces its keys and values at the T columns by those of this forward; attention is over all S.
            start: the first column, or all of them, int64 `[T]`.
            hidden_states: a list, which receives the input of every block and the returned tensor.
            wanted: a slice or indices `[m]` of the T positions: only their hidden states are returned,
                `[B, m, d_model]`, and the last block computes no others.
        """
        T = input_ids.shape[1]
        if position_ids is None:
            at = torch.arange(start, start + T, device=input_ids.device) if isinstance(start, int) else start
            position_ids = at[None]
        if attention_mask is not None:
            keys = T if cache is None else None
            attention_mask = keys_to_see(attention_mask, input_ids.shape[0], T, keys, self.config.n_heads)
        x = self.transformer["wte"](input_ids)
        if not is_untouched(self.transformer["wte"]):
            x = x.clone()  # as in `LLaDABlock.forward`
        angles = rotary_angles(position_ids, self.config.d_model // self.config.n_heads, self.config.rope_theta)
        for block in self.transformer["blocks"]:
            if hidden_states is not None:
                hidden_states.append(x.clone())
            last = block.layer == self.config.n_layers - 1
            x = block(x, angles, attention_mask, cache, start, wanted if last else None)
        x = self.transformer["ln_f"](x)
        if hidden_states is not None:
            hidden_states.append(x)
        return x


class LLaDAModelLM(DiffusionGenerationMixin, LLaDAPreTrainedModel):
    """LLaDA with its language-model head and `generate`."""

    model: LLaDAModel

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__(config)
        self.model = LLaDAModel(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.config.weight_tying else self.model.transformer["ff_out"]

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.model.transformer["ff_out"] = value

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As in transformers; also sets `config.embedding_size`, the rows that a checkpoint has."""
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self.config.embedding_size = embedding.weight.shape[0]
        return embedding

    @torch.no_grad()
    def join_weights(self) -> None:
        """Join the weights that read the same input into one matrix, see `fdpp.models.joined`.

        The first forward does it anyway; done earlier, the weights do not move then.
        """
        for block in self.model.transformer["blocks"]:
            block.qkv.matrix()
            block.gate_up.matrix()

    @property
    def head(self) -> Tensor:
        """The head's weight: a row per id, then perhaps rows of padding that belong to no token."""
        return self.model.transformer["wte" if self.config.weight_tying else "ff_out"].weight

    def wrapped_head(self) -> nn.Module | None:
        """The head if it is more than its weight (a hook, an adapter, quantised, offloaded), else None."""
        module = self.get_output_embeddings()
        sharded = isinstance(self.head, DTensor)
        plain = module is None or is_plain(module) or (sharded and is_untouched(module))
        return None if plain else module

    def head_weight(self) -> Tensor:
        """The head as one matrix `[V, d_model]`, for an operator that does the product itself.

        Raises:
            ValueError: the head is more than its weight (a hook, an adapter, quantised), or not on a device.
        """
        wrapped = self.wrapped_head()
        if wrapped is not None or type(self.head) is not nn.Parameter or self.head.is_meta:
            raise ValueError(
                "head: expected a plain weight (no hook, no adapter, not quantised) on a device, "
                f"got {wrapped or type(self.head).__name__}"
            )
        return self.head[: self.config.vocab_size]

    def vocabulary_slice(self) -> parallel.VocabularySlice | None:
        """The ids whose logits this process has under tensor parallelism; None: all."""
        return parallel.slice_of(self.head, self.config.vocab_size)

    def project_slice(self, hidden: Tensor) -> Tensor:
        """Logits `[..., v]` of hidden states `[..., d_model]`, for the ids of `vocabulary_slice()`."""
        held = self.vocabulary_slice()
        wrapped = self.wrapped_head()
        if held is None and wrapped is not None:
            # Calls the hooks: accelerate's, for one, bring an offloaded weight and the hidden states to one device.
            # Layers of other libraries take at most three dimensions.
            logits = apply(wrapped, hidden.flatten(0, -3) if hidden.dim() > 3 else hidden)
            return logits.reshape(*hidden.shape[:-1], -1)[..., : self.config.vocab_size]
        weight, rows = parallel.local(self.head), self.config.vocab_size if held is None else held.held
        if weight.is_meta:
            raise ValueError("device_map: the embedding is also the head, expected it on a device, got it offloaded")
        if type(weight) not in (nn.Parameter, Tensor):
            # The embedding is also the head, and quantised.
            return F.linear(hidden, weight)[..., :rows]
        return linear(hidden, weight[:rows])

    def compile_layers(self, on: bool = True) -> None:
        """Let `torch.compile` fuse norm, rotation and gate into the products around them, in every block.

        The first forward of a shape compiles; `generate`'s static engine captures the compiled layers.
        """
        for block in self.model.transformer["blocks"]:
            block.compile_layers = on
        self.forget_captures()

    def forget_captures(self) -> None:
        """Drop all captured steps, their keys and values, and the reason why capturing failed, if it did.

        Not needed for changes to the model, which are noticed: replaced or wrapped layers, hooks, settings, moved
        weights.
        """
        self.__dict__.pop("_static_steps", None)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        """As in `nn.Module` (`.to()` and the like); also frees the memory that moved weights leave behind."""
        before = places(self)
        super()._apply(fn, recurse)
        if places(self) != before:
            self.forget_captures()
            for block in self.modules():
                if isinstance(block, LLaDABlock):
                    block.qkv.part()
                    block.gate_up.part()
        return self

    def project(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` of hidden states `[..., d_model]`, gathered from all processes where they are sharded."""
        held = self.vocabulary_slice()
        logits = self.project_slice(hidden)
        return logits if held is None else held.gather(logits)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool | None = False,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Logits `[B, L, V]` of every position; a masked position's row predicts its token.

        `input_ids` `[B, L]` int64. `attention_mask` `[B, L]` is 1 at real tokens, 0 at padding; `[B, L, L]` and
        `[B, heads or 1, L, L]` say for every position which others it sees. Of the arguments in `SPARED`, which
        wrappers pass on, None and False are taken.

        Raises:
            ValueError: a mask of another shape, or one that may be additive; `return_dict=False`.
            TypeError: an unknown argument, or no `input_ids`.
        """
        if kwargs.pop("return_dict", True) is False:
            raise ValueError("LLaDAModelLM.forward: return_dict=False is not implemented, read `.logits`")
        unknown = sorted(name for name, v in kwargs.items() if name not in SPARED or (v is not None and v is not False))
        if unknown or input_ids is None:
            raise TypeError(f"LLaDAModelLM.forward: unexpected arguments {unknown}, expected input_ids [B, L]")
        states: list[Tensor] | None = [] if output_hidden_states else None
        hidden = self.model(input_ids, attention_mask, position_ids, hidden_states=states)
        return MaskedLMOutput(
            logits=self.project(hidden),
            hidden_states=None if states is None else tuple(states),
        )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; refuses a model that was quantised in place, which has no configuration to load it by."""
        quantised.check_saveable(self)
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint as `PreTrainedModel.from_pretrained` does, but strictly.

        Raises:
            ValueError: parameters that are missing in the checkpoint, unknown to the model or of another shape, with
                their names; `n_kv_heads` that tensor parallelism cannot divide; a `quantization_config` that replaced
                no layer, or that names a layer to leave out which the model does not have.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # collected in `info` and refused below, with their names
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        problems = [
            f"{len(info[problem])} {problem.replace('_', ' ')}: "
            + ", ".join(str(key) for key in sorted(info[problem], key=str)[:8])
            for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")
            if info[problem]
        ]
        if problems:
            raise ValueError(f"LLaDA checkpoint{quantised.reading(model.config)}: {'; '.join(problems)}")
        quantised.check_loaded(
            model, layers=len(BLOCKS_TP_PLAN) * model.config.n_layers + (not model.config.weight_tying)
        )
        processes = model.tp_size or 1
        if model.config.n_kv_heads % processes:
            raise ValueError(
                f"tensor parallelism: expected n_kv_heads={model.config.n_kv_heads} to be a multiple of "
                f"the processes, got {processes}"
            )
        model.join_weights()
        return (model, info) if wants_info else model


AutoModel.register(LLaDAConfig, LLaDAModelLM, exist_ok=True)
AutoModelForMaskedLM.register(LLaDAConfig, LLaDAModelLM, exist_ok=True)
AutoModelForCausalLM.register(LLaDAConfig, LLaDAModelLM, exist_ok=True)
