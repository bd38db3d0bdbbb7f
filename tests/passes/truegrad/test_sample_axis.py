"""Where the samples are after each operator: by hand for what matters, and against the truth for random chains of views."""

import math

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import SampleAxisError
from graphopt.passes.truegrad.propagation import find_sample_axes
from graphopt.passes.truegrad.sample_axis import FREE, Lost, SampleAxis
from tests.passes.truegrad.checks import trace

NUM = 7  # no other axis has this many rows, so a symbol that is lost shows


def layout_of(function, *shape, axis=0, others=(), axes=None):
    """The layout of the function's result, with sizes as numbers."""
    tensors = (torch.randn(*shape), *others)
    graph = trace(function, *tensors, axes=axes or (axis, *[None] * len(others)))
    layout = find_sample_axes(graph)[graph.output_nodes[0]]
    if not isinstance(layout, SampleAxis):
        return layout
    number = {symbol: NUM for symbol in layout.num.free_symbols}
    return layout.axis, *(int(sympy.sympify(size).subs(number)) for size in (layout.outer, layout.num, layout.inner))


@pytest.mark.parametrize(
    ("function", "expected"),
    {
        "identity": (lambda x: x.sin(), (0, 1, NUM, 1)),
        "transposed": (lambda x: x.transpose(0, 1), (1, 1, NUM, 1)),
        "permuted": (lambda x: x.permute(2, 1, 0), (2, 1, NUM, 1)),
        "movedim": (lambda x: x.movedim(0, -1), (2, 1, NUM, 1)),
        "samples first, flattened": (lambda x: x.flatten(0, 1), (0, 1, NUM, 3)),
        "samples second, flattened": (lambda x: x.transpose(0, 1).flatten(0, 1), (0, 3, NUM, 1)),
        "between two, flattened": (lambda x: x.transpose(0, 1).flatten(), (0, 3, NUM, 5)),
        "flattened and back": (lambda x: x.transpose(0, 1).flatten(0, 1).view(3, -1, 5), (1, 1, NUM, 1)),
        "unsqueezed": (lambda x: x[None, :, None], (1, 1, NUM, 1)),
        "expanded": (lambda x: x.expand(4, -1, -1, -1).flatten(0, 1), (0, 4, NUM, 1)),
        "repeat_interleave": (lambda x: x.repeat_interleave(2, dim=0), (0, 1, NUM, 2)),
        "cat": (lambda x: torch.cat([x, x.new_ones(x.shape[0], 1, 5)], 1), (0, 1, NUM, 1)),
        "stack in front": (lambda x: torch.stack([x, x]), (1, 1, NUM, 1)),
        "stack behind": (lambda x: torch.stack([x, x], -1), (0, 1, NUM, 1)),
        "sum over others": (lambda x: x.transpose(0, 2).sum(0), (1, 1, NUM, 1)),
        "sum, axes kept": (lambda x: x.sum((1, 2), keepdim=True), (0, 1, NUM, 1)),
        "var_mean": (lambda x: torch.var_mean(x, dim=1)[0], (0, 1, NUM, 1)),
        "max over others": (lambda x: x.max(1).values, (0, 1, NUM, 1)),
        "selected": (lambda x: x.transpose(0, 2)[:, 1], (1, 1, NUM, 1)),
        "sliced": (lambda x: x[:, 1:], (0, 1, NUM, 1)),
        "chunked": (lambda x: x.chunk(3, dim=1)[1], (0, 1, NUM, 1)),
        "unbound": (lambda x: x.unbind(1)[0], (0, 1, NUM, 1)),
        "its own numbers": (lambda x: x[torch.arange(x.shape[0]), 0], (0, 1, NUM, 1)),
        "matmul, left": (lambda x: x @ x.new_ones(5, 2), (0, 1, NUM, 1)),
        "matmul, right": (lambda x: x.new_ones(2, 3) @ x, (0, 1, NUM, 1)),
        "attention": (lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x, (0, 1, NUM, 1)),
        "einsum": (lambda x: torch.einsum("ntd,dk->knt", x, x.new_ones(5, 2)), (1, 1, NUM, 1)),
        "created": (lambda x: x.new_zeros(2, x.shape[0]), (1, 1, NUM, 1)),
        "arange": (lambda x: torch.arange(x.shape[0]), (0, 1, NUM, 1)),
        "softmax": (lambda x: x.softmax(-1), (0, 1, NUM, 1)),
        "normalised": (lambda x: torch.nn.functional.normalize(x, dim=-1), (0, 1, NUM, 1)),
        "logical and": (lambda x: (x > 0) & (x < 1), (0, 1, NUM, 1)),
    }.values(),
)
def test_layouts(function, expected):
    assert layout_of(function, NUM, 3, 5) == expected


