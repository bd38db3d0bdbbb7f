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

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from graphopt import _compat
from graphopt.errors import MissingAnnotation, OptionError, StaleAnnotation
from graphopt.runtime.stores.stored_tensor import StoredTensor

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
        degree: the value is multiplied by ``|c| ** degree`` when the gradient is multiplied by ``c``.
        derive: computes the value from others, for keys that no pass publishes.
        is_lasting: the value belongs to the parameter itself rather than to its gradient (`attach`).
    """

    name: str
    shape: str
    unit: str
    provider: str
    doc: str
    degree: int = 0
    derive: Callable[[Tensor], Value | None] | None = None
    is_lasting: bool = False


SUM_GRAD_SQUARED: Key[Tensor] = Key(
    name="sum_grad_squared",
    shape="that of the parameter; float32, or float64 for float64 parameters",
    unit="gradient squared",
    provider="the pass TrueGrad: graphopt.transform(model)",
    doc="With g_n sample n's contribution to p.grad (the g_n add up to p.grad): the sum over n of g_n squared.",
    degree=2,
)
NUM_SAMPLES: Key[int] = Key(
    name="num_samples",
    shape="()",
    unit="samples",
    provider="the pass TrueGrad: graphopt.transform(model)",
    doc="How many samples entered p.grad and p.sum_grad_squared since they were last cleared.",
)
SAMPLE_GRAD_NORM: Key[Tensor] = Key(
    name="sample_grad_norm",
    shape="(num_samples,), in the order of the samples; float32, or float64 for float64 parameters",
    unit="gradient",
    provider="the pass TrueGrad(statistics='sample_grad_norm')",
    doc="The Euclidean norm of each sample's contribution to p.grad.",
    degree=1,
)
SUM_POSITION_GRAD_SQUARED: Key[Tensor] = Key(
    name="sum_position_grad_squared",
    shape="that of the parameter; float32, or float64 for float64 parameters",
    unit="gradient squared",
    provider="the pass TrueGrad(statistics='sum_position_grad_squared')",
    doc="The sum over samples and positions of the squared contribution of each position at which the parameter is applied.",
    degree=2,
)


def _grad_variance(param: Tensor) -> Tensor | None:
    squares, num = find(param, SUM_GRAD_SQUARED), find(param, NUM_SAMPLES)
    if squares is None or num is None or param.grad is None:
        return None
    return (num * squares - param.grad.to(squares.dtype).square()).clamp_(min=0)


def _grad_snr(param: Tensor) -> Tensor | None:
    variance = _grad_variance(param)
    if variance is None or param.grad is None:
        return None
    return torch.nan_to_num(param.grad.to(variance.dtype).square() / variance, nan=0.0, posinf=torch.inf)


GRAD_VARIANCE: Key[Tensor] = Key(
    name="grad_variance",
    shape="that of the parameter; float32, or float64 for float64 parameters",
    unit="gradient squared",
    provider=SUM_GRAD_SQUARED.provider,
    doc="The variance over samples of the per-sample gradients h_n = num_samples * g_n, whose mean is p.grad: "
    "num_samples * sum_grad_squared - grad**2, not below 0.",
    degree=2,
    derive=_grad_variance,
)
GRAD_SNR: Key[Tensor] = Key(
    name="grad_snr",
    shape="that of the parameter; float32, or float64 for float64 parameters",
    unit="none",
    provider=SUM_GRAD_SQUARED.provider,
    doc="Gradient signal-to-noise ratio: grad**2 / grad_variance (Liu et al., arXiv:2001.07384, 2020, equation 1); infinite "
    "where all samples agree, 0 where the gradient is 0.",
    derive=_grad_snr,
)


@dataclass(frozen=True)
class Stage:
    """Which layer owns a parameter, and where its value is.

    Attributes:
        index: number of the region that uses the parameter first, from 0.
        layer: module path of the region, or a word for what lies between layers.
        store: ``"device"``, ``"cpu"`` or ``"disk"``.
    """

    index: int
    layer: str
    store: str = "device"


STAGE: Key[Stage] = Key(
    name="stage",
    shape="()",
    unit="none",
    provider="the pass LayerToLayer: graphopt.transform(model)",
    doc="The region of the graph that owns the parameter, once the model has been called; it stays until it is set anew.",
    is_lasting=True,
)
INIT_SCALE: Key[Tensor] = Key(
    name="init_scale",
    shape="(); float32, or float64 for float64 parameters",
    unit="none",
    provider="the pass GradInit: graphopt.GradInitWrapper(model) or graphopt.learn_init(model, ...)",
    doc="The scalar that multiplies the parameter while its scale is learned; afterwards, the one that it was multiplied by.",
    is_lasting=True,
)
INIT_PROBE: Key[Tensor] = Key(
    name="init_probe",
    shape="that of the parameter, without memory",
    unit="that of the parameter",
    provider=INIT_SCALE.provider,
    doc="Zeros that are added to the scaled parameter while its initialisation is learned, to receive its gradient.",
    is_lasting=True,
)
KEYS: tuple[Key[Any], ...] = (
    SUM_GRAD_SQUARED,
    NUM_SAMPLES,
    SAMPLE_GRAD_NORM,
    SUM_POSITION_GRAD_SQUARED,
    GRAD_VARIANCE,
    GRAD_SNR,
    STAGE,
    INIT_SCALE,
)


@dataclass
class _Record:
    """What belongs to the gradient that the parameter holds now."""

    values: dict[str, Any] = field(default_factory=dict)
    probes: Tensor | None = None  # entries of p.grad when the values were published
    norm: Tensor | None = None  # Euclidean norm of p.grad then, where the probes say nothing (all zero)
    on_clear: Callable[[], None] | None = None  # lets the runtime drop its own reference to the statistic
    on_rescale: Callable[[Tensor], None] | None = None  # lets the runtime rescale what it has not published yet
    stored: tuple[StoredTensor, int] | None = None  # p.grad then, and its version, where reading it is expensive
    problem: str | None = None  # why the values must not be used


_records: WeakIdKeyDictionary = WeakIdKeyDictionary()
_lasting: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> {name of a lasting key: value}


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
        when = (
            "from the first call of the model on"
            if key.is_lasting
            else "between backward() and the zero_grad() that follows"
        )
        raise MissingAnnotation(
            f"a parameter of shape {tuple(param.shape)} has no {key.name}; it is provided by {key.provider}, and exists {when}"
        )
    return value


def find(param: Tensor, key: Key[Value]) -> Value | None:
    """Like `get`, but ``None`` where nothing is published."""
    if key.derive is not None:
        return key.derive(param)
    if key.is_lasting:
        return cast("Value | None", _lasting.get(param, {}).get(key.name))
    reconcile([param])
    record = cast("_Record | None", _records.get(param))
    if record is None or key.name not in record.values:
        return None
    if record.problem is not None:
        raise StaleAnnotation(record.problem)
    return cast("Value | None", record.values.get(key.name))


def find_statistic(param: Tensor) -> tuple[Tensor | None, int]:
    """`SUM_GRAD_SQUARED` and `NUM_SAMPLES` of a parameter, compared with its gradient once; ``(None, 0)`` without them."""
    statistic = find(param, SUM_GRAD_SQUARED)
    if statistic is None:
        return None, 0
    return statistic, cast(_Record, _records[param]).values.get(NUM_SAMPLES.name) or 0


def publish(
    param: Tensor,
    sum_grad_squared: Tensor,
    num_samples: int,
    *,
    others: Mapping[Key[Any], Tensor] | None = None,
    on_clear: Callable[[], None] | None = None,
    on_rescale: Callable[[Tensor], None] | None = None,
    problem: str | None = None,
) -> None:
    """Attach the statistics of the gradient that ``param.grad`` holds now.

    Args:
        param: the parameter; its ``grad`` must be set.
        sum_grad_squared: shape of ``param``; kept by reference.
        num_samples: samples that entered ``param.grad``.
        others: values of further keys.
        on_clear: called once when the statistic is forgotten.
        on_rescale: called with ``c``, shape (), whenever ``param.grad`` is found rescaled by it.
        problem: if given, why the values must not be used; reading them raises it.
    """
    values = {SUM_GRAD_SQUARED.name: sum_grad_squared, NUM_SAMPLES.name: num_samples}
    values |= {key.name: value for key, value in (others or {}).items()}
    record = _Record(values, on_clear=on_clear)
    record.on_rescale, record.problem = on_rescale, problem
    if isinstance(param.grad, StoredTensor):
        record.stored = param.grad, param.grad.version
    else:
        record.probes, record.norm = _fingerprint(param.grad)
    _records[param] = record


def before_change(param: Tensor) -> None:
    """A gradient that is in a store is about to be changed: remember what it is now, to see by how much it is rescaled."""
    record = cast("_Record | None", _records.get(param))
    if record is not None and record.probes is None and record.stored is not None:
        record.probes, record.norm = _fingerprint(record.stored[0].load())


def take(param: Tensor) -> Any:
    """Take away what is published for a parameter, for `give_back`; its runtime is not told."""
    return _records.pop(param, None)


def give_back(param: Tensor, taken: Any) -> None:
    """Publish again what `take` returned, in the place of whatever was published meanwhile."""
    _records.pop(param, None)
    if taken is not None:
        _records[param] = taken


def attach(param: Tensor, key: Key[Value], value: Value) -> None:
    """Set a lasting annotation; ``zero_grad`` does not touch it.

    Args:
        param: the parameter.
        key: one of `KEYS` with ``is_lasting``.
        value: replaces what was there.
    """
    assert key.is_lasting, key.name
    _lasting.setdefault(param, {})[key.name] = value


def remove(param: Tensor, key: Key[Any]) -> None:
    """Take back a lasting annotation, if it is set."""
    assert key.is_lasting, key.name
    _lasting.get(param, {}).pop(key.name, None)


def clear(params: Iterable[Tensor]) -> None:
    """Forget the statistics of these parameters, as ``zero_grad`` does with their gradients."""
    for param in params:
        record = cast("_Record | None", _records.pop(param, None))
        if record is not None and record.on_clear is not None:
            record.on_clear()


def reconcile(params: Iterable[Tensor]) -> None:
    """Bring the statistics of many parameters up to date with their gradients, with one synchronisation for all.

    A gradient that is gone, or zero where it was not, clears its statistics; one that was rescaled by ``c`` rescales each of
    them by ``|c|`` to the power of its degree (2 for squares), in place.

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
        elif record.stored is not None and _is_as_stored(param, record):
            continue
        elif record.probes is not None and not torch.equal(_probe(param.grad), record.probes):
            changed.append((param, record))
        elif record.norm is not None and not torch.equal(_norm(param.grad), record.norm):
            changed.append((param, record))
    clear(gone)
    for param, record in changed:
        _follow(param, record)


