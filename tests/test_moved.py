"""Old import paths."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module, reload

import pytest

import fdpp
from fdpp.moved import MOVED

PUBLIC = {
    "fdpp.attention": ("block_attention", "visible"),
    "fdpp.cache": ("BlockCache", "tree_mask"),
    "fdpp.chat": ("Chat",),
    "fdpp.dawn": ("Dawn", "Probe", "commit", "dependency_edges", "select", "softmax_maximum"),
    "fdpp.dawn.edges": ("dependency_edges", "pack_bits", "unpack_bits"),
    "fdpp.dawn.reference": ("attention", "commit", "edges"),
    "fdpp.decoding.config": ("DiffusionGenerationConfig", "DiffusionGenerationOutput", "CACHES"),
    "fdpp.gpu": ("reset_tickets",),
    "fdpp.klass": ("Klass", "divergence", "select", "stable_steps"),
    "fdpp.live": ("LiveView",),
    "fdpp.ops": ("select", "pack", "MAX_POSITIONS", "DTYPES"),
    "fdpp.parallel": ("select", "VocabularySlice"),
    "fdpp.project": ("project_select",),
    "fdpp.reference": ("Selection", "accepted", "select"),
    "fdpp.rules": ("Frechet", "Rule", "LocalLeap"),
    "fdpp.step": ("DenoisingStep",),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_what_was_public_is_where_it_was(name: str) -> None:
    module = import_module(name)
    assert [attribute for attribute in PUBLIC[name] if not hasattr(module, attribute)] == []
    if name in MOVED:
        assert module is import_module(MOVED[name])


@pytest.mark.parametrize("name", MOVED)
def test_a_module_has_one_identity(name: str) -> None:
    """Its old name gives the same object, which keeps its new name."""
    module = import_module(name)
    assert module.__name__ == MOVED[name] and module.__spec__ is not None and module.__spec__.name == MOVED[name]
    assert sys.modules[name] is sys.modules[MOVED[name]]


def test_every_old_name_is_found_in_a_fresh_process() -> None:
    """In any order, and as a statement, which also looks the name up in its parent."""
    lines = [f"import {name}; assert {name} is sys.modules[{new!r}]" for name, new in reversed(MOVED.items())]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(["import sys", *lines])], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_finder_is_there_once() -> None:
    from fdpp import moved

    before = list(sys.meta_path)
    moved.install()
    assert sys.meta_path == before
    with pytest.raises(ModuleNotFoundError):
        import_module("fdpp.nowhere")
    assert reload(import_module("fdpp.live")).__name__ == "fdpp.cli.live"


def test_steps_of_klass_and_dawn_by_their_old_names() -> None:
    import torch

    from fdpp import dawn, klass

    g = torch.Generator().manual_seed(0)
    logits, tokens = 5 * torch.randn(2, 6, 20, generator=g), torch.full((2, 6), 19)
    tokens[:, 2] = 3
    stable = torch.tensor([[0, 2, 2, 2, 0, 0]] * 2)
    out = klass.select(logits, tokens, rule=fdpp.Klass(0.1), mask_id=19, stable=stable)
    assert out.committed[:, [1, 3]].all() and not out.committed[:, [0, 2, 4, 5]].any()
    edges = torch.zeros(2, 6, 1, dtype=torch.int32)
    sure = torch.zeros(2, 10)
    for temperature, seeds in ((0.0, None), (0.5, torch.arange(2))):
        out = dawn.select(
            logits,
            tokens,
            rule=fdpp.Dawn(),
            mask_id=19,
            edges=edges,
            committed_confidence=sure,
            first=4,
            temperature=temperature,
            seeds=seeds,
        )
        assert out.committed.any(1).all() and out.tokens[:, 2].eq(3).all()
