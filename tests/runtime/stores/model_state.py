"""A little state that stands for a model's."""

import torch

SHAPES = {"large": (1500, 1000), "small": (7,), "scalar": ()}  # "large" has two pieces
PIECE = 4 << 20


def fill(store, step, keys=SHAPES):
    """Give records the value ``step``, and make those that are missing."""
    for key in keys:
        store.create(key, SHAPES[key], torch.float32)
    store.write({key: torch.full(SHAPES[key], float(step)) for key in keys})


def contents(store):
    """The distinct values in each record that has some."""
    return {key: store.read(key).unique().tolist() for key in store.keys() if store.is_written(key)}
