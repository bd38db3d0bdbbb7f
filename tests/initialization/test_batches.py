"""How batches are drawn, cut and joined."""

from collections import UserDict

import pytest
import torch
from transformers import BatchEncoding

from graphopt.errors import OptionError
from graphopt.initialization.batches import Draws, count_samples, join


def numbered(num=6, rows=4):
    return [torch.arange(rows) + 10 * position for position in range(num)]


def lists(batches):
    return [batch.tolist() for batch in batches]


def test_halves():
    draws = Draws(numbered())
    assert lists(draws.draw()) == [[0, 1, 2, 3]]
    assert lists(draws.look_ahead()) == [[0, 1, 12, 13]]
    assert lists(draws.draw()) == [[20, 21, 22, 23]]


def test_halves_of_odd_batches_have_the_same_size():
    draws = Draws(numbered(rows=5))
    draws.draw()
    assert lists(draws.look_ahead()) == [[0, 1, 12, 13, 14]]


def test_thirds():
    draws = Draws(numbered(rows=6), overlap="thirds")
    assert lists(draws.draw()) == [[0, 1, 2, 3]]
    assert lists(draws.look_ahead()) == [[2, 3, 4, 5]]
    assert lists(draws.draw()) == [[10, 11, 12, 13]]


def test_none():
    draws = Draws(numbered(), overlap="none")
    assert lists(draws.draw()) == [[0, 1, 2, 3]]
    assert lists(draws.look_ahead()) == [[10, 11, 12, 13]]


def test_accumulated():
    draws = Draws(numbered(rows=1), accumulate=2)
    assert lists(draws.draw()) == [[0], [10]]
    assert lists(draws.look_ahead()) == [[0], [20]]


def test_again_and_anew():
    draws = Draws(numbered(2))
    first = draws.take()
    draws.again([first])
    assert lists(draws.take() for _ in range(3)) == [[0, 1, 2, 3], [10, 11, 12, 13], [0, 1, 2, 3]]
    with pytest.raises(OptionError, match=r"batches ended after 0\."):
        Draws([]).take()
    once = Draws(iter(numbered(1)))
    once.take()
    with pytest.raises(OptionError, match=r"batches ended after 1\."):
        once.take()


def test_any_structure():
    table = torch.randn(1, 3)
    batch = {
        "x": torch.arange(4),
        "more": [torch.arange(8).reshape(4, 2), 3, None],
        "table": table,
        "scale": torch.ones(()),
    }
    draws = Draws([batch, batch])
    draws.draw()
    (joined,) = draws.look_ahead()
    assert joined["x"].tolist() == [0, 1, 2, 3]
    assert joined["more"][0].shape == (4, 2)
    assert joined["more"][1:] == [3, None]
    assert joined["table"] is table
    assert count_samples(batch) == 4


@pytest.mark.parametrize("kind", [BatchEncoding, UserDict])
def test_dicts_of_users(kind):
    draws = Draws([kind({"x": torch.arange(4) + 10 * k}) for k in range(2)])
    draws.draw()
    (joined,) = draws.look_ahead()
    assert type(joined) is kind
    assert joined["x"].tolist() == [0, 1, 12, 13]
    assert draws.take()["x"].tolist() == [0, 1, 2, 3]


class Loader:
    """Starts workers, which takes time, whenever it is iterated over."""

    starts = 0

    def __iter__(self):
        self.starts += 1
        yield from numbered(2)


def test_loaders_start_as_often_as_needed():
    loader = Loader()
    draws = Draws(loader)
    for _ in range(5):
        draws.take()
    assert loader.starts == 3


def test_nothing_is_a_batch():
    assert Draws([None, None]).take() is None


ODD = {
    "lengths": (lambda: join(torch.ones(2, 3), torch.ones(2, 5)), r"shapes \(2, 3\) and \(2, 5\) cannot be joined"),
    "structure": (lambda: join([torch.ones(2)], [torch.ones(2)] * 2), "different structures"),
    "order": (lambda: join({"x": torch.ones(2), "y": 3}, {"y": 3, "x": torch.ones(2)}), "different structures"),
    "rows": (lambda: count_samples([torch.ones(2), torch.ones(3)]), r"have \[2, 3\] rows"),
    "nothing": (lambda: count_samples([1]), "have no rows"),
    "one row": (
        lambda: [(d := Draws([torch.ones(1)] * 2)).draw(), d.look_ahead()],
        "a batch of 1 cannot be cut into 2 parts",
    ),
    "not iterable": (lambda: Draws(3), "batches is int, which cannot be iterated over"),
    "odd": (lambda: Draws([], accumulate=3), "their number is even"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_cannot_be_cut(name):
    function, text = ODD[name]
    with pytest.raises(OptionError, match=text):
        function()
