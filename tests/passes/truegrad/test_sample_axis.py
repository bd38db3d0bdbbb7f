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
        "reordered": (lambda x: x[torch.randperm(x.shape[0])], (0, 1, NUM, 1)),
        "reordered, and back": (
            lambda x: x + (lambda i: x[i][i.argsort()])(torch.randperm(x.shape[0])),
            (0, 1, NUM, 1),
        ),
        "reordered, and a constant": (
            lambda x: x.new_zeros(x.shape[0], 1, 1) + x.index_select(0, x[:, 0, 0].argsort()),
            (0, 1, NUM, 1),
        ),
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
        "implicit einsum": (lambda x: torch.einsum("nti,oi", x, x.new_ones(2, 5)), (0, 1, NUM, 1)),
        "einsum with an ellipsis": (lambda x: torch.einsum("...i,io->o...", x, x.new_ones(5, 2)), (1, 1, NUM, 1)),
        "einsum, diagonal": (lambda x: torch.einsum("nii->in", x[:, :, :3]), (1, 1, NUM, 1)),
        "tensordot": (lambda x: torch.tensordot(x.new_ones(5, 2), x, dims=([0], [2])), (1, 1, NUM, 1)),
        "inner": (lambda x: torch.inner(x.new_ones(2, 5), x), (1, 1, NUM, 1)),
        "vector": (lambda x: x @ x.new_ones(5), (0, 1, NUM, 1)),
        "chain": (lambda x: torch.linalg.multi_dot([x.new_ones(2, 3), x[:, :, 0].t()]), (1, 1, NUM, 1)),
        "outer": (lambda x: torch.outer(x.new_ones(2), x[:, 0, 0]), (1, 1, NUM, 1)),
        "distances": (lambda x: torch.cdist(x, x.new_ones(4, 5)), (0, 1, NUM, 1)),
        "distances of rows": (lambda x: torch.cdist(x.new_ones(4, 5), x[:, 0]), (1, 1, NUM, 1)),
        "diag_embed": (lambda x: torch.diag_embed(x, dim1=0, dim2=2), (1, 1, NUM, 1)),
        "diagonal": (lambda x: x.transpose(0, 2).diagonal(dim1=0, dim2=1), (0, 1, NUM, 1)),
        "cosine_similarity": (lambda x: torch.cosine_similarity(x, x + 1, dim=1), (0, 1, NUM, 1)),
        "pairwise_distance": (lambda x: torch.pairwise_distance(x.transpose(0, 1), x.new_ones(5)), (1, 1, NUM, 1)),
        "inverse": (lambda x: torch.linalg.inv(x @ x.transpose(1, 2)), (0, 1, NUM, 1)),
        "solve": (lambda x: torch.linalg.solve(torch.eye(3), x), (0, 1, NUM, 1)),
        "eigenvalues": (lambda x: torch.linalg.eigh(x @ x.transpose(1, 2))[0], (0, 1, NUM, 1)),
        "fft": (lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1), n=3, dim=1), (0, 1, NUM, 1)),
        "complex": (lambda x: torch.view_as_complex(x[..., :2].contiguous()).abs(), (0, 1, NUM, 1)),
        "polar": (lambda x: torch.view_as_real(torch.polar(x, x)), (0, 1, NUM, 1)),
        "quantile": (lambda x: x.transpose(0, 1).quantile(0.3, dim=0), (0, 1, NUM, 1)),
        "diff": (lambda x: x.diff(dim=1), (0, 1, NUM, 1)),
        "rolled within": (lambda x: x.roll((1, 2), (1, 2)), (0, 1, NUM, 1)),
        "rot90": (lambda x: x.rot90(1, (1, 2)), (0, 1, NUM, 1)),
        "bucketize": (lambda x: torch.bucketize(x, torch.tensor([0.0, 1.0])), (0, 1, NUM, 1)),
        "norm": (lambda x: torch.linalg.norm(x.transpose(0, 2), dim=0), (1, 1, NUM, 1)),
        "matrix norm": (lambda x: torch.linalg.matrix_norm(x), (0, 1, NUM, 1)),
        "grid_sample": (
            lambda x: torch.nn.functional.grid_sample(
                x[:, None], x.new_zeros(x.shape[0], 2, 2, 2), align_corners=False
            ),
            (0, 1, NUM, 1),
        ),
        "patches": (lambda x: torch.nn.functional.unfold(x[:, None], (2, 1)), (0, 1, NUM, 1)),
        "hstack": (lambda x: torch.hstack([x, x]), (0, 1, NUM, 1)),
        "end to end": (lambda x: torch.cat([x, x * 2]), (0, 2, NUM, 1)),
        "end to end, one of them": (lambda x: torch.cat([x, x * 2, x]).chunk(3)[1], (0, 1, NUM, 1)),
        "end to end, two of them": (lambda x: torch.cat([x, x * 2, x]).split(2 * x.shape[0])[0], (0, 2, NUM, 1)),
        "end to end, the rest": (lambda x: torch.cat([x, x * 2, x])[x.shape[0] :], (0, 2, NUM, 1)),
        "rows, end to end": (lambda x: torch.cat([x.flatten(0, 1), x.flatten(0, 1)]), (0, 2, NUM, 3)),
        "its rows' own numbers, twice each": (
            lambda x: x.flatten(0, 1)[torch.arange(3 * x.shape[0]).unsqueeze(1).expand(-1, 2).reshape(-1)],
            (0, 1, NUM, 6),
        ),
        "its rows' own numbers, twice": (
            lambda x: x.flatten(0, 1).index_select(0, torch.arange(3 * x.shape[0]).repeat(2)),
            (0, 2, NUM, 3),
        ),
        "added to its own rows": (
            lambda x: torch.zeros_like(x.flatten(0, 1)).index_add(
                0, torch.arange(3 * x.shape[0]).repeat_interleave(2), x.flatten(0, 1).repeat_interleave(2, 0)
            ),
            (0, 1, NUM, 3),
        ),
        "index_add": (lambda x: torch.zeros_like(x).index_add(1, torch.tensor([0, 1, 0]), x), (0, 1, NUM, 1)),
        "index_put": (
            lambda x: x.clone().index_put((torch.arange(x.shape[0]), x[:, :, 0].argmax(1)), x[:, 0]),
            (0, 1, NUM, 1),
        ),
        "number through a mask": (lambda x: x.clone().index_put((x > 0,), torch.tensor(0.5)), (0, 1, NUM, 1)),
        "in place": (
            lambda x: x.clone().relu_().scatter_(1, x.argsort(1), x).index_add_(1, torch.tensor([0, 1, 0]), x),
            (0, 1, NUM, 1),
        ),
        "take": (lambda x: torch.take(torch.randn(4), x.long()), (0, 1, NUM, 1)),
        "take_along_dim": (lambda x: torch.take_along_dim(x, x.argsort(1), 1), (0, 1, NUM, 1)),
        "bags": (
            lambda x: torch.nn.functional.embedding_bag(
                x.flatten().long(), torch.ones(3, 2), torch.arange(0, 15 * x.shape[0], 5)
            ),
            (0, 1, NUM, 3),
        ),
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
        "reordered, some of them": (lambda x: x[torch.arange(x.shape[0] - 1)], "samples are reordered"),
        "reordered and not": (lambda x: x + x[torch.randperm(x.shape[0])], "samples meet in different orders"),
        "reordered twice": (
            lambda x: x[torch.randperm(x.shape[0])] + x[torch.randperm(x.shape[0])],
            "samples meet in different orders",
        ),
        "masked": (lambda x: x[x[:, 0, 0] > 0], "mask"),
        "end to end": (lambda x: torch.cat([x, x.new_ones(2, 3, 5)]), "end to end"),
        "piece of several": (lambda x: torch.cat([x, x])[: x.shape[0] + 1], "samples are cut apart"),
        "uneven pieces": (lambda x: torch.cat([x, x]).split(x.shape[0] - 1)[0], "samples are cut apart"),
        "rolled": (lambda x: x.roll(1, 0), "roll works across samples"),
        "rolled, flat": (lambda x: x.roll(1), "roll works across samples"),
        "fft": (lambda x: torch.fft.fft(x, dim=0), "fft_fft works across samples"),
        "fftn": (lambda x: torch.fft.fftn(x), "fft_fftn works across samples"),
        "diff": (lambda x: x.diff(dim=0), "diff works across samples"),
        "quantile": (lambda x: x.quantile(0.3), "quantile works across samples"),
        "two quantiles": (lambda x: x.quantile(torch.tensor([0.3, 0.5]), dim=1), "makes axes of its own"),
        "renormed": (lambda x: x.renorm(2, 1, 1.0), "renorm works across samples"),
        "searched": (lambda x: torch.searchsorted(x[:, 0, 0], x[:, 0, 1]), "searchsorted works across samples"),
        "rows of a matrix": (lambda x: torch.linalg.qr(x[:, :, 0])[1], "linalg_qr works across samples"),
        "diagonal": (lambda x: x.diagonal(), "a diagonal through the samples"),
        "diag_embed": (lambda x: x[:, 0, 0].diag_embed(), "diag_embed works across samples"),
        "added by index": (
            lambda x: torch.zeros_like(x).index_add(0, torch.zeros(x.shape[0], dtype=torch.int64), x),
            "as an index says",
        ),
        "masked_scatter": (lambda x: x.masked_scatter(x > 0, x), "through a mask"),
        "distances": (lambda x: torch.cdist(x.flatten(1), x.flatten(1)), "samples meet on different axes"),
        "similarity": (lambda x: torch.cosine_similarity(x, x + 1, dim=0), "cosine_similarity works across samples"),
        "bags": (
            lambda x: torch.nn.functional.embedding_bag(
                x.flatten().long(), torch.ones(3, 2), torch.arange(0, 15 * x.shape[0], 2)
            ),
            "bags cut through samples",
        ),
        "cut": (lambda x: x[1:], "samples are cut apart"),
        "one of them": (lambda x: x[0], "samples are cut apart"),
        "product": (lambda x: x.flatten(1).t() @ x.flatten(1), "a product over the samples"),
        "einsum": (lambda x: torch.einsum("ntd,nsd->ts", x, x), "a product over the samples"),
        "each with each": (lambda x: x.flatten(1) @ x.flatten(1).t(), "samples meet on different axes"),
        "transposed sum": (lambda x: x[:, 0, 0, None] + x[:, 0, 0], "samples meet on different axes"),
        "view that cuts": (lambda x: x.view(3, -1, 5), "a view cuts through samples"),
        "unknown": (lambda x: torch.trace(x[:, :, 0]), "trace is not known to keep samples apart"),
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
