"""FSDP2 (`torch.distributed.fsdp.fully_shard`): statistics are averaged and sharded as the gradients are.

A sharded module holds DTensors; while it runs, FSDP puts gathered, plain parameters in their place, and those are what a captured
graph sees. Their gradients are reduced and scattered group by group during backward, and become ``grad`` of the DTensors. The
statistic goes the same way: the companion of a gathered parameter gathers what this rank contributes; when FSDP reduces the
gradients of a group, the group's statistics follow in one collective, divided by the square of what FSDP divides gradients
by (W, unless ``set_gradient_divide_factor`` says otherwise); at the end of the backward pass a small collective adds up the
numbers of samples and the problems, and the shards are published on the DTensors. While FSDP leaves gradients alone
(``set_requires_gradient_sync(False)``) the companions go on gathering.

The hooks of FSDP cannot be captured, so a model is compiled in units: the largest modules without a sharded module inside.

Read in torch 2.13, and to be checked in others: ``FSDPParamGroup.post_backward``, ``fsdp_params``, ``reduce_grads``,
``all_reduce_grads``, ``gradient_divide_factor``, ``reduce_scatter_unused_params``; ``FSDPParam._unsharded_param``,
``sharded_param``, ``fsdp_placement``, ``sharded_size``, ``padded_sharded_param_size``, ``to_sharded_dtensor``. (Before 2.13 a
state has one ``_fsdp_param_group`` rather than several.)
"""

from __future__ import annotations

import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast, final

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from graphopt import _compat
from graphopt.annotations import SUM_GRAD_SQUARED, Key, clear, expose, publish, reconcile
from graphopt.errors import StaleAnnotation, UnsupportedError
from graphopt.runtime.statistics import Statistic

_MODULE = "torch.distributed.fsdp._fully_shard._fsdp_state"

_owners: WeakIdKeyDictionary = (
    WeakIdKeyDictionary()
)  # gathered parameter -> its FSDPParam, weakly; None: another parameter
_ending: dict[int, _End] = {}  # backward pass -> what is to be done at its end


def is_sharded(model: nn.Module) -> bool:
    """Whether `fully_shard` was applied to this module or to one inside it."""
    return _is_loaded() and any(_state_of(module) is not None for module in model.modules())


def was_sharded(model: nn.Module, *, look_inside: bool) -> bool:
    """Like `is_sharded`, for every call: looks at the model alone if asked to."""
    return _is_loaded() and (is_sharded(model) if look_inside else _state_of(model) is not None)


def units(
    model: nn.Module, must_serve: Callable[[str, nn.Parameter], bool] = lambda name, param: True
) -> list[tuple[str, nn.Module]]:
    """The modules that are captured by themselves, with their names: the largest that have no sharded module inside.

    Args:
        model: a model with sharded modules.
        must_serve: whether it is an error if a parameter gets no statistic, by name and parameter.

    Raises:
        UnsupportedError: such a parameter belongs to a module that also runs sharded modules; no graph would see it.
    """
    outer = {
        ancestor
        for name, module in model.named_modules()
        if _state_of(module) is not None
        for ancestor in _ancestors(name)
    }
    modules = dict(model.named_modules())
    for name in outer:
        for parameter_name, parameter in modules[name].named_parameters(recurse=False):
            full_name = ".".join(filter(None, [name, parameter_name]))
            if parameter.requires_grad and must_serve(full_name, parameter):
                raise UnsupportedError(
                    f"{full_name} is a parameter of {type(modules[name]).__name__} itself, "
                    "whose forward runs modules with fully_shard in between, so no captured graph uses it. Move the parameter "
                    "into a module of its own, or apply fully_shard to the whole model only, or leave it out: "
                    f"TrueGrad(where=lambda name, parameter: name != {full_name!r})"
                )
    return [
        (name, module)
        for name, module in modules.items()
        if name not in outer
        and (not name or name.rpartition(".")[0] in outer)
        and any(True for _ in module.parameters())
    ]


def gathered(model: nn.Module) -> dict[int, Tensor]:
    """The parameters that graphs are called with, by the identities of the DTensors that a sharded model holds between calls."""
    states = [state for module in model.modules() if _is_loaded() and (state := _state_of(module)) is not None]
    shards = [shard for state in states for group in _groups_of(state) for shard in group.fsdp_params]
    return {id(shard.sharded_param): shard._unsharded_param for shard in shards if hasattr(shard, "_unsharded_param")}


