"""A store on disk with one commit."""

import pytest
import torch

from graphopt.runtime.stores import DiskStore
from tests.runtime.stores.model_state import fill


@pytest.fixture
def path(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def committed(path):
    with DiskStore(path, signature={"layers": 2, "sizes": [3, 4]}) as store:
        fill(store, 1)
        store.commit(1, {"epoch": 2}, {"rng": torch.arange(5, dtype=torch.uint8)})
    return path
