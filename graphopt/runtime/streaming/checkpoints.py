"""Safetensors files as a source of values: which tensor goes to which parameter, read one at a time."""

from __future__ import annotations

import copy
import difflib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import OptionError, StoreError
from graphopt.runtime.streaming.husks import is_pretrained

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


class Checkpoint:
    """Tensors in safetensors files, by name.

    Args:
        paths: files; or a folder with ``model.safetensors``, or with shards and their ``model.safetensors.index.json``.

    Raises:
        OptionError: there is no such file, or a name is in two of them.
    """

    def __init__(self, paths: Paths) -> None:
        try:
            from safetensors import SafetensorError, safe_open
        except ImportError as error:
            raise OptionError("checkpoint= reads safetensors files: pip install 'safetensors>=0.8'") from error
        self._files: dict[str, Any] = {}
        self._where: dict[str, Path] = {}
        for path in _files_of(paths):
            try:  # "pread" and not "mmap", which takes address space for the whole file
                file: Any = safe_open(path, framework="pt", device="cpu", backend="pread")
            except (SafetensorError, OSError) as error:
                raise OptionError(f"checkpoint: {path} cannot be read as a safetensors file: {error}") from error
            for name in file.keys():
                if name in self._files:
                    raise OptionError(
                        f"checkpoint: {name} is in {self._where[name]} and in {path}; give files of one model"
                    )
                self._files[name], self._where[name] = file, path

    @property
    def names(self) -> list[str]:
        """All names, numbers in them ordered as numbers."""
        return sorted(self._files, key=_natural)

    def shape(self, name: str) -> list[int]:
        """Shape of a tensor, from the header of its file."""
        return list(self._files[name].get_slice(name).get_shape())

    def read(self, name: str) -> Tensor:
        """A tensor in memory of its own."""
        value: Tensor = self._files[name].get_tensor(name)
        return value


@dataclass
class Group:
    """Tensors of a checkpoint that are read together, and what they become.

    Attributes:
        target: the name in the model, or the first of several.
        sources: names in the checkpoint, each with the pattern by which ``converter`` knows it.
        converter: what transformers makes of them; ``None`` where there is one, which stays as it is.
    """

    target: str
    sources: list[tuple[str, str]]
    converter: Any = None

    def read(self, checkpoint: Checkpoint, model: nn.Module) -> dict[str, Tensor]:
        """The values, by names in the model."""
        if self.converter is None:
            return {self.target: checkpoint.read(self.sources[0][0])}
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.sources:
            converter.add_tensor(self.target, name, pattern, checkpoint.read(name))
        found = converter.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in found.items()}


@dataclass
class Match:
    """What a checkpoint has for a model.

    Attributes:
        groups: what is to be read.
        missing: names in the model that the checkpoint has nothing for.
    """

    groups: list[Group] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def match(model: nn.Module, checkpoint: Checkpoint, *, may_miss: bool) -> Match:
    """Find for each name of the model's state dict where its value is.

    Tied parameters need one of their names. For models of transformers, names are changed as ``from_pretrained`` does.

    Args:
        model: on any device; only shapes are looked at.
        checkpoint: the files.
        may_miss: whether it is no error that names are missing.

    Raises:
        StoreError: names are missing, unknown or of another shape.
    """
    expected: dict[str, Any] = {
        name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)
    }
    groups, unknown = _groups(model, checkpoint, expected)
    found = {name for group in groups for name in _targets(group)}
    provided = {id(expected[name]) for name in found if name in expected}
    absent = [name for name, value in expected.items() if id(value) not in provided]
    unique = list({id(expected[name]): name for name in reversed(absent)}.values())[::-1]  # first names of tied ones
    excused = _patterns(getattr(model, "_keys_to_ignore_on_load_missing", None))
    errors = []
    required = [name for name in unique if not excused(name)]
    if required and not may_miss:
        errors.append(f"it lacks {_listed(required, unknown)}")
    if unknown:
        errors.append(f"the model has no {_listed(unknown, required)}")
    shapes = [
        f"{group.target} is {shape} in it and {list(expected[group.target].shape)} in the model"
        for group in groups
        if group.converter is None
        and (shape := checkpoint.shape(group.sources[0][0])) != list(expected[group.target].shape)
    ]
    errors += shapes[:5] + ([f"and {len(shapes) - 5} more shapes differ"] if len(shapes) > 5 else [])
    if errors:
        advice = ""
        if required and not may_miss:
            own = "model._init_weights" if is_pretrained(model) else "a function that is called with each module"
            advice = f". To initialise what the file lacks, pass initialize= as well: {own}"
        raise StoreError(f"the checkpoint does not fit {type(model).__name__}: {'; '.join(errors)}{advice}")
    return Match(groups, unique)


