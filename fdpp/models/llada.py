"""LLaDA as a `transformers` model: bidirectional attention, RMSNorm, SwiGLU, rotary positions, no biases.

Nie et al., Large Language Diffusion Models, arXiv 2502.09992. The parameter names are those of the published
checkpoints, so their safetensors load without a conversion.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput

from fdpp.cache import BlockCache, attend
from fdpp.decoding.generate import DiffusionGenerationMixin
from fdpp.models.configuration import LLaDAConfig
from fdpp.models.joined import Joined


class RMSNorm(nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)`, the quotient in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `RMSNorm`."""
    if x.dtype == torch.float32:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return weight * F.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


def rotary_angles(position_ids: Tensor, head_size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[B, 1, T, head_size / 2]` (float32) of the rotary angles at `position_ids` `[B, T]`."""
    exponent = torch.arange(0, head_size, 2, device=position_ids.device, dtype=torch.float32) / head_size
    angles = position_ids[:, None, :, None].float() * (1.0 / theta**exponent)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the halves of the last dimension against each other, in float32."""
    cos, sin = angles
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


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

    def forward(
        self,
        x: Tensor,
        angles: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        cache: BlockCache | None,
        start: int | Tensor,
    ) -> Tensor:
        q, k, v = self.attention_inputs(x, angles)
        if cache is None:
            h = attend(q, k, v, attention_mask)
        else:
            h = cache.attend(self.layer, q, k, v, attention_mask, start)
        x = x + self.attn_out(h.transpose(1, 2).flatten(2))
        return x + self.feed_forward(self.ff_norm(x))

    def attention_inputs(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries `[B, H, T, hd]`, rotated keys and values `[B, kv_heads, T, hd]`."""
        h = self.attn_norm(x)
        weight = self.qkv.matrix()
        if weight is None:
            parts = [layer(h) for layer in (self.q_proj, self.k_proj, self.v_proj)]
            q, k, v = (part.unflatten(2, (-1, self.head_size)).transpose(1, 2) for part in parts)
            return rotate(q, angles), rotate(k, angles), v
        heads = F.linear(h, weight).unflatten(2, (-1, self.head_size)).transpose(1, 2)
        rotated = rotate(heads[:, : self.n_heads + self.n_kv_heads], angles)
        return rotated[:, : self.n_heads], rotated[:, self.n_heads :], heads[:, self.n_heads + self.n_kv_heads :]

    def feed_forward(self, h: Tensor) -> Tensor:
        """SwiGLU."""
        weight = self.gate_up.matrix()
        if weight is None:
            return self.ff_out(F.silu(self.ff_proj(h)) * self.up_proj(h))
        gate, up = F.linear(h, weight).chunk(2, dim=-1)
        return self.ff_out(F.silu(gate).mul_(up))


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
    ) -> Tensor:
        """Hidden states `[B, T, d_model]` after the final norm of `input_ids` `[B, T]`.

        `attention_mask` `[B, S]` is 1 at keys that may be seen (S: the cache's length, else T); a `[B, 1, T, S]` bool
        mask says it for every query. `position_ids` `[B, T]` default to `start, start + 1, ...`. With a `cache`, the T
        positions stand at its columns from `start` on (or at the columns `start`, an int64 tensor `[T]`): their keys
        and values replace what it holds there and attention goes over all S columns. `hidden_states`, if a list,
        receives the input of every block and the returned tensor.
        """
        T = input_ids.shape[1]
        if position_ids is None:
            at = torch.arange(start, start + T, device=input_ids.device) if isinstance(start, int) else start
            position_ids = at[None]
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = attention_mask[:, None, None, :].bool()
        x = self.transformer["wte"](input_ids)
        angles = rotary_angles(position_ids, self.config.d_model // self.config.n_heads, self.config.rope_theta)
        for block in self.transformer["blocks"]:
            if hidden_states is not None:
                hidden_states.append(x)
            x = block(x, angles, attention_mask, cache, start)
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

    @torch.no_grad()
    def join_weights(self) -> None:
        """Lay the weights that read the same input side by side in memory, see `fdpp.models.joined`.

        The first forward does it by itself; done ahead, the weights stand where they will stay.
        """
        for block in self.model.transformer["blocks"]:
            block.qkv.matrix()
            block.gate_up.matrix()

    def project(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` of hidden states `[..., d_model]`."""
        head = self.model.transformer["wte" if self.config.weight_tying else "ff_out"]
        # Rows above the vocabulary pad the matrix; no token has their ids.
        return F.linear(hidden, head.weight[: self.config.vocab_size])

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool = False,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Logits `[B, L, V]` of every position; a masked position's row predicts its token.

        `input_ids` `[B, L]` int64; `attention_mask` `[B, L]` is 1 at real tokens, 0 at padding.
        """
        if kwargs.pop("return_dict", True) is False:
            raise ValueError("LLaDAModelLM.forward: return_dict=False is not implemented, read `.logits`")
        if kwargs:
            raise TypeError(f"LLaDAModelLM.forward: unexpected arguments {sorted(kwargs)}")
        states: list[Tensor] | None = [] if output_hidden_states else None
        hidden = self.model(input_ids, attention_mask, position_ids, hidden_states=states)
        return MaskedLMOutput(
            logits=self.project(hidden),
            hidden_states=None if states is None else tuple(states),
        )

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint as `PreTrainedModel.from_pretrained` does, but strictly.

        A parameter that the checkpoint lacks, one that the model does not have, and one of another shape raise
        `ValueError` with their names.
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
            raise ValueError(f"LLaDA checkpoint: {'; '.join(problems)}")
        model.join_weights()
        return (model, info) if wants_info else model


AutoConfig.register("llada", LLaDAConfig, exist_ok=True)
AutoModel.register(LLaDAConfig, LLaDAModelLM, exist_ok=True)
AutoModelForMaskedLM.register(LLaDAConfig, LLaDAModelLM, exist_ok=True)
AutoModelForCausalLM.register(LLaDAConfig, LLaDAModelLM, exist_ok=True)
