"""Optimizers from modules: one chain for matrices and another for the rest, and eight models trained by one vmapped step.

    python examples/chain_optimizers.py       # about ten seconds on a CPU

The first half is an ordinary training loop: `Modular` is a `torch.optim.Optimizer`, with schedulers, checkpoints and parameter
groups. The second half takes the same modules as pure functions: `functional.chain` returns ``init`` and ``update``, which
``torch.func.vmap`` maps over an ensemble, each member with a learning rate of its own.
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.nn.functional import cross_entropy

from graphopt.optim import Modular, functional, m

EPOCHS, BATCH = 6, 100
RATES = torch.logspace(-4, -1, 8)


def main() -> int:
    torch.set_num_threads(1)  # the layers are too small for more
    digits = load_digits()
    images = torch.tensor(digits.data / 16 - 0.5, dtype=torch.float32)
    labels = torch.tensor(digits.target)
    train_on, test_on = slice(0, 1400), slice(1400, None)

    model = build()
    optimizer = Modular(
        model,
        m.Split(lambda param: param.ndim == 2, m.Muon(adjust_lr_fn="match_rms_adamw"), m.Adam()),
        m.WeightDecay(0.01),
        m.LR(1e-2),
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for batch, target in zip(images[train_on].split(BATCH), labels[train_on].split(BATCH), strict=True):
            optimizer.zero_grad()
            cross_entropy(model(batch), target).backward()
            optimizer.step()
        scheduler.step()
    accuracy = (model(images[test_on]).argmax(1) == labels[test_on]).float().mean()
    print(f"Muon for matrices, Adam for the rest: accuracy {accuracy:.3f}")

    accuracies = train_ensemble(images[train_on], labels[train_on], images[test_on], labels[test_on])
    for rate, accuracy in zip(RATES, accuracies, strict=True):
        print(f"AdamW, learning rate {rate:.0e}: accuracy {accuracy:.3f}")
    return 0


def train_ensemble(images: Tensor, labels: Tensor, test_images: Tensor, test_labels: Tensor) -> Tensor:
    """Train one model for each learning rate, all of them in one step."""
    models = [build() for _ in RATES]
    params = {name: param.detach() for name, param in stack_module_state(models)[0].items()}
    skeleton = build()

    def loss_of(params: dict[str, Tensor], batch: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(functional_call(skeleton, params, (batch,)), target)

    def step(params: dict[str, Tensor], state: functional.ChainState, rate: Tensor, batch: Tensor, target: Tensor):
        optimizer = functional.chain(m.Adam(), m.WeightDecay(0.01), m.LR(rate))
        updates, state = optimizer.update(grad(loss_of)(params, batch, target), state, params)
        return functional.apply_updates(params, updates), state

    state = vmap(functional.chain(m.Adam(), m.WeightDecay(0.01), m.LR(0.0)).init)(params)
    for _ in range(EPOCHS):
        for batch, target in zip(images.split(BATCH), labels.split(BATCH), strict=True):
            params, state = vmap(step, in_dims=(0, 0, 0, None, None))(params, state, RATES, batch, target)
    outputs = vmap(lambda params: functional_call(skeleton, params, (test_images,)))(params)
    return (outputs.argmax(2) == test_labels).float().mean(1)


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 10))


if __name__ == "__main__":
    raise SystemExit(main())