def _files_of(paths: Paths) -> Iterator[Path]:
    for given in [paths] if isinstance(paths, str | os.PathLike) else paths:
        path = Path(given)
        if path.is_dir():
            inside = next((path / name for name in (_INDEX, _SINGLE) if (path / name).exists()), None)
            if inside is None:
                names = ", ".join(sorted(os.listdir(path))[:5]) or "nothing"
                raise OptionError(
                    f"checkpoint: the folder {path} has neither {_INDEX} nor {_SINGLE}, but {names}. Name the safetensors files "
                    "themselves; other formats cannot be read tensor by tensor"
                )
            path = inside
        if not path.exists():
            raise OptionError(f"checkpoint: there is no file {path}")
        if path.name.endswith(".json"):
            shards = json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()
            yield from _files_of([path.parent / name for name in dict.fromkeys(shards)])
        else:
            yield path


def _groups(model: nn.Module, checkpoint: Checkpoint, expected: Mapping[str, Tensor]) -> tuple[list[Group], list[str]]:
    """What each tensor of the checkpoint belongs to, and the names of those that belong to nothing."""
    rename = _Renaming(model, expected) if is_pretrained(model) else None
    groups: dict[str, Group] = {}
    unknown = []
    for name in checkpoint.names:
        target, pattern, converter = (name, name, None) if rename is None else rename(name)
        if target not in expected:
            unknown.append(name)
            continue
        group = groups.setdefault(target, Group(target, [], converter))
        if group.sources and group.converter is None:
            raise StoreError(f"the checkpoint has two tensors for {target}: {group.sources[0][0]} and {name}")
        group.sources.append((name, pattern))
    if rename is not None:
        unknown = rename.without_others(unknown)
    return list(groups.values()), unknown


class _Renaming:
    """How names in the checkpoints of a model of transformers become names in the model.

    Its own tables say how files of earlier versions are read, and where several tensors, such as those of all experts, become
    one. Beside that, the prefix of the base model may be there or not, as a file of it is loaded into a model with a head, or the
    other way round.
    """

    def __init__(self, model: Any, expected: Mapping[str, Tensor]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        transforms = get_model_conversion_mapping(model)
        self._rename_key = rename_source_key
        self._renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in transforms if isinstance(entry, WeightConverter)]
        self._by_pattern = {pattern: entry for entry in self._converters for pattern in entry.source_patterns}
        self._expected, self._prefix = expected, f"{model.base_model_prefix}."
        buffers = [name for name, _ in model.named_buffers()]
        patterns = set(model._keys_to_ignore_on_load_unexpected or ())
        if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
            patterns.add(r"rotary_emb\.inv_freq")  # stood in each layer once
        if any(name.endswith("position_ids") for name in buffers):
            patterns.add(r"(^|\.)position_ids$")  # was saved once
        self._is_old = _patterns(patterns)
        self._uses_prefix = False

    def __call__(self, name: str) -> tuple[str, str, Any]:
        """The name in the model, the pattern that fitted, and the converter that it belongs to."""
        self._uses_prefix |= name.startswith(self._prefix)
        target, pattern = self._rename_key(name, self._renamings, self._converters)
        target = self._with_prefix(target)
        if target not in self._expected:
            target, pattern = self._with_prefix(name), None
        return target, pattern or name, None if pattern is None else self._by_pattern[pattern]

    def without_others(self, unknown: Iterable[str]) -> list[str]:
        """Leave out what is not of this model: buffers of earlier versions, and the heads of models for other tasks."""
        return [
            name
            for name in unknown
            if not self._is_old(name) and (name.startswith(self._prefix) or not self._uses_prefix)
        ]

    def _with_prefix(self, name: str) -> str:
        if name.startswith(self._prefix) and name.removeprefix(self._prefix) in self._expected:
            return name.removeprefix(self._prefix)
        return self._prefix + name if self._prefix + name in self._expected else name


def _targets(group: Group) -> list[str]:
    if group.converter is None:
        return [group.target]
    first, *others = group.converter.target_patterns
    return [group.target, *(group.target.replace(first, other) for other in others)]


def _patterns(patterns: Iterable[str] | None) -> Any:
    found = [re.compile(pattern) for pattern in patterns or ()]
    return lambda name: any(pattern.search(name) for pattern in found)


def _listed(names: Sequence[str], others: Sequence[str]) -> str:
    """Names, with those of the other side that look like them."""
    shown = []
    for name in names[:5]:
        near = difflib.get_close_matches(name, others, 1)
        shown.append(f"{name} (like {near[0]}?)" if near else name)
    return ", ".join(shown) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _natural(name: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def converted(value: Tensor, name: str, like: Tensor) -> Tensor:
    """A value from a file in the shape and dtype of a parameter.

    Raises:
        StoreError: the shape is another, or the numbers stand for something else.
    """
    if value.shape != like.shape:
        raise StoreError(f"{name} is {list(value.shape)} in the checkpoint and {list(like.shape)} in the model")
    if like.is_floating_point() and not (value.is_floating_point() or value.dtype is torch.bool):
        raise StoreError(
            f"{name} is {value.dtype} in the checkpoint and {like.dtype} in the model: quantised weights cannot be trained; save "
            "the dequantised model first"
        )
    return value.to(like.dtype)
