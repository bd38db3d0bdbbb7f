"""Stages of a pipeline in two processes, run by the schedules of `torch.distributed.pipelining`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.distributed.pipelining.microbatch import _Replicate

from graphopt.annotations import NUM_SAMPLES, SUM_GRAD_SQUARED, find
from graphopt.errors import OptionError
from graphopt.passes import LayerToLayer, TrueGrad
from graphopt.runtime.pipeline_stages import pipeline_stage
from tests.layered_models import Masked
from tests.oracle import loop_over_samples
from tests.runtime import processes
from tests.runtime.pipeline_models import Several, mlp

WORLD = processes.WORLD
EXACT = {"rtol": 1e-10, "atol": 1e-12}
SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


@pytest.fixture(scope="module")
def ranks():
    yield from processes.running()


def test_places_that_do_not_exist():
    place = {"num_stages": 2, "stage_index": 0, "device": "cpu"}
    with pytest.raises(OptionError, match=r"stage_index=2 is out of range: 2 stages have the numbers 0 to 1"):
        pipeline_stage(mlp(), **{**place, "stage_index": 2})
    with pytest.raises(OptionError, match=r"num_stages=0; it is at least 1"):
        pipeline_stage(mlp(), **{**place, "num_stages": 0})
    with pytest.raises(OptionError, match=r"num_stages='2'; it is an int"):
        pipeline_stage(mlp(), **{**place, "num_stages": "2"})
    with pytest.raises(OptionError, match=r"needs a process group.*init_process_group"):
        pipeline_stage(mlp(), **place)


def trained(rank, build, schedule, chunks, passes, options, steps=2):
    """``build``: model, positional and keyword arguments of the batch, target, loss; ``options``: of the schedule."""
    model, args, kwargs, target, loss = build()
    plain = copy.deepcopy(model)
    replicated = options.get("kwargs_chunk_spec", {})
    stage = pipeline_stage(
        model,
        tuple(value[: len(value) // chunks] for value in args),
        {k: v if k in replicated else v[: len(v) // chunks] for k, v in kwargs.items()},
        num_stages=WORLD,
        stage_index=rank,
        device="cpu",
        passes=passes,
        compiler="eager",
    )
    del model
    optimizer = torch.optim.SGD(stage.submod.parameters(), lr=0.05)
    reference = torch.optim.SGD(plain.parameters(), lr=0.05)
    step = SCHEDULES[schedule](stage, chunks, loss_fn=loss, **options)
    for _ in range(steps):
        losses = []
        if rank == 0:
            step.step(*args, **kwargs, return_outputs=False)
        else:
            step.step(target=target, losses=losses, return_outputs=False)
        expected = loss(plain(*args, **kwargs), target)
        expected.backward()
        if rank == 1:
            torch.testing.assert_close(torch.stack(losses).mean(), expected, **EXACT)
        names = [name for name, _ in stage.submod.named_parameters()]
        assert names
        for name, param in stage.submod.named_parameters():
            torch.testing.assert_close(
                param.grad, plain.get_parameter(name).grad, msg=lambda t, n=name: f"{n}: {t}", **EXACT
            )
        if passes:
            exact = loop_over_samples(copy.deepcopy(plain), args, lambda out: loss(out, None), kwargs=kwargs)
            for name, param in stage.submod.named_parameters():
                found = find(param, SUM_GRAD_SQUARED)
                torch.testing.assert_close(
                    found, exact[name].sum_grad_squared, msg=lambda t, n=name: f"{n}: {t}", **EXACT
                )
                assert find(param, NUM_SAMPLES) == len(args[0])
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
    return names


def square(output, target):
    """The mean over samples of something that needs no target, or has one."""
    output = output[0] if isinstance(output, tuple) else output
    output = output if isinstance(output, Tensor) else output.logits
    return (output + 0.3 * torch.arange(output.shape[-1])).sin().square().mean()


def build_mlp():
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(3)).double()
    return mlp(), (x,), {}, x[:, :3], nn.functional.mse_loss


def build_masked():
    """A mask that differs from sample to sample, a table of positions for all layers, and a value that skips them."""
    torch.manual_seed(4)
    mask = torch.ones(8, 4, dtype=torch.bool)
    mask[1, 2:] = mask[6, 1:] = False
    return Masked(4).double(), (torch.randint(11, (8, 4)),), {"mask": mask}, torch.zeros(8), square


class Shared(nn.Module):
    """A mask for all samples, and a parameter that all layers read."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(4, 6) / 4)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))

    def forward(self, x, *, mask):
        for layer in self.layers:
            x = mask @ layer(x + self.positions).tanh()
        return x


def build_shared():
    torch.manual_seed(5)
    return (
        Shared().double(),
        (torch.randn(6, 4, 6).double(),),
        {"mask": torch.rand(4, 4).double().tril()},
        torch.zeros(6),
        square,
    )