def check(model: nn.Module) -> None:
    """Raise `UnsupportedError` for wrappers whose parameters no captured graph can follow."""
    for name, module in model.named_modules():
        kind = type(module)
        where = f"{name or 'the model'} is wrapped in {kind.__name__}"
        if kind.__module__.startswith("torch.distributed.fsdp.") and kind.__name__ == "FullyShardedDataParallel":
            raise UnsupportedError(
                f"{where} (FSDP1), which flattens parameters, so they have no statistics. Use FSDP2: "
                "torch.distributed.fsdp.fully_shard(module) for the blocks and the model, then graphopt.transform(model)"
            )
        if isinstance(module, nn.DataParallel):
            raise UnsupportedError(
                f"{where}, whose replicas have copies of the parameters. Use "
                "torch.nn.parallel.DistributedDataParallel(graphopt.transform(model))"
            )


class _Group:
    """One communication group of FSDP's: its statistics are reduced whenever its gradients are."""

    def __init__(self, group: Any) -> None:
        self._group = group
        group._graphopt = self
        original = group.post_backward

        def post_backward(*unused: Any) -> None:
            reduced = self._reduced_now() if group.reduce_grads else []
            original(*unused)
            if reduced:
                self._reduce(reduced)

        group.post_backward = post_backward

    def _reduced_now(self) -> list[Any]:
        """The parameters whose gradients FSDP is about to reduce; the same on every rank, or FSDP itself would hang."""
        return [
            shard
            for shard in self._group.fsdp_params
            if hasattr(shard, "_unsharded_param")
            and (
                shard.unsharded_accumulated_grad is not None
                or shard._unsharded_param.grad is not None
                or (
                    getattr(self._group, "reduce_scatter_unused_params", False) and shard._unsharded_param.requires_grad
                )
            )
        ]

    def _reduce(self, shards: Sequence[Any]) -> None:
        statistics = [cast(ShardedStatistic, Statistic.of(shard._unsharded_param)) for shard in shards]
        mesh = self._group.mesh_info
        scatter = getattr(mesh, "shard_process_group", None)
        replicate = getattr(mesh, "replicate_process_group", None)
        world = (1 if scatter is None else scatter.size()) * (1 if replicate is None else replicate.size())
        factor = self._group.gradient_divide_factor or world
        buckets: defaultdict[torch.dtype, list[int]] = defaultdict(list)
        for index, statistic in enumerate(statistics):
            buckets[statistic.companion.dtype].append(index)
        for indices in buckets.values():
            parts = _reduce_scatter([_as_rows(shards[index], statistics[index], scatter) for index in indices], scatter)
            for index, part in zip(indices, parts, strict=True):
                if replicate is not None:
                    torch.distributed.all_reduce(part, group=replicate)
                statistics[index].receive(part.div_(factor * factor), complete=self._group.all_reduce_grads)
        end = _end_of_pass()
        end.reduced.append((statistics, [pg for pg in (scatter, replicate) if pg is not None]))


class _End:
    """What is to be done at the end of a backward pass, when FSDP has finished."""

    def __init__(self) -> None:
        self.entered: list[ShardedStatistic] = []
        self.reduced: list[tuple[list[ShardedStatistic], list[Any]]] = []

    def run(self) -> None:
        entered = {id(statistic): statistic for statistic in self.entered}
        for statistics, _ in self.reduced:
            entered |= {id(statistic): statistic for statistic in statistics}
        for statistic in entered.values():
            statistic.count()
        by_groups: dict[tuple[int, ...], tuple[list[Any], dict[int, ShardedStatistic]]] = {}
        for statistics, groups in self.reduced:
            _, members = by_groups.setdefault(tuple(id(group) for group in groups), (groups, {}))
            members.update({id(statistic): statistic for statistic in statistics})
        for groups, members in by_groups.values():
            _settle(list(members.values()), groups)


