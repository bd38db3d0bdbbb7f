"""A call that computes nothing: what the copy shares with the model, and that nobody keeps it."""

import gc
import weakref

import pytest
import torch
from torch import nn

from graphopt.dry_run import DryRun, dry_run
from graphopt.errors import OptionError
from graphopt.transform import Setup

SETUP = Setup.parse({"passes": [], "compiler": "eager"})


def called(model: nn.Module, *args: torch.Tensor, **options) -> DryRun:
    return dry_run(model, args, {}, SETUP, cannot="be called", instead="Call it", **options)


def test_nobody_keeps_the_copy():
    run = called(nn.Linear(4, 3), torch.randn(2, 4))
    copy = weakref.ref(run.model)
    assert run.result.shape == (2, 3)
    del run
    gc.collect()
    assert copy() is None


@pytest.mark.parametrize("is_whole", [False, True])
def test_a_whole_graph_is_that_of_the_models_strides(is_whole):
    model = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    run = called(model, torch.randn(2, 2, 5, 5), is_whole=is_whole)
    assert (run.model.weight.data_ptr() == model.weight.data_ptr()) == is_whole
    assert (run.model.weight.stride() == model.weight.stride()) == is_whole
    assert run.model.weight is not model.weight
    assert run.result.count_nonzero() == 0


def test_arguments_are_brought_to_the_model_and_must_fit():
    with torch.device("meta"):
        model, x = nn.Linear(4, 3), torch.randn(2, 4)
    run = called(model, x)
    assert run.result.device.type == run.arguments["input"].device.type == "cpu"
    with pytest.raises(OptionError, match=r"arguments do not fit the forward of Linear .*'input'"):
        called(model)
