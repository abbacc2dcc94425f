"""What a family's model with its head has from all families: projections, forwards, checkpoints, `generate`.

A family is a configuration, a `Transformer` and a `DiffusionLM` that names both. It says where its layers are and where
a position's logits come from, and is then decoded like any other. Its class registers it with transformers' `Auto`
classes and with `fdpp.models.families`; CONTRIBUTING.md names a whole one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.modeling_outputs import MaskedLMOutput

from fdpp.attention.cache import block_causal_mask
from fdpp.decoding.forwards import from_before
from fdpp.decoding.generate import DiffusionGenerationMixin
from fdpp.decoding.identity import places
from fdpp.models import quantised
from fdpp.models.block import Block
from fdpp.models.families import REGISTERED
from fdpp.models.linear import PER_BLOCK, apply, is_plain, is_untouched, linear
from fdpp.models.transformer import DiffusionPreTrainedModel, Transformer
from fdpp.step import parallel

SPARED = ("labels", "output_attentions", "past_key_values", "use_cache")
"""Arguments of other models' `forward` that are not implemented, and may say so."""


class DiffusionLM(DiffusionGenerationMixin, DiffusionPreTrainedModel):
    """A masked-diffusion language model: a family's transformer, its head and `generate`.

    A family's class has its own `config_class`. That makes it the one that `Auto` classes and `fdpp.models.families`
    find by the configuration's `model_type`.

    Attributes of the class:
        transformer_class: of `self.model`.
        published: the name of the class in the family's published remote code, which `fdpp.patch` looks for.
        shift: 0 where the hidden state of a column predicts the token in it, 1 where it predicts the next one.
        block_causal: whether no column sees a block behind its own; else every column sees all.
        anchored: whether the first token of a block is decided by the column before it, ahead of all others.
        default_sub_block_length: how many positions of a block are decided together; None: all of them.
    """

    transformer_class: ClassVar[type[Transformer]]
    published: ClassVar[str | None] = None
    model: Transformer

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if any(cls.config_class is getattr(base, "config_class", None) for base in cls.__bases__):
            return
        config: Any = cls.config_class
        # Not above: the import of `AutoModel` ends with the registration of all families, which needs this class.
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

        REGISTERED[config.model_type] = cls
        AutoConfig.register(config.model_type, config, exist_ok=True)
        for auto in (AutoModel, AutoModelForMaskedLM, AutoModelForCausalLM):
            auto.register(config, cls, exist_ok=True)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = self.transformer_class(config)
        self.make_head()
        self.post_init()

    def make_head(self) -> None:
        """Make the head where `get_output_embeddings` finds it, unless the embedding is the head."""
        if not self.config.tie_word_embeddings:
            self.lm_head: nn.Module = nn.Linear(self.config.hidden_size, self.config.vocab_size, bias=False)

    def get_output_embeddings(self) -> nn.Module | None:
        return None if self.config.tie_word_embeddings else self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.lm_head = value

    @classmethod
    def title(cls) -> str:
        """The family's name, for messages."""
        return cls.__name__.removesuffix("ModelLM")

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.set_input_embeddings(value)

    @torch.no_grad()
    def join_weights(self) -> None:
        """Join the weights that read the same input into one matrix, see `fdpp.models.joined`.

        The first forward does it anyway; done earlier, the weights do not move then.
        """
        for block in self.model.blocks:
            for joined in block.joins():
                joined.matrix()

    @property
    def head(self) -> Tensor:
        """The head's weight: a row per id, then perhaps rows of padding that belong to no token."""
        module: Any = self.get_output_embeddings()
        holder: Any = self.get_input_embeddings() if module is None else module
        weight: Tensor = holder.weight
        return weight

    def wrapped_head(self) -> nn.Module | None:
        """The head if it is more than its weight (a hook, an adapter, quantised, offloaded), else None."""
        module: nn.Module | None = self.get_output_embeddings()
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
        for block in self.model.blocks:
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
                for joined in block.joins() if isinstance(block, Block) else ():
                    joined.part()
        return self

    def project(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` of hidden states `[..., d_model]`, gathered from all processes where they are sharded."""
        held = self.vocabulary_slice()
        logits = self.project_slice(hidden)
        return logits if held is None else held.gather(logits)

    def aligned(self, rows: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """What predicts each position, of the `rows` `[B, L, ...]` of a forward over whole sequences.

        `rows` are hidden states or logits, as the model returns them. With `shift = 1` position i gets row i - 1, a
        sequence's first token its own. `attention_mask` `[B, L]` is 1 at real tokens; None: all are.
        """
        if not self.shift:
            return rows
        if attention_mask is None:
            return from_before(rows, 1)
        first = attention_mask.bool() & (attention_mask.long().cumsum(1) == 1)
        return from_before(rows, 1, first.view(*first.shape, *[1] * (rows.dim() - 2)))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool | None = False,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Logits `[B, L, V]` of every position, as the published models return them.

        The row of a masked position predicts its token, with `shift = 1` the row before it does (`aligned`).

        `input_ids` `[B, L]` int64, or in their place `inputs_embeds` `[B, L, d_model]`. `attention_mask` `[B, L]` is 1
        at real tokens, 0 at padding; `[B, L, L]` and `[B, heads or 1, L, L]` say for every position which others it
        sees. Without one of those a block-causal model's positions see no later block of `default_block_length`,
        counted from the row's first real token. Of the arguments in `SPARED`, which wrappers pass on, None and False
        are taken.

        Raises:
            ValueError: a mask of another shape, or one that may be additive; `return_dict=False`; ids and embeddings.
            TypeError: an unknown argument, or neither ids nor embeddings.
        """
        name = f"{type(self).__name__}.forward"
        if kwargs.pop("return_dict", True) is False:
            raise ValueError(f"{name}: return_dict=False is not implemented, read `.logits`")
        unknown = sorted(key for key, v in kwargs.items() if key not in SPARED or (v is not None and v is not False))
        if unknown or (input_ids is None and inputs_embeds is None):
            raise TypeError(f"{name}: unexpected arguments {unknown}, expected input_ids [B, L]")
        if input_ids is not None and inputs_embeds is not None:
            raise ValueError(f"{name}: expected input_ids or inputs_embeds, got both")
        if self.block_causal and (attention_mask is None or attention_mask.dim() == 2):
            like = inputs_embeds if input_ids is None else input_ids
            assert like is not None
            attention_mask = self.no_later_block(like.shape[:2], attention_mask, like.device)
        states: list[Tensor] | None = [] if output_hidden_states else None
        hidden = self.model(input_ids, attention_mask, position_ids, hidden_states=states, inputs_embeds=inputs_embeds)
        return MaskedLMOutput(
            logits=self.project(hidden),
            hidden_states=None if states is None else tuple(states),
        )

    def no_later_block(
        self, shape: torch.Size, real: Tensor | None, device: torch.device, block_length: int | None = None
    ) -> Tensor:
        """What each position of `shape` `[B, L]` sees, bool `[B or 1, L, L]`; padding is where `real` `[B, L]` is 0.

        `block_length`: None: `default_block_length`.
        """
        (B, L), grid = shape, block_length or self.default_block_length
        if real is None:
            return block_causal_mask(L, grid, device)[None]
        if tuple(real.shape) != (B, L):
            raise ValueError(
                f"attention_mask: expected [{B}, {L}], [B, L, L] or [B, heads, L, L], got {list(real.shape)}"
            )
        real = real.bool()
        block = (real.cumsum(1) - 1) // grid
        # Padding sees itself: a position that sees nothing has no softmax.
        itself = torch.eye(L, dtype=torch.bool, device=device)
        return ((block[:, None] <= block[:, :, None]) & real[:, None]) | itself

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """As in transformers; refuses a model that was quantised in place, which has no configuration to load it by."""
        quantised.check_saveable(self)
        super().save_pretrained(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load a checkpoint as `PreTrainedModel.from_pretrained` does, but strictly.

        Raises:
            ValueError: parameters that are missing in the checkpoint, unknown to the model or of another shape, with
                their names; key heads that tensor parallelism cannot divide; a `quantization_config` that replaced no
                layer, or that names a layer to leave out which the model does not have.
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
            raise ValueError(f"{cls.title()} checkpoint{quantised.reading(model.config)}: {'; '.join(problems)}")
        config = model.config
        quantised.check_loaded(model, layers=PER_BLOCK * config.num_hidden_layers + (not config.tie_word_embeddings))
        processes, heads = model.tp_size or 1, config.num_key_value_heads
        if heads % processes:
            name = config.attribute_map.get("num_key_value_heads", "num_key_value_heads")
            raise ValueError(
                f"tensor parallelism: expected {name}={heads} to be a multiple of the processes, got {processes}"
            )
        model.join_weights()
        return (model, info) if wants_info else model