def build_frozen():
    """Nothing that crosses has a gradient."""
    model = mlp()
    model[:6].requires_grad_(False)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(3)).double()
    return model, (x,), {}, x[:, :3], nn.functional.mse_loss


CASES = {
    "mlp gpipe": (build_mlp, "gpipe", 4, [], {}),
    "mlp 1f1b": (build_mlp, "1f1b", 4, [], {}),
    "masked 1f1b, statistics": (build_masked, "1f1b", 4, [TrueGrad(), LayerToLayer()], {}),
    "frozen gpipe": (build_frozen, "gpipe", 2, [], {}),
    "shared gpipe": (build_shared, "gpipe", 3, [], {"kwargs_chunk_spec": {"mask": _Replicate()}}),
}


@pytest.mark.parametrize("case", CASES)
def test_training(ranks, case):
    build, schedule, chunks, passes, options = CASES[case]
    names = ranks(trained, build, schedule, chunks, passes, options)
    assert set(names[0]) | set(names[1]) == {name for name, _ in build()[0].named_parameters()}
    assert not set(names[0]) & set(names[1])


def build_gpt2():
    """The head is the embedding: it travels."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(8)
    config = GPT2Config(
        vocab_size=17, n_positions=8, n_embd=8, n_layer=4, n_head=2, use_cache=False, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double().train(), (torch.randint(17, (4, 5)),), {}, torch.zeros(4), square


def test_huggingface(ranks):
    pytest.importorskip("transformers")
    ranks(trained, build_gpt2, "1f1b", 2, [], {}, 1)


def interleaved(rank):
    """Two stages on each rank; the loss is the model's own, and its labels travel to the last stage."""
    torch.manual_seed(9)
    model = Several().double()
    plain = copy.deepcopy(model)
    x, labels = torch.randn(4, 4).double(), torch.randn(4, 4).double()
    place = {"num_stages": 2 * WORLD, "device": "cpu", "passes": [], "compiler": "eager"}
    micro = {"labels": labels[:2]}
    stages = [pipeline_stage(model, (x[:2],), micro, stage_index=index, **place) for index in (rank, rank + WORLD)]
    schedule = ScheduleInterleaved1F1B(stages, 2, loss_fn=lambda outputs, target: outputs[0])
    losses = []
    if rank == 0:
        schedule.step(x, labels=labels, return_outputs=False)
    else:
        schedule.step(target=labels, losses=losses, return_outputs=False)
    expected = plain(x, labels=labels)["loss"]
    expected.backward()
    if rank == 1:
        torch.testing.assert_close(torch.stack(losses).mean(), expected, **EXACT)
    for stage in stages:
        for name, param in stage.submod.named_parameters():
            wanted = plain.get_parameter(name).grad
            torch.testing.assert_close(param.grad, wanted, msg=lambda t, n=name: f"{n}: {t}", **EXACT)


def test_interleaved_with_the_loss_inside(ranks):
    ranks(interleaved)


def evaluated(rank):
    model, args, _, target, loss = build_mlp()
    model.eval()
    place = {"num_stages": WORLD, "stage_index": rank, "device": "cpu"}
    stage = pipeline_stage(model, (args[0][:4],), **place, passes=[], compiler="eager")
    schedule = ScheduleGPipe(stage, 2, loss_fn=loss)
    with torch.no_grad():
        output = schedule.eval(*(args if rank == 0 else ()), **({} if rank == 0 else {"target": target}))
    if rank == 1:
        assert not output.requires_grad
        torch.testing.assert_close(output, model(*args), **EXACT)


def test_evaluation(ranks):
    ranks(evaluated)


def refused(rank):
    model, x = mlp(), torch.randn(2, 6).double()
    place = {"num_stages": WORLD, "stage_index": rank, "device": "cpu", "compiler": "eager"}
    with pytest.raises(OptionError, match="num_stages=3 cannot be shared evenly by the 2 processes of the group"):
        pipeline_stage(model, (x,), **{**place, "num_stages": 3})
    with pytest.raises(
        OptionError, match=f"stage_index={1 - rank} on rank {rank} of the group.*Type stage_index={rank}"
    ):
        pipeline_stage(model, (x,), **{**place, "stage_index": 1 - rank})
    group = torch.distributed.new_group([0])
    if rank == 1:
        with pytest.raises(OptionError, match="this process is not in the group="):
            pipeline_stage(model, (x,), **place, group=group)
    with pytest.raises(
        OptionError,
        match=r"ranks have cut different models\. Stage 1 on rank 0: .*float64\[2, 6\]; graph \w+\. On rank 1: .*float64\[3, 6\]",
    ):
        pipeline_stage(model, (torch.randn(2 + rank, 6).double(),), **place)


def test_refused(ranks):
    ranks(refused)
