"""Space in a file: nothing overlaps, and what was given back is used again."""

from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.runtime.stores.extents import Extents


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20))), st.randoms(use_true_random=False))
def test_nothing_overlaps(steps, chance):
    extents, used = Extents(), []
    for take, size in steps:
        if take or not used:
            used.append((extents.take(size), size))
        else:
            extents.give_back(*used.pop(chance.randrange(len(used))))
        bytes_used = [byte for offset, size in used for byte in range(offset, offset + size)]
        assert len(bytes_used) == len(set(bytes_used))
        assert max(bytes_used, default=0) <= extents.end
        restored = Extents(used)
        assert restored.end == max((offset + size for offset, size in used), default=0)
    for extent in used:
        extents.give_back(*extent)
    assert extents.end == 0


def test_the_first_hole_that_fits_is_used():
    extents = Extents([(0, 4), (10, 2), (20, 5)])  # holes of 6 and 8
    assert extents.take(7) == 12
    assert extents.take(6) == 4
    assert extents.take(2) == 25
    extents.give_back(10, 2)
    extents.give_back(4, 6)
    assert extents.take(8) == 4


def test_records_made_in_one_go_are_neighbours():
    extents = Extents()
    assert [extents.take(4096) for _ in range(3)] == [0, 4096, 8192]
