"""The code of seed 002 (layer-to-layer-pytorch's README), with only its import lines changed.

Beyond that: ``trange(5000)`` ends after `STEPS` steps, and ``Optional``, which the seed does not import, is imported.
"""

import copy

import pytest
import torch
from torch import nn

STEPS = 60


@pytest.fixture(autouse=True)
def _fewer_steps(monkeypatch):
    def trange(num_steps):
        assert num_steps == 5000
        return range(STEPS)

    monkeypatch.setattr("tqdm.auto.trange", trange)


# fmt: off  (the seed's own layout)


@pytest.mark.slow
def test_readme(capsys):
    from typing import Optional

    import torch
    from torch import nn, optim

    class M(nn.Module):
        def __init__(self, depth: int, dim: int, hidden_dim: Optional[int] = None):  # noqa: UP045
            super().__init__()
            hidden_dim = hidden_dim or dim
            self.layers = nn.ModuleList(
                [
                    nn.Sequential(
                        nn.Linear(dim, hidden_dim),
                        nn.BatchNorm1d(hidden_dim),
                        nn.LeakyReLU(),
                    )
                ]
                + [
                    nn.Sequential(
                        nn.Linear(hidden_dim, hidden_dim),
                        nn.BatchNorm1d(hidden_dim),
                        nn.LeakyReLU(),
                    )
                    for i in range(depth)
                ]
                + [nn.Linear(hidden_dim, dim), nn.Sigmoid()]
            )

        def forward(self, batch: torch.Tensor) -> torch.Tensor:
            x = batch
            for l in self.layers:  # noqa: E741
                x = l(x)

            return x

    from graphopt import Layer2Layer

    model = M(depth=5, dim=40).train()  # on CPU
    plain = copy.deepcopy(model)

    l2l_model = Layer2Layer(
        model,
        layers_attr="layers",  # attribute with ModuleList
        microbatch_size=100,  # size of a microbatch in a minibatch :) from original paper
        verbose=False,  # enable tqdm
    )

    from tqdm.auto import tqdm, trange

    x = torch.rand(1_000, 40)  # on CPU
    y = torch.rand(1_000, 40)  # on CPU

    losses = []
    loss_fn = nn.MSELoss(reduction="sum")  # since L2L calcs average losses itself, we just need to save them

    optimizer = optim.AdamW(l2l_model.main_model.parameters(), lr=0.001)  # optimizer works with the main model on CPU

    for i in trange(5000):
        l2l_model.zero_grad()
        l2l_model.forward(x)

        loss_value = l2l_model.backward(x, y, loss_fn)

        if i % 50 == 0:
            tqdm.write(f"[{i}] loss = {loss_value.item()}")
        losses.append(loss_value.item())

        optimizer.step()

    assert_trained(losses, plain, x, y, l2l_model, capsys.readouterr().out)


# fmt: on


def assert_trained(losses, plain, x, y, l2l_model, written):
    """The losses are the sum over the batch, as in ordinary training; numbers drift apart as rounding errors grow."""
    expected = []
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.001)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.MSELoss(reduction="sum")(plain(x), y)
        loss.backward()
        expected.append(loss.item())
        optimizer.step()
    assert losses[:5] == pytest.approx(expected[:5], rel=1e-5)
    assert losses == pytest.approx(expected, rel=1e-2)
    assert losses[-1] < 0.9 * losses[0]
    assert len(losses) == STEPS
    assert [line.partition(" = ")[0] for line in written.splitlines()] == ["[0] loss", "[50] loss"]
    norms = [module for module in l2l_model.main_model.modules() if isinstance(module, nn.BatchNorm1d)]
    assert {int(norm.num_batches_tracked) for norm in norms} == {STEPS}
    assert sum("takes the whole batch" in note for note in l2l_model.notes) == len(norms) == 6
