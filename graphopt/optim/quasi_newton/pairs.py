"""The last pairs ``(s, y)`` of a limited-memory method in one buffer, and the products of `LBFGS` with them.

The two loops of L-BFGS (algorithm 7.4 of Nocedal, Wright) subtract each y and add each s with a coefficient, and
coefficients depend on inner products alone: with ``R`` the upper triangle of ``SᵀY``, D its diagonal and γ the scale of the
first inverse Hessian, the loops solve ``R a = Sᵀ g`` and ``Rᵀ c = D a - γ (Yᵀ g - YᵀY a)``, element by element, and the result
is ``γ g - γ Y a + S c``. So two products with the whole buffer replace the loops over vectors, and the same inner products of
the step before give a new column of ``SᵀY`` and ``YᵀY`` by subtraction.

Reference: Byrd, Nocedal, Schnabel, "Representations of quasi-Newton matrices and their use in limited memory methods", Math.
Programming 63, 1994, theorem 2.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt import _compat
from graphopt.optim.core.store import StateView

SMALL: Any = {"dtype": torch.float64, "device": "cpu"}  # of what has no axis of elements: no kernels, no waiting


def small(numbers: Tensor) -> Tensor:
    """Numbers without an axis of elements, on the CPU; of a DTensor the same in all processes."""
    return _compat.whole(numbers).to(**SMALL)


def for_product(numbers: Tensor, vector: Tensor) -> Tensor:
    """Such numbers where a vector is."""
    numbers = numbers.to(vector.device, vector.dtype)
    if _compat.local_part(vector) is vector:
        return numbers
    from torch.distributed.tensor import DTensor, Replicate

    mesh = vector.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(numbers, mesh, [Replicate()] * mesh.ndim)


def forget(state: StateView) -> None:
    """Keep no pairs."""
    for name in ("pairs", "s_dot_y", "y_dot_y", "num_pairs", "next_slot"):
        if name in state:
            del state[name]


def count(state: StateView) -> int:
    """How many pairs are kept."""
    return int(state.get("num_pairs", 0))


def rows(state: StateView) -> Tensor:
    """All pairs as a matrix: s and y in turn, shape (2 k, n)."""
    pairs: Tensor = state["pairs"][: count(state)]
    return pairs.flatten(0, 1)


def products(vector: Tensor, state: StateView) -> Tensor:
    """The inner products of all s and y, in turn, with a vector; shape (2 k,), on the CPU."""
    return small(rows(state) @ vector)


def ages(state: StateView) -> list[int]:
    """The places of the pairs in the buffer, the oldest first."""
    num, first = count(state), int(state["next_slot"])
    return [(first + index) % num for index in range(num)]


def put(s: Tensor, y: Tensor, history_size: int, state: StateView, in_place: bool) -> None:
    """Keep one more pair; the oldest goes if there is no room.

    The buffer grows by doubling, up to its size, so that short runs take no memory for long histories.
    """
    num = count(state)
    slot = num if num < history_size else int(state["next_slot"])
    buffer = state.get("pairs")
    if buffer is None or slot >= len(buffer):
        larger = s.new_zeros(min(history_size, max(4, 2 * num)), 2, len(s))
        if buffer is not None:
            larger[:num] = buffer
        buffer = larger
    elif not in_place:
        buffer = buffer.clone()
    buffer[slot, 0], buffer[slot, 1] = s, y
    state["pairs"], state["num_pairs"] = buffer, min(num + 1, history_size)
    state["next_slot"] = (slot + 1) % history_size if num + 1 >= history_size else 0


def put_products(s_dot_y: Tensor, y_dot_y: Tensor, history_size: int, dtype: torch.dtype, state: StateView) -> None:
    """Keep the inner products of a new pair's y with every s and y, the oldest first and its own last; shape (k + 1,)."""
    for name, column in (("s_dot_y", s_dot_y), ("y_dot_y", y_dot_y)):
        num = len(column)
        matrix = torch.zeros(num, num, **SMALL)
        if num > 1:
            matrix[:-1, :-1] = state[name]
        matrix[:, -1] = column
        if name == "y_dot_y":
            matrix[-1] = column
        state[name] = (matrix[1:, 1:] if num > history_size else matrix).to(dtype)


def coefficients(s_dot_g: Tensor, y_dot_g: Tensor, state: StateView) -> tuple[Tensor, Tensor, float]:
    """What S, Y and g are multiplied by, g the vector that the inverse Hessian is multiplied with; the oldest first."""
    triangle, y_dot_y = state["s_dot_y"].to(**SMALL), state["y_dot_y"].to(**SMALL)
    diagonal = triangle.diagonal()
    scale = float(diagonal[-1] / y_dot_y[-1, -1])
    first = torch.linalg.solve_triangular(triangle, s_dot_g[:, None], upper=True)
    right = diagonal[:, None] * first - scale * (y_dot_g[:, None] - y_dot_y @ first)
    second = torch.linalg.solve_triangular(triangle.T, right, upper=False)
    return second[:, 0], -scale * first[:, 0], scale