@pytest.mark.parametrize(
    ("function", "why"),
    {
        "sum": (lambda x: x.sum(0), "a reduction over the samples"),
        "sum of all": (lambda x: x.sum(), "a reduction over the samples"),
        "mean": (lambda x: x.flatten(0, 1).mean(0), "a reduction over the samples"),
        "norm": (lambda x: x.norm(dim=0, keepdim=True), "a reduction over the samples"),
        "flip": (lambda x: x.flip(0), "flip works across samples"),
        "softmax": (lambda x: x.softmax(0), "softmax works across samples"),
        "cumsum": (lambda x: x.cumsum(0), "cumsum works across samples"),
        "reordered": (lambda x: x[torch.arange(x.shape[0]) * 2 % x.shape[0]], "samples are reordered"),
        "index_select": (
            lambda x: x.index_select(0, torch.arange(x.shape[0]) * 2 % x.shape[0]),
            "samples are reordered",
        ),
        "backwards": (lambda x: x[torch.arange(x.shape[0] - 1, -1, -1)], "samples are reordered"),
        "masked": (lambda x: x[x[:, 0, 0] > 0], "mask"),
        "end to end": (lambda x: torch.cat([x, x]), "end to end"),
        "cut": (lambda x: x[1:], "samples are cut apart"),
        "one of them": (lambda x: x[0], "samples are cut apart"),
        "product": (lambda x: x.flatten(1).t() @ x.flatten(1), "a product over the samples"),
        "einsum": (lambda x: torch.einsum("ntd,nsd->ts", x, x), "a product over the samples"),
        "each with each": (lambda x: x.flatten(1) @ x.flatten(1).t(), "samples meet on different axes"),
        "transposed sum": (lambda x: x[:, 0, 0, None] + x[:, 0, 0], "samples meet on different axes"),
        "view that cuts": (lambda x: x.view(3, -1, 5), "a view cuts through samples"),
        "unknown": (
            lambda x: torch.linalg.matrix_exp(x[:, :3, :3]),
            "linalg_matrix_exp is not known to keep samples apart",
        ),
        "sorted": (lambda x: x[:, 0, 0].sort().values, "sort works across samples"),
        "written": (lambda x: torch.zeros_like(x).copy_(x.flip(0)), "flip works across samples"),
        "padded": (lambda x: torch.nn.functional.pad(x, (0, 0, 0, 0, 1, -1)), "pad"),
    }.values(),
)
def test_reasons_for_losing_them(function, why):
    layout = layout_of(function, NUM, 3, 5)
    assert isinstance(layout, Lost)
    assert why in layout.why


def test_values_without_samples_are_free():
    assert layout_of(lambda x: torch.ones(3, 2) @ torch.ones(2, 4), NUM, 3) == FREE
    assert layout_of(lambda x, table: table.t().exp(), NUM, 3, others=[torch.randn(3, 3)]) == FREE


def test_samples_that_are_not_on_the_first_axis():
    assert layout_of(lambda x: x.flatten(0, 1), 3, NUM, 5, axis=1) == (0, 3, NUM, 1)
    assert isinstance(layout_of(lambda x: x.sum(1), 3, NUM, 5, axis=1), Lost)
    assert layout_of(lambda x: x.sum(0), 3, NUM, 5, axis=1) == (0, 1, NUM, 1)


def test_two_inputs_with_as_many_samples_meet():
    assert layout_of(lambda x, y: x + y[:, None], NUM, 3, 5, others=[torch.randn(NUM, 5)], axes=(0, 0)) == (
        0,
        1,
        NUM,
        1,
    )


def test_two_inputs_that_count_differently_are_refused():
    with pytest.raises(SampleAxisError, match=r"x0, x1.*sample_axis.*'x1': None"):
        layout_of(lambda x, y: x[:, None] * y, NUM, 5, others=[torch.randn(4, 5)], axes=(0, 0))


