"""The contract between passes and optimizers: typed values that live beside ``p.grad``.

A pass provides an annotation, the runtime publishes it after backward, an optimizer reads it. The rule that every reader may
rely on: **an annotation and** ``p.grad`` **belong to the same gradient**. Whatever clears ``p.grad`` clears its statistics,
and whatever rescales ``p.grad`` by ``c`` rescales the sum of squares by ``c**2``: ``GradScaler.unscale_``,
``torch.nn.utils.clip_grad_norm_``, a division by the number of micro-batches. None of these announces itself
(``unscale_`` does not even move the tensor's version), so a few entries of the gradient are remembered at publication and
compared when the value is read. A change that is not a rescaling raises `StaleAnnotation`.

How it works: one `_Record` for each parameter, in a table keyed by identity and weakly, so that neither ``state_dict`` nor
``deepcopy`` nor pickling sees it. `expose` adds a read-only view of the table to ``torch.nn.Parameter`` as plain attributes
(``p.sum_grad_squared``); it runs when a transformed model is called for the first time, never at import.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from graphopt.errors import MissingAnnotation, StaleAnnotation

Value = TypeVar("Value")

# Entries of a gradient that are remembered in order to recognise a rescaling. All of them must agree on one factor, so a
# change that is not a rescaling passes unnoticed only if it leaves every one of them in proportion.
_NUM_PROBES = 64
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Key(Generic[Value]):
    """Name and meaning of an annotation.

    Attributes:
        name: attribute of the parameter under which it can be read.
        shape: the value's shape, in words.
        unit: the value's unit in terms of the gradient's.
        provider: what to run in order to get it.
        doc: the definition, in one sentence.
    """

    name: str
    shape: str
    unit: str
    provider: str
    doc: str


SUM_GRAD_SQUARED: Key[Tensor] = Key(
    name="sum_grad_squared",
    shape="that of the parameter; float32, or float64 for float64 parameters",
    unit="gradient squared",
    provider="the pass TrueGrad: graphopt.transform(model)",
    doc="With g_n sample n's contribution to p.grad (the g_n add up to p.grad): the sum over n of g_n squared.",
)
NUM_SAMPLES: Key[int] = Key(
    name="num_samples",
    shape="()",
    unit="samples",
    provider="the pass TrueGrad: graphopt.transform(model)",
    doc="How many samples entered p.grad and p.sum_grad_squared since they were last cleared.",
)
KEYS: tuple[Key[Any], ...] = (SUM_GRAD_SQUARED, NUM_SAMPLES)


@dataclass
class _Record:
    """What belongs to the gradient that the parameter holds now."""

    values: dict[str, Any] = field(default_factory=dict)
    probes: Tensor | None = None  # entries of p.grad when the values were published
    norm: Tensor | None = None  # Euclidean norm of p.grad then, where the probes say nothing (all zero)
    on_clear: Callable[[], None] | None = None  # lets the runtime drop its own reference to the statistic
    problem: str | None = None  # why the values must not be used


_records: WeakIdKeyDictionary = WeakIdKeyDictionary()


def get(param: Tensor, key: Key[Value]) -> Value:
    """The annotation of a parameter, brought up to date with ``param.grad``.

    Args:
        param: a leaf parameter of a transformed model.
        key: one of `KEYS`.

    Returns:
        The value, as the key's ``shape`` and ``unit`` say.

    Raises:
        MissingAnnotation: nothing has published it since the gradient was last cleared.
        StaleAnnotation: ``param.grad`` was changed in a way that is not a rescaling.
    """
    value = find(param, key)
    if value is None:
        raise MissingAnnotation(
            f"a parameter of shape {tuple(param.shape)} has no {key.name}; it is provided by {key.provider}, "
            "and exists between backward() and the zero_grad() that follows"
        )
    return value


def find(param: Tensor, key: Key[Value]) -> Value | None:
    """Like `get`, but ``None`` where nothing is published."""
    reconcile([param])
    record = cast("_Record | None", _records.get(param))
    if record is None or key.name not in record.values:
        return None
    if record.problem is not None:
        raise StaleAnnotation(record.problem)
    return cast("Value | None", record.values.get(key.name))


def publish(
    param: Tensor,
    sum_grad_squared: Tensor,
    num_samples: int,
    *,
    on_clear: Callable[[], None] | None = None,
    problem: str | None = None,
) -> None:
    """Attach the statistics of the gradient that ``param.grad`` holds now.

    Args:
        param: the parameter; its ``grad`` must be set.
        sum_grad_squared: shape of ``param``; kept by reference.
        num_samples: samples that entered ``param.grad``.
        on_clear: called once when the statistic is forgotten.
        problem: if given, why the values must not be used; reading them raises it.
    """
    record = _Record({SUM_GRAD_SQUARED.name: sum_grad_squared, NUM_SAMPLES.name: num_samples}, on_clear=on_clear)
    record.problem = problem
    record.probes, record.norm = _fingerprint(param.grad)
    _records[param] = record


def clear(params: Iterable[Tensor]) -> None:
    """Forget the statistics of these parameters, as ``zero_grad`` does with their gradients."""
    for param in params:
        record = cast("_Record | None", _records.pop(param, None))
        if record is not None and record.on_clear is not None:
            record.on_clear()


def reconcile(params: Iterable[Tensor]) -> None:
    """Bring the statistics of many parameters up to date with their gradients, with one synchronisation for all.

    A gradient that is gone, or zero where it was not, clears its statistics; one that was rescaled by ``c`` rescales the sum
    of squares by ``c**2`` in place.

    Raises:
        StaleAnnotation: a gradient was changed in another way. Its statistic stays unusable until it is cleared.
    """
    changed: list[tuple[Tensor, _Record]] = []
    gone: list[Tensor] = []
    for param in params:
        record = cast("_Record | None", _records.get(param))
        if record is None:
            continue
        if param.grad is None:
            gone.append(param)
        elif record.probes is not None and not torch.equal(_probe(param.grad), record.probes):
            changed.append((param, record))
        elif record.norm is not None and not torch.equal(_norm(param.grad), record.norm):
            changed.append((param, record))
    clear(gone)
    for param, record in changed:
        _follow(param, record)


def expose() -> None:
    """Make the annotations readable as attributes of ``torch.nn.Parameter``; idempotent.

    Reading goes through `find`, so the attribute can never disagree with ``p.grad``. A value that is assigned by hand (as
    BackPACK does) is published as if a pass had provided it.
    """
    for key in KEYS:
        if key.name not in vars(torch.nn.Parameter):
            setattr(torch.nn.Parameter, key.name, _attribute(key))


def _attribute(key: Key[Any]) -> property:
    def read(param: Tensor) -> Any:
        value = find(param, key)
        if value is None:
            raise AttributeError(f"no {key.name} since the gradient was last cleared; it is provided by {key.provider}")
        return value

    def write(param: Tensor, value: Any) -> None:
        record = cast("_Record | None", _records.get(param))
        if record is None:
            record = _Record()
            record.probes, record.norm = _fingerprint(param.grad)
            _records[param] = record
        record.values[key.name] = value

    def forget(param: Tensor) -> None:
        clear([param])

    return property(read, write, forget, f"{key.doc} Shape: {key.shape}. Unit: {key.unit}.")


def _fingerprint(grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if grad is None:
        return None, None
    probes = _probe(grad).clone()
    silent = grad.device.type != "cpu" or not probes.count_nonzero()
    return probes, _norm(grad).clone() if silent else None


def _probe(grad: Tensor) -> Tensor:
    """Entries at regular distances; a view where the gradient allows it."""
    flat = grad.detach().reshape(-1) if grad.is_contiguous() else grad.detach().transpose(0, -1).reshape(-1)
    return flat[:: max(1, flat.numel() // _NUM_PROBES)]


def _norm(grad: Tensor) -> Tensor:
    wide = torch.promote_types(grad.dtype, torch.float32)
    return cast(Tensor, torch.linalg.vector_norm(grad.detach(), dtype=wide))


def _follow(param: Tensor, record: _Record) -> None:
    """Apply to the statistic what was done to the gradient."""
    assert param.grad is not None
    assert record.probes is not None
    wide = torch.promote_types(param.grad.dtype, torch.float32)
    old, new = record.probes.to(wide), _probe(param.grad).to(wide)
    if record.norm is not None:
        old, new = torch.cat([old, record.norm[None].to(wide)]), torch.cat([new, _norm(param.grad)[None].to(wide)])
    if not new.any() and not _norm(param.grad).any():
        clear([param])
        return
    pivot = old.abs().argmax()
    factor = new[pivot] / old[pivot]
    slack = _TOLERANCE.get(param.grad.dtype, 1e-4) * (factor * old[pivot]).abs()
    if bool(torch.isfinite(old).all()) and not bool(((new - factor * old).abs() <= slack).all()):
        record.problem = (
            f"p.grad of a parameter of shape {tuple(param.shape)} was changed after backward in a way that is not a rescaling "
            "(clipping by value, added noise or weight decay, a gradient assigned by hand), so its sum_grad_squared no longer "
            "belongs to it. Change the gradient before backward() publishes it (a hook on the loss), move the change into the "
            "optimizer, or call zero_grad() first"
        )
        raise StaleAnnotation(record.problem)
    statistic = record.values.get(SUM_GRAD_SQUARED.name)
    if statistic is not None:
        statistic.mul_((factor * factor).to(statistic.dtype))
    record.probes, record.norm = _fingerprint(param.grad)
