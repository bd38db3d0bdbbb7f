"""Stages of `torch.distributed.pipelining`, cut out of a model at its layers.

The model's graph is captured for one micro-batch, its layers are found as `graphopt.passes.LayerToLayer` finds them, and groups
of consecutive layers with about equally many bytes of parameters become the stages. A stage is a graph of its own, compiled as
any other is: each distinct layer once. Between two stages travels what later layers read of earlier ones, and of the model's
arguments; what skips a stage is handed through it, and its gradient goes back the same way. Schedules, communication and the
accumulation of gradients are torch's.

Every rank captures the whole graph, on parameters that take no memory, so all come to the same cut by themselves; they compare it
before anything runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from graphopt.errors import OptionError
from graphopt.passes.layer_to_layer.layers import Boundaries
from graphopt.pipeline import Pass
from graphopt.runtime.data_parallel import unwrap
from graphopt.runtime.pipeline_cut import PipelineCut
from graphopt.transform import Setup

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.pipelining import PipelineStage


def pipeline_stage(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_stages: int,
    stage_index: int,
    device: torch.device | str,
    group: ProcessGroup | None = None,
    boundaries: Boundaries = "auto",
    passes: Sequence[Pass | str] | None = None,
    compiler: str = "inductor",
    options: Mapping[str, Any] | None = None,
) -> PipelineStage:
    """Cut ``model`` at its layers, and make one group of them a stage for the schedules of `torch.distributed.pipelining`.

    All ranks call it with the same model and arguments::

        stage = graphopt.pipeline_stage(model, (one_micro_batch,), num_stages=2, stage_index=rank, device=device)
        optimizer = torch.optim.AdamW(stage.submod.parameters())
        schedule = Schedule1F1B(stage, n_microbatches=8, loss_fn=loss_fn)
        if rank == 0:
            schedule.step(batch)
        else:
            schedule.step(target=target, losses=losses)

    The first stage takes the model's arguments, and only its rank gives them to ``schedule.step``; the others get what they need
    of them from the stage before. The last returns the model's output: a tensor, or a tuple of the tensors in it, in order. A
    loss that the model computes itself is one of them: ``loss_fn=lambda outputs, target: outputs[0]``, with the labels as
    ``target`` as well, because schedules ask for one, and ``schedule.step(..., return_outputs=False)``, because they cannot join
    scalars.

    The stage has the model's own ``Parameter`` objects, moved to ``device``, under the names that they have in the model. Delete
    the model, and no others stay in memory. A model on the meta device needs no memory in the first place: give each stage what
    is its own, ``stage.submod.load_state_dict({k: loaded[k] for k in stage.submod.state_dict()}, assign=True)``.

    Losses and gradients are those of one process, where micro-batches compute what the batch does (batch normalisation does not;
    dropout draws other masks): for a mean loss with the schedule's ``scale_grads=True``, for a sum with ``False``. So are the
    statistics that passes leave on parameters. A parameter that layers of several stages use lives in the first of them, and
    travels to the others with every micro-batch: exact, but where it is large (a tied embedding) untying it is faster.

    Schedules that compute gradients of inputs and of weights apart (zero bubble) do not work: a layer's backward is one graph.

    Args:
        model: on any device, also on the meta device. It is not called. Its mode (training or not) is part of the stage.
        args: of one micro-batch, as the schedule will cut it; tensors may be on the meta device.
        kwargs: of the same micro-batch.
        num_stages: of the pipeline; with schedules that put several on a rank, a multiple of the group's size.
        stage_index: of this stage, from 0: the rank in the group, if each has one stage.
        device: where this stage computes.
        group: the processes of the pipeline; ``None``: all.
        boundaries: where layers begin, as in `graphopt.passes.LayerToLayer`. A function that names as many layers as there are
            stages decides what the stages are.
        passes: as in `graphopt.transform`.
        compiler: as in `graphopt.transform`.
        options: as in `graphopt.transform`.

    Raises:
        OptionError: numbers that do not fit the group or the model's layers, arguments that do not fit its forward, or ranks that
            have cut different models.
        UnsupportedError: the model is not one graph, or a statistic needs a parameter that several stages use.
    """
    _check_place(num_stages, stage_index, group)
    from torch.distributed.pipelining import PipelineStage

    setup = Setup.parse({**(options or {}), "passes": passes, "compiler": compiler})
    own_device = torch.empty(0, device=device).device  # "cuda" is "cuda:0"
    cut = PipelineCut(unwrap(model), args, kwargs or {}, num_stages, setup, boundaries, own_device)
    _compare(cut.describe(), group)
    module = cut.stage(stage_index)
    received = tuple(wire.example() for wire in module.layout.received)
    if stage_index == 0 and all(isinstance(value, Tensor) for value in args):
        received = tuple(value.to("meta") for value in args)
    return PipelineStage(
        module,
        stage_index,
        num_stages,
        own_device,
        input_args=received,
        output_args=tuple(wire.example() for wire in module.layout.sent),
        group=group,
    )


def _check_place(num_stages: int, stage_index: int, group: ProcessGroup | None) -> None:
    for option, value in (("num_stages", num_stages), ("stage_index", stage_index)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise OptionError(f"{option}={value!r}; it is an int")
    if num_stages < 1:
        raise OptionError(f"num_stages={num_stages}; it is at least 1")
    if not 0 <= stage_index < num_stages:
        raise OptionError(
            f"stage_index={stage_index} is out of range: {num_stages} stages have the numbers 0 to {num_stages - 1}"
        )
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        raise OptionError(
            "a pipeline needs a process group: start the processes with torchrun, and call "
            "torch.distributed.init_process_group() before graphopt.pipeline_stage"
        )
    rank, size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    if rank < 0:
        raise OptionError("this process is not in the group= that was given; only its members have stages")
    if num_stages % size:
        raise OptionError(
            f"num_stages={num_stages} cannot be shared evenly by the {size} processes of the group: start {num_stages} "
            f"processes, give a group= of that size, or make num_stages a multiple of {size}"
        )
    if num_stages == size and stage_index != rank:
        raise OptionError(
            f"stage_index={stage_index} on rank {rank} of the group: with as many stages as processes, the stage is the rank. "
            f"Type stage_index={rank}"
        )


def _compare(own: list[str], group: ProcessGroup | None) -> None:
    """Raise the same error on all ranks if they have cut differently: what one sends, another would wait for in vain."""
    found: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(found, own, group=group)
    for rank, other in enumerate(found):
        for stage, (first, second) in enumerate(zip(found[0], other, strict=False)):
            if first != second:
                raise OptionError(
                    f"the ranks have cut different models. Stage {stage} on rank 0: {first}. On rank {rank}: {second}. Call "
                    "graphopt.pipeline_stage with the same model, arguments and options everywhere"
                )
        if len(other) != len(found[0]):
            raise OptionError(f"num_stages={len(found[0])} on rank 0 of the group and {len(other)} on rank {rank}")
