"""The file that says what a disk store holds: the one thing that a commit replaces.

It is JSON with three keys: ``format``, ``checksum`` and ``body``. The checksum is that of the body, written with sorted keys
and without spaces.
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import StoreError

FORMAT = 1
RESTORE = "restore the folder from a copy, or start anew in another folder"


@dataclass
class RecordEntry:
    """A durable record.

    Attributes:
        offset: first byte, in both data files.
        live: the data file that holds the value; ``None`` without a value.
        checksums: CRC-32 of each piece of the value, eight hexadecimal digits each.
    """

    shape: list[int]
    dtype: str
    offset: int
    live: int | None
    checksums: str


@dataclass
class Manifest:
    """One commit; the attributes are those of the store."""

    step: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    small: dict[str, Tensor] = field(default_factory=dict)
    signature: Any = None
    records: dict[str, RecordEntry] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Replace the file, so that at any moment there is either the old or the new one.

        Raises:
            OSError: it could not be written, and the old one is as it was.
            StoreError: it was replaced, but nobody knows whether that would survive a power cut.
        """
        body = {
            "graphopt": metadata.version("graphopt"),
            "step": self.step,
            "extra": self.extra,
            "small": {name: _encode(value) for name, value in self.small.items()},
            "signature": self.signature,
            "records": {key: vars(entry) for key, entry in self.records.items()},
        }
        text = json.dumps({"format": FORMAT, "checksum": _checksum(body), "body": body}, sort_keys=True)
        fresh = path.with_name(path.name + ".new")
        try:
            with open(fresh, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(fresh, path)
        except OSError:
            fresh.unlink(missing_ok=True)
            raise
        try:
            _sync_folder(path.parent)
        except OSError as error:
            raise StoreError(f"{path}: the commit of step {self.step} may not survive a power cut: {error}") from error

    @classmethod
    def load(cls, path: Path) -> Manifest:
        """Read the file.

        Raises:
            StoreError: it is damaged, or of a version that is not known here.
        """
        try:
            content = json.loads(path.read_bytes())
            version, checksum, body = content["format"], content["checksum"], content["body"]
        except (ValueError, TypeError, KeyError) as error:
            raise StoreError(f"{path} is damaged: it is no manifest of a store ({error!r}); {RESTORE}") from error
        if version != FORMAT:
            writer = body.get("graphopt", "unknown") if isinstance(body, dict) else "unknown"
            raise StoreError(
                f"{path} has format {version!r}, written by graphopt {writer}; graphopt {metadata.version('graphopt')} reads "
                f"format {FORMAT}: install the version that wrote it, or start anew in another folder"
            )
        if checksum != _checksum(body):
            raise StoreError(f"{path} is damaged: its checksum is not that of its contents; {RESTORE}")
        return cls(
            step=body["step"],
            extra=body["extra"],
            small={name: _decode(value) for name, value in body["small"].items()},
            signature=body["signature"],
            records={key: RecordEntry(**entry) for key, entry in body["records"].items()},
        )


def plain_json(value: Any, what: str) -> Any:
    """A copy of a value as JSON gives it back.

    Raises:
        StoreError: JSON cannot hold it.
    """
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise StoreError(f"{what} must be JSON: {error}; it may hold numbers, strings, lists and dicts") from error


def dtype_name(dtype: torch.dtype) -> str:
    """The name that `dtype_of` understands."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """The dtype of a name in a manifest."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise StoreError(f"this torch ({torch.__version__}) has no dtype {name!r}, which the store uses")
    return dtype


def differences(stored: Any, given: Any, where: str = "signature") -> Iterator[str]:
    """In words, where two JSON values differ."""
    if isinstance(stored, Mapping) and isinstance(given, Mapping):
        for key in [*stored, *(key for key in given if key not in stored)]:
            inside = f"{where}[{key!r}]"
            if key not in given:
                yield f"{inside} is stored, not given"
            elif key not in stored:
                yield f"{inside} is given, not stored"
            else:
                yield from differences(stored[key], given[key], inside)
    elif isinstance(stored, list) and isinstance(given, list) and len(stored) == len(given):
        for position, pair in enumerate(zip(stored, given, strict=True)):
            yield from differences(*pair, f"{where}[{position}]")
    elif stored != given:
        yield f"{where} is {_short(stored)} in the store, {_short(given)} given"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _checksum(body: Any) -> str:
    return f"{zlib.crc32(json.dumps(body, sort_keys=True, separators=(',', ':')).encode()):08x}"


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _encode(tensor: Tensor) -> dict[str, Any]:
    tensor = tensor.contiguous()
    data = ctypes.string_at(tensor.data_ptr(), tensor.nbytes) if tensor.numel() else b""
    return {
        "dtype": dtype_name(tensor.dtype),
        "shape": list(tensor.shape),
        "data": base64.b64encode(data).decode("ascii"),
    }


def _decode(value: Mapping[str, Any]) -> Tensor:
    dtype, data = dtype_of(value["dtype"]), bytearray(base64.b64decode(value["data"]))
    flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
    return flat.view(tuple(value["shape"]))