# --- random chains of views --------------------------------------------------------------------------------------------------


@st.composite
def chains(draw):
    """Views of an input (N, a, b, c): each axis remembers which of these, in order, it holds."""
    axes = [("N",), ("a",), ("b",), ("c",)]
    steps = []
    for _ in range(draw(st.integers(1, 6))):
        kinds = (
            ["permute"]
            + ["flatten"] * (len(axes) > 1)
            + ["split"] * any(len(axis) > 1 for axis in axes)
            + ["unsqueeze"]
        )
        kind = draw(st.sampled_from(kinds))
        if kind == "permute":
            order = draw(st.permutations(range(len(axes))))
            axes = [axes[position] for position in order]
            steps.append(("permute", tuple(order)))
            continue
        if kind == "flatten":
            first = draw(st.integers(0, len(axes) - 2))
            axes = [*axes[:first], axes[first] + axes[first + 1], *axes[first + 2 :]]
        elif kind == "split":
            position = draw(st.sampled_from([p for p, axis in enumerate(axes) if len(axis) > 1]))
            cut = draw(st.integers(1, len(axes[position]) - 1))
            axes = [*axes[:position], axes[position][:cut], axes[position][cut:], *axes[position + 1 :]]
        else:
            axes = [*axes, ()]
        steps.append(("reshape", tuple(axes)))
    return steps


def apply(steps, x, sizes):
    for kind, argument in steps:
        if kind == "permute":
            x = x.permute(argument)
        else:
            x = x.reshape([math.prod(sizes[name] for name in axis) for axis in argument])
    return x


@settings(max_examples=60, deadline=None, derandomize=True)
@given(steps=chains(), a=st.integers(1, 4), b=st.integers(1, 3), c=st.integers(1, 3))
def test_views_against_the_truth(steps, a, b, c):
    sizes = {"a": a, "b": b, "c": c}
    graph = trace(lambda x: apply(steps, x, {"N": x.shape[0], **sizes}), torch.zeros(NUM, a, b, c))
    layout = find_sample_axes(graph)[graph.output_nodes[0]]
    assert isinstance(layout, SampleAxis), layout  # none of these chains mixes samples
    outer, num, inner = (
        int(sympy.sympify(s).subs(dict.fromkeys(layout.num.free_symbols, NUM)))
        for s in (layout.outer, layout.num, layout.inner)
    )
    truth = apply(steps, torch.arange(NUM).view(-1, 1, 1, 1).expand(NUM, a, b, c), {"N": NUM, **sizes})
    assert truth.shape[layout.axis] == outer * num * inner
    rows = (torch.arange(truth.shape[layout.axis]) // inner) % num
    assert torch.equal(
        truth, rows.view([-1 if axis == layout.axis else 1 for axis in range(truth.ndim)]).expand_as(truth)
    )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    order=st.permutations(range(4)),
    groups=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    names=st.permutations(["N", "a", "b", "c"]),
)
def test_views_that_may_cut_are_right_or_lost(order, groups, names):
    """A view into sizes in another order: whatever is claimed must be true."""
    sizes = {"a": 2, "b": 3, "c": 2}
    shape, start = [], 0
    for group in groups:
        shape.append(tuple(names[start : start + group]))
        start += group
    shape.append(tuple(names[start:]))
    steps = [("permute", tuple(order)), ("reshape", tuple(shape))]
    graph = trace(lambda x: apply(steps, x, {"N": x.shape[0], **sizes}), torch.zeros(NUM, 2, 3, 2))
    layout = find_sample_axes(graph)[graph.output_nodes[0]]
    if isinstance(layout, Lost):
        return
    _, num, inner = (
        int(sympy.sympify(s).subs(dict.fromkeys(layout.num.free_symbols, NUM)))
        for s in (layout.outer, layout.num, layout.inner)
    )
    truth = apply(steps, torch.arange(NUM).view(-1, 1, 1, 1).expand(NUM, 2, 3, 2), {"N": NUM, **sizes})
    rows = (torch.arange(truth.shape[layout.axis]) // inner) % num
    assert torch.equal(
        truth, rows.view([-1 if axis == layout.axis else 1 for axis in range(truth.ndim)]).expand_as(truth)
    )