def sample_grad_norms(params: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm of each sample's gradient over several parameters, (num_samples,).

    Args:
        params: parameters whose `SAMPLE_GRAD_NORM` is published; those without a gradient are left out.

    Raises:
        MissingAnnotation: a parameter has a gradient but no norms.
        OptionError: the parameters met different numbers of samples.
    """
    norms = [get(param, SAMPLE_GRAD_NORM) for param in params if param.grad is not None]
    if not norms:
        raise MissingAnnotation("none of these parameters has a gradient; call this between backward() and zero_grad()")
    if len({len(norm) for norm in norms}) > 1:
        raise OptionError(
            f"these parameters met different numbers of samples ({sorted({len(norm) for norm in norms})}), so their norms do not "
            "belong to the same samples; pass parameters of one branch at a time"
        )
    joined: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]), dim=0)
    return joined


def expose(kind: type[Tensor] = torch.nn.Parameter) -> None:
    """Make the annotations readable as attributes of ``torch.nn.Parameter``, or of another class of tensors; idempotent.

    Reading goes through `find`, so the attribute can never disagree with ``p.grad``. A value that is assigned by hand (as
    BackPACK does) is published as if a pass had provided it.
    """
    for key in KEYS:
        if key.name not in vars(kind):
            setattr(kind, key.name, _attribute(key))


def _is_as_stored(param: Tensor, record: _Record) -> bool:
    """Whether a gradient in a store is the one that was published; if not, there is something to compare it with."""
    assert record.stored is not None
    grad, version = record.stored
    if param.grad is grad and grad.version == version:
        return True
    if record.probes is None and grad.version == version:
        before_change(param)
    if record.probes is None:
        record.problem = (
            f"p.grad of a parameter of shape {tuple(param.shape)} was changed in its store, so its sum_grad_squared no longer "
            "belongs to it"
        )
        raise StaleAnnotation(record.problem)
    return False


def _attribute(key: Key[Any]) -> property:
    def read(param: Tensor) -> Any:
        value = find(param, key)
        if value is None and key.is_lasting:
            raise AttributeError(f"no {key.name} before the model has been called; it is provided by {key.provider}")
        if value is None:
            raise AttributeError(f"no {key.name} since the gradient was last cleared; it is provided by {key.provider}")
        return value

    def write(param: Tensor, value: Any) -> None:
        if key.derive is not None:
            raise AttributeError(f"{key.name} is computed from other annotations and cannot be assigned")
        if key.is_lasting:
            raise AttributeError(f"{key.name} says what a pass has done and cannot be assigned")
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
    """Entries at regular distances; a view where the gradient allows it. Of a sharded gradient, this process's part."""
    grad = _compat.local_part(grad)
    flat = grad.detach().reshape(-1) if grad.is_contiguous() else grad.detach().transpose(0, -1).reshape(-1)
    return flat[:: max(1, flat.numel() // _NUM_PROBES)]


def _norm(grad: Tensor) -> Tensor:
    wide = torch.promote_types(grad.dtype, torch.float32)
    return cast(Tensor, torch.linalg.vector_norm(_compat.local_part(grad).detach(), dtype=wide))


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
    for key in KEYS:
        value = record.values.get(key.name)
        if key.degree and value is not None:
            _compat.local_part(value).mul_(factor.abs().pow(key.degree).to(value.dtype))
    if record.on_rescale is not None:
        record.on_rescale(factor)
    record.probes, record.norm = _fingerprint(param.grad)
    if record.stored is not None and isinstance(param.grad, StoredTensor):
        record.stored, record.probes, record.norm = (param.grad, param.grad.version), None, None
