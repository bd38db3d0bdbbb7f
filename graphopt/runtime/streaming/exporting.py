"""Write values to safetensors files, one tensor in memory at a time.

``safetensors.torch.save_file`` takes a dictionary of tensors that are all in memory. The format is simple enough to be written
piece by piece: eight bytes with the size of the header; the header, JSON with dtype, shape and place of each tensor; the tensors.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from graphopt.errors import OptionError, StreamError

_INDEX, _SINGLE, _SHARD = "model.safetensors.index.json", "model.safetensors", "model-{:05d}-of-{:05d}.safetensors"
_OLD = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")

# Names of dtypes in the format, in the order in which safetensors lays tensors out: large elements first, so all are aligned.
_NAMES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_safetensors(
    state: Mapping[str, Tensor], folder: str | os.PathLike[str], *, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Write a state dict as ``save_pretrained`` and ``safetensors.torch.save_model`` do, for ``from_pretrained`` to read.

    Stored tensors are read one after the other, and one tensor is in memory at a time. Files of an earlier call are replaced when
    all has been written; a process that is killed just then leaves a folder that lacks its index, which nothing would load.

    Args:
        state: tensors by name. Those that are one tensor are written once, under the first of their names.
        folder: is created. The file is ``model.safetensors``; or there are several, with an index.
        max_shard_bytes: how large each file may become; a larger tensor gets one of its own.

    Raises:
        OptionError: ``max_shard_bytes`` is not positive.
        StreamError: a value is not a tensor, or its dtype is not known to the format.
    """
    if max_shard_bytes < 1:
        raise OptionError(f"save_safetensors(max_shard_bytes={max_shard_bytes}): it is at least 1")
    state, ties = _without_ties(state)
    shards = _split(state, max_shard_bytes)
    names = [_SINGLE] if len(shards) == 1 else [_SHARD.format(number + 1, len(shards)) for number in range(len(shards))]
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    fresh = [path / f".{name}.new" for name in names]
    try:
        for target, shard in zip(fresh, shards, strict=True):
            metadata = {"format": "pt", **{tied: name for tied, name in ties.items() if name in shard}}
            _write_file(target, {name: state[name] for name in shard}, metadata)
        for old in path.iterdir():
            if _OLD.fullmatch(old.name):
                old.unlink()
        for target, name in zip(fresh, names, strict=True):
            target.replace(path / name)
        if len(shards) > 1:
            _write_index(path, state, dict(zip(names, shards, strict=True)))
    finally:
        for target in fresh:
            target.unlink(missing_ok=True)


def _without_ties(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors under the first of their names, and the first names by the others."""
    first: dict[object, str] = {}
    ties: dict[str, str] = {}
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise StreamError(f"{name} is a {type(value).__name__}; a safetensors file holds tensors only")
        if value.dtype not in _NAMES:
            raise StreamError(f"{name} is {value.dtype}, which the safetensors format does not know")
        place = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride(), value.device)
        if value.numel() and (kept := first.setdefault(place, name)) != name:
            ties[name] = kept
    return {name: value for name, value in state.items() if name not in ties}, ties


def _split(state: Mapping[str, Tensor], limit: int) -> list[list[str]]:
    """The names for each file, as huggingface_hub distributes them."""
    shards: list[list[str]] = []
    shard: list[str] = []
    size = 0
    for name, value in state.items():
        nbytes = _nbytes(value)
        if nbytes > limit:
            shards.append([name])
            continue
        if size + nbytes > limit:
            shards.append(shard)
            shard, size = [], 0
        shard.append(name)
        size += nbytes
    return [*shards, shard] if shard or not shards else shards


def _write_file(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    order = list(_NAMES)
    names = sorted(state, key=lambda name: (order.index(state[name].dtype), name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        value = state[name]
        start, end = end, end + _nbytes(value)
        header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            _write_value(file, state[name])
        file.flush()
        os.fsync(file.fileno())


def _write_value(file: BinaryIO, stored: Tensor) -> None:
    value = stored.detach().cpu().contiguous()
    if value.numel():
        file.write((ctypes.c_char * value.nbytes).from_address(value.data_ptr()))  # no copy, and NumPy is not needed


def _write_index(path: Path, state: Mapping[str, Tensor], shards: Mapping[str, Sequence[str]]) -> None:
    sizes = {
        "total_parameters": sum(value.numel() for value in state.values()),
        "total_size": sum(_nbytes(value) for value in state.values()),
    }
    content = {"metadata": sizes, "weight_map": {name: file for file, names in shards.items() for name in names}}
    fresh = path / f".{_INDEX}.new"
    fresh.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    fresh.replace(path / _INDEX)


def _nbytes(value: Tensor) -> int:
    return value.numel() * value.dtype.itemsize