@final
class ShardedStatistic(Statistic):
    """The statistic of a parameter that `fully_shard` gathers for its forward and backward."""

    def __init__(self, param: Tensor) -> None:
        super().__init__(param)
        self._shard_of = cast("weakref.ref[Any]", _owners[param])
        self._published: Tensor | None = None  # DTensor: what belongs to the gradient of the sharded parameter
        self._num_published = 0
        self._received: Tensor | None = None  # DTensor: what this pass has reduced
        self._has_contributed = False  # this rank, to what was received

    @property
    def sharded(self) -> Tensor:
        """The DTensor that the optimizer sees."""
        return cast(Tensor, self._fsdp_param.sharded_param)

    @property
    def _fsdp_param(self) -> Any:
        found = self._shard_of()
        assert found is not None
        return found

    def forget_if_cleared(self) -> None:
        """Drop the published part if the gradient is gone; what FSDP has not reduced stays, as its gradients do."""
        if self._published is not None and self.sharded.grad is None:
            clear([self.sharded])

    def companion_of(self, key: Key[Any], num_samples: int) -> Tensor:
        """The leaf that receives the sum of squares; of other statistics nothing is reduced."""
        if key is not SUM_GRAD_SQUARED:
            raise UnsupportedError(
                f"{key.name} is not reduced over the ranks of fully_shard. Leave it out: "
                "TrueGrad(statistics=('sum_grad_squared',)), or compute it on one process"
            )
        return super().companion_of(key, num_samples)

    def leave(self, task: int) -> None:
        """Everything waits for FSDP's own end of the pass."""
        _end_of_pass().entered.append(self)

    def receive(self, part: Tensor, *, complete: bool) -> None:
        """This rank's shard of what all ranks have gathered since the last reduction."""
        self._has_contributed |= self.companion.grad is not None
        self.companion.grad = None
        if not complete:
            self._problem = (
                f"the gradient of a parameter of shape {tuple(self.companion.shape)} was scattered but not reduced over the "
                "replicas (set_requires_all_reduce(False)). Use set_requires_gradient_sync(False) for gradient accumulation"
            )
        part = part.to(_compat.local_part(self.sharded).device)
        if self._received is None:
            self._received = cast(Tensor, self._fsdp_param.to_sharded_dtensor(part.clone()))
        else:
            _compat.local_part(self._received).add_(part)

    def count(self) -> None:
        """The pass has ended: count its samples if it has added anything."""
        grad = self.companion.grad
        before, version = self._grad_before
        self._task, self._grad_before = -1, (None, 0)
        added = grad is not None and not (grad is before and grad._version == version)
        if added or self._has_contributed:
            self._add_entered(self.companion)
            self._entered, self._frames = 0, set()

    def facts(self) -> _Facts:
        """What the other ranks must know."""
        return _Facts(
            float(self._has_contributed),
            float(self.num_samples if self._has_contributed else 0),
            float(self._problem is not None),
        )

    def settle(self, total: _Facts, was_cleared: bool, world: int) -> None:
        """Add what was received to what is published."""
        received, self._received = self._received, None
        self.num_samples, self._has_contributed = 0, False
        if received is None or not total.has_contributed or self.sharded.grad is None:
            return
        if self._problem is None and total.has_problem:
            self._problem = (
                f"another rank has no valid statistic for a parameter of shape {tuple(self.companion.shape)}; the error of that "
                "rank says why"
            )
        if self._problem is None and total.has_contributed < world:
            self._problem = (
                f"{world - round(total.has_contributed)} of {world} ranks computed the gradient of a parameter of shape "
                f"{tuple(self.companion.shape)} outside any captured graph, so the statistic lacks their samples. Let every rank "
                "run the model in the same way (TORCH_LOGS=recompiles shows a rank that has reached its limit of recompilations)"
            )
        if self._published is None or was_cleared:
            self._published, self._num_published = received, 0
        else:
            _compat.local_part(self._published).add_(_compat.local_part(received))
        self._num_published += round(total.num_samples)
        expose(type(self.sharded))
        publish(
            self.sharded,
            self._published,
            self._num_published,
            on_clear=self._reset,
            problem=self._problem,
        )

    @property
    def num_published(self) -> int:
        """Samples in what is published; 0 if it was cleared."""
        return self._num_published if self._published is not None else 0

    def _begin(self, param: Tensor) -> None:
        try:
            if self.sharded.grad is None:
                clear([self.sharded])
                self._reset()
            else:
                reconcile([self.sharded])
        except StaleAnnotation as error:
            self._problem = str(error)  # raising it inside backward would leave the other ranks waiting for this one

    def _reset(self) -> None:
        """The sharded gradient is gone. What FSDP has not reduced yet stays, as its gradients do."""
        self._published, self._num_published = None, 0
        if self._received is None and self.companion.grad is None:
            self._problem = None


