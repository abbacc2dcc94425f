"""Finished requests on disk, so that a stopped evaluation resumes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fdpp.decoding.identity import held_by
from fdpp.models.weights import is_quantised


class Journal:
    """Records by key: in memory and, with a folder, one JSON line each in this process's own file.

    Every `*.jsonl` of the folder is read, so a later run with any number of processes finds all that is finished. Lines
    are appended in one write; an incomplete line, from a run that was cut off, is skipped.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, rank: int = 0) -> None:
        self.records: dict[str, dict[str, Any]] = {}
        self.path = None if folder is None else Path(folder) / f"rank_{rank}.jsonl"
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.path.parent.glob("*.jsonl")):
            for line in path.read_bytes().splitlines():
                try:
                    record = json.loads(line)
                    self.records[record.pop("key")] = record
                except (ValueError, KeyError, AttributeError):
                    continue

    def __contains__(self, key: str) -> bool:
        return key in self.records

    def __getitem__(self, key: str) -> dict[str, Any]:
        return self.records[key]

    def add(self, records: Mapping[str, dict[str, Any]]) -> None:
        """Keep `records`, by key; on disk when this returns."""
        self.records.update(records)
        if self.path is None or not records:
            return
        lines = "".join(json.dumps({"key": key, **record}) + "\n" for key, record in records.items()).encode()
        with open(self.path, "a+b", buffering=0) as file:
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                lines = b"\n" + lines
            file.write(lines)
            os.fsync(file.fileno())


def key_of(*parts: Any) -> str:
    """A key for what `parts`, plain values and lists of them, describe."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def fingerprint(model: torch.nn.Module) -> str:
    """A digest of a model's weights: the names, shapes and dtypes of all parameters and 64 values of each.

    Of a quantised weight its parts, and how it is multiplied; of peft's layers which adapters are active, and their
    scales.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        for part in held_by(parameter.detach()):
            values = part.flatten()
            sample = values[:: max(1, values.numel() // 64)].double().tolist()
            digest.update(json.dumps([name, list(part.shape), str(part.dtype), sample]).encode())
        # Quantised weights are the same whether or not their inputs are to be quantised, too.
        if is_quantised(parameter):
            quantised: Any = parameter
            digest.update(json.dumps([name, quantised.__tensor_flatten__()[1]], default=str).encode())
    for name, module in model.named_modules():
        off = getattr(module, "disable_adapters", None)
        if isinstance(off, bool):
            layer = [name, off, module.active_adapters, getattr(module, "scaling", None)]
            digest.update(json.dumps(layer, default=str).encode())
    return digest.hexdigest()
