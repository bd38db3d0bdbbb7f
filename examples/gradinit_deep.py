"""Train 16 convolutions in a row, without normalisation or shortcuts, from PyTorch's initialisation, and from a learned one.

    python examples/gradinit_deep.py       # about twenty seconds on a CPU; writes runs/gradinit_deep.png

PyTorch's default initialisation lets what an image changes shrink by a factor of 2.4 in every layer, so nothing of it is left at
the end, and the net stays at chance. ``graphopt.learn_init`` begins where He's initialisation does, which alone would get the
net to train, and learns how large each weight should be: it lowers the gradient where that is too large, else the loss after a
step of SGD. ``python -m benchmarks.run gradinit_effect`` compares initialisations, with several seeds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import graphopt

DEPTH, CHANNELS, BATCH, EPOCHS = 16, 16, 64, 20
PICTURE = Path("runs/gradinit_deep.png")

Batch = tuple[Tensor, Tensor]


def main() -> int:
    torch.set_num_threads(1)  # the layers are too small for more
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1)
    images, labels = (images - images.mean()) / images.std(), torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train_on, test_on = order[:1400], order[1400:]
    batches = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(images[train_on], labels[train_on]), BATCH, shuffle=True, drop_last=True
    )

    accuracy = {}
    for name in ("default", "learned"):
        torch.manual_seed(0)
        model = build()
        if name == "learned":
            # A net this small is learned faster than compiled; leave the option out for a larger one.
            options = {"optimizer": "sgd", "steps": 50, "start": "he", "compiler": "eager"}
            result = graphopt.learn_init(model, loss_of, batches, **options, progress=sys.stderr.isatty())
            PICTURE.parent.mkdir(parents=True, exist_ok=True)
            result.plot(PICTURE)
            first, last = result.trajectory[0], result.trajectory[-1]
            print(
                f"learning: {len(result.trajectory)} steps, norm of the gradient {first.grad_norm:.2f} -> {last.grad_norm:.2f}"
            )
        train(model, batches)
        with torch.no_grad():
            accuracy[name] = (model(images[test_on]).argmax(1) == labels[test_on]).float().mean().item()
        print(f"{name} initialisation: accuracy {accuracy[name]:.3f} after {EPOCHS} epochs", flush=True)
    print(f"picture: {PICTURE}")
    if accuracy["learned"] < 0.5:
        print("FAILED: the net is not much better than chance after learn_init", file=sys.stderr)
        return 1
    return 0


def train(model: nn.Module, batches: torch.utils.data.DataLoader[Batch]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(EPOCHS):
        for batch in batches:
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()


def build() -> nn.Module:
    def layers() -> Iterator[nn.Module]:
        for layer in range(DEPTH):
            yield nn.Conv2d(CHANNELS if layer else 1, CHANNELS, kernel_size=3, padding=1)
            yield nn.ReLU()

    return nn.Sequential(*layers(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, 10))


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    images, labels = batch
    return cross_entropy(model(images), labels)


if __name__ == "__main__":
    sys.exit(main())