class _Facts(NamedTuple):
    """What ranks tell each other of a parameter; summed over ranks."""

    has_contributed: float
    num_samples: float
    has_problem: float


def _settle(statistics: Sequence[ShardedStatistic], groups: Sequence[Any]) -> None:
    device = statistics[0].companion.device
    facts = torch.tensor([statistic.facts() for statistic in statistics], dtype=torch.float64).to(device)
    # A rank whose shard of a gradient is zero cannot see that the gradient was set to zero; the others can.
    published = torch.tensor([float(statistic.num_published) for statistic in statistics], dtype=torch.float64).to(
        device
    )
    world = 1
    for group in groups:
        world *= group.size()
        torch.distributed.all_reduce(facts, group=group)
        torch.distributed.all_reduce(published, torch.distributed.ReduceOp.MIN, group=group)
    for statistic, row, num_published in zip(statistics, facts.tolist(), published.tolist(), strict=True):
        statistic.settle(_Facts(*row), num_published == 0, world)


def _as_rows(shard: Any, statistic: ShardedStatistic, group: Any) -> tuple[Tensor, Any]:
    """What this rank has gathered for one parameter, (W, elements of a padded shard); and the FSDPParam."""
    world = 1 if group is None else group.size()
    value = statistic.companion.grad
    value = torch.zeros_like(statistic.companion, memory_format=torch.contiguous_format) if value is None else value
    dim = shard.fsdp_placement.dim if world > 1 else 0
    if dim != 0:  # FSDP wants it to divide evenly
        value = torch.cat(value.chunk(world, dim=dim))
    missing = world * shard.padded_sharded_param_size[0] - value.shape[0] if dim == 0 else 0
    if missing:
        value = torch.cat([value, value.new_zeros(missing, *value.shape[1:])])
    return value.reshape(world, -1), shard


def _reduce_scatter(parts: Sequence[tuple[Tensor, Any]], group: Any) -> list[Tensor]:
    """The sum over ranks of this rank's shard of each parameter, by one collective."""
    flat = torch.cat([rows for rows, _ in parts], dim=1)
    own = flat.new_empty(flat.shape[1])
    if group is None or group.size() == 1:
        own.copy_(flat[0])
    else:
        _compat.reduce_scatter(own, flat.flatten(), group)
    pieces = own.split([rows.shape[1] for rows, _ in parts])
    return [
        piece[: shard.sharded_size.numel()].view(shard.sharded_size)
        for piece, (_, shard) in zip(pieces, parts, strict=True)
    ]


def _end_of_pass() -> _End:
    task = _compat.current_graph_task()
    if task not in _ending:
        _ending[task] = _End()
        # FSDP queues its own end during the pass. By the time the first of these two runs, it is queued.
        _compat.call_after_backward(lambda: _compat.call_after_backward(lambda: _ending.pop(task).run()))
    return _ending[task]


# ----------------------------------------------------------------------------------------------------------------------
# FSDP2 as torch 2.13 has it


def _is_loaded() -> bool:
    return _MODULE in sys.modules


def _state_of(module: nn.Module) -> Any:
    return sys.modules[_MODULE]._get_module_fsdp_state(module) if _is_loaded() else None


def _groups_of(state: Any) -> list[Any]:
    groups = getattr(state, "_fsdp_param_groups", None)
    return list(groups) if groups is not None else [state._fsdp_param_group] if state._fsdp_param_group else []


def _find(param: Tensor) -> weakref.ref[Any] | None:
    """To what a parameter belongs that a graph has met for the first time."""
    states = {id(state): state for module in _compat.composable_modules() if (state := _state_of(module)) is not None}
    for state in states.values():
        for group in _groups_of(state):
            for shard in group.fsdp_params:
                if getattr(shard, "_unsharded_param", None) is param:
                    if not hasattr(group, "_graphopt"):
                        _Group(group)
                    return weakref.ref(shard)
    return None


def _kind(param: Tensor) -> type[Statistic] | None:
    if not _is_loaded():
        return None
    if param not in _owners:
        _owners[param] = _find(param)
    return None if _owners[param] is None else ShardedStatistic


def _ancestors(name: str) -> Iterator[str]:
    """The names of the modules around the one of this name; the model's own is empty."""
    while name:
        name = name.rpartition(".")[0]
        yield name


Statistic.kinds.append(_kind)
