"""Updates during backward give the same numbers as updates after it; what needs all gradients at once is refused."""

import functools

import pytest
import torch
from torch import nn
from torch.optim import AdamW

import graphopt
from graphopt.errors import StreamError
from graphopt.optim import TGAdamW
from graphopt.passes import TrueGrad
from tests.layered_models import scalar
from tests.runtime.streaming.sides import CLOSE, MOMENTUM


@pytest.mark.parametrize("store", ["cpu", "disk"])
@pytest.mark.parametrize("name", ["transformer", "encoder_decoder", "frozen_layers"])
def test_eager(pair, store, name):
    """Updates during backward: the same numbers."""
    sides = pair(name, store=store, microbatch_size=2, eager=True)
    for found, expected in sides.train(MOMENTUM, steps=4):
        torch.testing.assert_close(found, expected, **CLOSE)
    sides.assert_equal(**CLOSE)
    assert graphopt.stream(sides.model).step == 4


def test_eager_with_statistics(pair):
    sides = pair("transformer", before=[TrueGrad()], store="disk", eager=True)
    graphopt.transform(sides.plain, [TrueGrad()], compiler="eager")
    for _ in sides.train(functools.partial(TGAdamW, lr=1e-2), steps=4):
        pass
    sides.assert_equal(**CLOSE)


def test_eager_refuses_what_it_cannot_do(pair):
    sides = pair("transformer", store="cpu", eager=True)
    values = {name: value.cpu() for name, value in sides.model.state_dict().items()}
    sides.backward()
    with pytest.raises(StreamError, match="gradient is used up before a norm over all of them"):
        nn.utils.clip_grad_norm_(sides.model.parameters(), 1.0)
    scaler, optimizer = torch.amp.GradScaler("cpu"), AdamW(sides.model.parameters())
    scaler.scale(torch.ones(()))
    with pytest.raises(StreamError, match="GradScaler"):
        scaler.unscale_(optimizer)
    with pytest.raises(StreamError, match="gradients cannot be accumulated over several backward passes"):
        sides.backward()
    for name, value in sides.model.state_dict().items():
        assert torch.equal(value.cpu(), values[name]), name
    optimizer.step()
    optimizer.zero_grad()
    first, second = scalar(sides.model(**sides.kwargs)), scalar(sides.model(**sides.kwargs))
    with pytest.raises(StreamError, match="backward passes of 1 other calls of the model"):
        first.backward()
    del second
