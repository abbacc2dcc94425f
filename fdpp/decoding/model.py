"""What a decode asks of a model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from torch import Tensor, nn

from fdpp.step.parallel import VocabularySlice


class DiffusionModel(Protocol):
    """A masked-diffusion model as the block loop sees it; `fdpp.models.language_model.DiffusionLM` is one.

    Attributes:
        config: with `vocab_size`, `num_hidden_layers` and `max_position_embeddings`.
        shift: 0 where the hidden state of a column predicts the token in it, 1 where it predicts the next one. A
            sequence's first token is then predicted by its own.
        block_causal: whether no column sees a block behind its own (`BlockCausalLoop`); else every column sees all.
        anchored: whether the first token of a block is decided by the column before it, ahead of all others. Of
            block-causal models with a `shift` alone.
        default_block_length: the length of blocks that the model was trained with; 32 where it can be any.
        default_sub_block_length: how many positions of a block are decided together; None: all of them.
        model: the transformer without its head. `model(input_ids, attention_mask=, position_ids=, cache=, start=,
            wanted=)` of ids `[B, n]` returns hidden states `[B, n, d_model]`; with `wanted`, a slice or indices `[m]`
            of the n positions, only theirs. With a cache every layer hands its queries, keys and values to
            `cache.attend`. The n positions stand at its columns from `start` on or, if `start` is an int64 tensor, at
            these columns. Without a cache a bool mask `[B, 1, n, n]` says what a position may see; None: everything.
            Where a prompt comes as embeddings, `inputs_embeds` `[B, n, d_model]` is passed too and counts, not the ids.
    """

    config: Any
    shift: int
    block_causal: bool
    anchored: bool
    default_sub_block_length: int | None

    @property
    def default_block_length(self) -> int: ...

    @property
    def model(self) -> nn.Module: ...

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, asked for where a prompt comes as embeddings."""

    def project(self, hidden: Tensor) -> Tensor:
        """Logits `[..., V]` of hidden states `[..., d_model]`, of the whole vocabulary."""

    def project_slice(self, hidden: Tensor) -> Tensor:
        """Logits `[..., v]` of the ids of `vocabulary_slice()`."""

    def vocabulary_slice(self) -> VocabularySlice | None:
        """The ids this process has logits of under tensor parallelism, None where it has them all."""

    def head_weight(self) -> Tensor:
        """The head as one matrix `[V, d_model]`; `ValueError` where it is more than that."""

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def modules(self) -> Iterator[nn.Module]: ...
