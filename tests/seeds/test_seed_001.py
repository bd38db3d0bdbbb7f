"""The examples of seed 001, with only their import lines changed, on a small convolutional net."""

import copy

import pytest
import torch
from torch import nn

from graphopt import GradInitWrapper
from graphopt.errors import MixedPrecisionInit

autocast = torch.autocast  # the seed's is that of CUDA


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


@pytest.fixture
def data_loader():
    torch.manual_seed(1)
    return [(torch.randn(6, 1, 8, 8), torch.randint(0, 3, (6,))) for _ in range(20)]


criterion = nn.CrossEntropyLoss()


def assert_rescaled_and_trains(model, before, optimizer, data_loader):
    scales = [(p / b).flatten() for p, b in zip(model.parameters(), before.parameters(), strict=True)]
    for scale in scales:
        torch.testing.assert_close(scale, scale[:1].expand_as(scale), rtol=1e-4, atol=0)
    assert any(abs(scale[0].item() - 1) > 1e-3 for scale in scales)
    x, y = data_loader[0]
    losses = []
    for _ in range(30):
        loss = criterion(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_with(model, data_loader):
    before = copy.deepcopy(model)
    with GradInitWrapper(model) as ginit:
        # it is important to create optimizer after wraping your model
        optimizer = torch.optim.Adam(model.parameters())
        norm = 1  # use 2 for the SGD optimizer

        model.train()
        for x, y in data_loader:
            pred = model(x)
            loss = criterion(pred, y)

            # recalculate gradinit loss based on your loss
            loss = ginit.grad_loss(loss, norm)

            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

            # clip minimum values for the init scales
            ginit.clamp_scales()

    # on exit of with statement model is recovered to its normal way
    # here you should create your main optimizer and start training
    optimizer = torch.optim.Adam(model.parameters())
    assert_rescaled_and_trains(model, before, optimizer, data_loader)


@pytest.mark.parametrize("way", ["detach", "del"])
def test_detach(model, data_loader, way):
    before = copy.deepcopy(model)
    ginit = GradInitWrapper(model)
    optimizer = torch.optim.Adam(model.parameters())
    for x, y in data_loader:
        loss = ginit.grad_loss(criterion(model(x), y), 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ginit.clamp_scales()
    if way == "detach":
        ginit.detach()
    else:
        del ginit

    # here you should create your main optimizer and start training
    optimizer = torch.optim.Adam(model.parameters())
    assert_rescaled_and_trains(model, before, optimizer, data_loader)


def test_mixed_precision(model, data_loader):
    before = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with pytest.warns(MixedPrecisionInit, match="works worse in mixed precision"), GradInitWrapper(model) as ginit:  # noqa: PT031
        # it is important to create optimizer after wraping your model
        optimizer = torch.optim.Adam(model.parameters())
        norm = 1  # use 2 for the SGD optimizer

        model.train()
        for x, y in data_loader:
            with autocast("cpu", torch.bfloat16):
                pred = model(x)
                loss = criterion(pred, y)

            # recalculate gradinit loss based on your loss
            loss = ginit.grad_loss(loss, norm, scaler=scaler)

            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()

            # clip minimum values for the init scales
            ginit.clamp_scales()

    # on exit of with statement model is recovered to its normal way
    # here you should create your main optimizer and start training
    optimizer = torch.optim.Adam(model.parameters())
    assert_rescaled_and_trains(model, before, optimizer, data_loader)
