"""Products in every wording: each parameter against the loop over samples."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt.annotations import SUM_GRAD_SQUARED, find
from graphopt.passes import TrueGrad
from graphopt.pipeline import Status
from tests.models import double, smooth
from tests.oracle import loop_over_samples
from tests.passes.truegrad.checks import assert_statistics, check, train_step
from tests.passes.truegrad.formulas import formula

N = 4
X2, X3, X4 = torch.randn(N, 3), torch.randn(N, 5, 3), torch.randn(N, 2, 5, 3)


def einsum(equation):
    return lambda x, **w: torch.einsum(equation, x, *w.values())


# In closed form: one linear layer, or one for each head.
CLOSED = {
    "einsum, implicit": formula(einsum("nti,oi"), X3, w=(2, 3)),
    "einsum, ellipsis": formula(einsum("...i,oi->...o"), X3, w=(2, 3)),
    "einsum, implicit ellipsis": formula(einsum("...i,io"), X3, w=(3, 4)),
    "einsum, ellipsis of heads": formula(einsum("...ti,...io->...to"), X4, w=(2, 3, 4)),
    "einsum, ellipsis that broadcasts": formula(einsum("...ti,...io->...to"), X4, w=(1, 3, 4)),
    "einsum, diagonal of the input": formula(einsum("ntt,to->no"), torch.randn(N, 3, 3), w=(3, 2)),
    "einsum, parameter in front": formula(lambda x, w: torch.einsum("oi,nti->nto", w, x), X3, w=(2, 3)),
    "einsum, one factor twice": formula(lambda x, w: torch.einsum("ni,nj,oij->no", x, x, w), X2, w=(2, 3, 3)),
    "einsum, size 1": formula(einsum("nti,hi->nth"), X3, w=(2, 1)),
    "einsum, three indices": formula(einsum("nshi,hio->nsho"), X4.transpose(1, 2), w=(2, 3, 4)),
    "einsum, capital letters": formula(einsum("NTP,PQ->NTQ"), X3, w=(3, 2)),
    "einsum, flattened": formula(lambda x, w: torch.einsum("ri,io->ro", x.flatten(0, 1), w), X3, w=(3, 2)),
    "einsum, positions first": formula(
        lambda x, w: torch.einsum("ri,io->ro", x.transpose(0, 1).flatten(0, 1), w).view(5, -1, 2).transpose(0, 1),
        X3, w=(3, 2),
    ),
    "einsum, samples last": formula(lambda x, w: torch.einsum("io,in->on", w, x.t()).t(), X2, w=(3, 2)),
    "tensordot": formula(lambda x, w: torch.tensordot(x, w, dims=([2], [0])), X3, w=(3, 2, 4)),
    "tensordot, two axes": formula(lambda x, w: torch.tensordot(x, w, dims=2), X3, w=(5, 3, 4)),
    "inner": formula(lambda x, w: torch.inner(x, w), X3, w=(2, 3)),
    "outer": formula(lambda x, w: torch.outer(x, w), torch.randn(N), w=(3,)),
    "mv": formula(lambda x, w: torch.mv(x, w).unsqueeze(-1), X2, w=(3,)),
    "matrix times vector": formula(lambda x, w: x @ w, X3, w=(3,)),
    "vector times matrices": formula(lambda x, w: w @ x, X3, w=(5,)),
    "vecdot": formula(lambda x, w: torch.linalg.vecdot(x, w), X3, w=(3,)),
    "parameter times transposed input": formula(lambda x, w: (w @ x.t()).t(), X2, w=(2, 3)),
    "matmul, heads": formula(lambda x, w: x @ w, X4, w=(2, 3, 4)),
    "matmul, a head that broadcasts": formula(lambda x, w: x @ w, X4, w=(1, 3, 4)),
    "matmul, parameter in front": formula(lambda x, w: w @ x, torch.randn(N, 2, 3, 5), w=(2, 4, 3)),
    "matmul, all experts": formula(lambda x, w: (x @ w).movedim(1, 0), X2, w=(2, 3, 4)),
    "bmm of experts": formula(lambda x, w: torch.bmm(x.transpose(0, 1), w).transpose(0, 1), X3, w=(5, 3, 2)),
    "addmm, scaled": formula(lambda x, w: torch.addmm(x[:, :2], x, w, beta=0.5, alpha=2.0), X2, w=(3, 2)),
    "addmv, scaled": formula(lambda x, w: torch.addmv(x[:, 0], x, w, alpha=2.0)[:, None], X2, w=(3,)),
    "bilinear": formula(lambda x, layer: layer(x, x), X2, layer=lambda: nn.Bilinear(3, 3, 4)),
    "bilinear, positions": formula(lambda x, layer: layer(x, x), X3, layer=lambda: nn.Bilinear(3, 3, 4, bias=False)),
}  # fmt: skip
# In memory: one gradient for each sample.
BATCHED = {
    "einsum, diagonal of the parameter": formula(einsum("ni,ii->ni"), X2, w=(3, 3)),
    "einsum, sum over the parameter's own letter": formula(einsum("ni,io->ni"), X2, w=(3, 2)),
    "einsum, one operand": formula(lambda x, w: torch.einsum("io->oi", w).unsqueeze(0) * x, X3[:, :3, :2], w=(2, 3)),
    "einsum, one operand without samples": formula(lambda x, w: x @ torch.einsum("iio->io", w), X2, w=(3, 3, 2)),
    "einsum, two parameters": formula(einsum("ni,io,op->np"), X2, w=(3, 2), v=(2, 4)),
    "einsum, one parameter twice": formula(lambda x, w: torch.einsum("ni,io,po->np", x, w, w), X2, w=(3, 2)),
    "einsum, input of size 1": formula(lambda x, w: torch.einsum("nti,io->nto", x[..., :1], w), X3, w=(3, 2)),
    "einsum, the samples' letter": formula(lambda x, w: torch.einsum("ni,ni->ni", x, w), X2, w=(1, 3)),
    "einsum, two, flattened": formula(
        lambda x, w, v: torch.einsum("ri,io,op->rp", x.transpose(0, 1).flatten(0, 1), w, v).view(5, -1, 4).transpose(0, 1),
        X3, w=(3, 2), v=(2, 4),
    ),
    "addmm, scaled, with its bias": formula(lambda x, w, b: torch.addmm(b, x, w, beta=0.5, alpha=2.0), X2, w=(3, 2), b=(2,)),
    "addmm, no bias": formula(lambda x, w, b: torch.addmm(b, x, w, beta=0, alpha=2.0), X2, w=(3, 2), b=(2,)),
    "addmm, bias of one row": formula(lambda x, w, b: torch.addmm(b, x, w), X2, w=(3, 2), b=(1, 2)),
    "addmm, bias of one number": formula(lambda x, w, b: torch.addmm(b, x, w), X2, w=(3, 2), b=(1,)),
    "baddbmm": formula(
        lambda x, w, b: torch.baddbmm(b, x.transpose(0, 1), w, beta=0.5, alpha=2.0).transpose(0, 1), X3, w=(5, 3, 4), b=(5, 1, 4)
    ),
    "baddbmm, bias only": formula(lambda x, b: torch.baddbmm(b, x, x.transpose(1, 2), beta=0.3), X3, b=(1, 5, 5)),
    "addbmm": formula(lambda x, w, b: torch.addbmm(b, x.transpose(0, 1), w), X3, w=(5, 3, 4), b=(4,)),
    "addr": formula(lambda x, w, b: torch.addr(b, x, w, beta=0.5, alpha=2), torch.randn(N), w=(3,), b=(3,)),
    "matmul, input that broadcasts": formula(lambda x, w: x @ w, X4[:, :1], w=(2, 3, 4)),
    "multi_dot": formula(lambda x, w, v: torch.linalg.multi_dot([x, w, v]), X2, w=(3, 2), v=(2, 4)),
    "multi_dot of parameters": formula(lambda x, w, v, u: x @ torch.linalg.multi_dot([w, v, u]), X2, w=(3, 2), v=(2, 4), u=(4, 2)),
    "kron of parameters": formula(lambda x, w, v: x @ torch.kron(w, v), torch.randn(N, 6), w=(2, 2), v=(3, 2)),
    "outer of parameters": formula(lambda x, w, v: x @ torch.outer(w, v), X2, w=(3,), v=(2,)),
    "dot of parameters": formula(lambda x, w, v: x * torch.dot(w, v), X2, w=(3,), v=(3,)),
    "bmm of one matrix, expanded": formula(lambda x, w: torch.bmm(x, w.expand(x.shape[0], -1, -1)), X3, w=(3, 2)),
    "bilinear, tied": formula(lambda x, layer: layer(torch.tanh(layer(x, x)), x), X3, layer=lambda: nn.Bilinear(3, 3, 3)),
    "many heads": formula(einsum("nhi,hio->nho"), torch.randn(N, 20, 3), w=(20, 3, 2)),
    "distances to prototypes": formula(lambda x, w: torch.cdist(x, w), X2, w=(5, 3)),
    "distances of positions": formula(lambda x, w: torch.cdist(x, w), X3, w=(5, 3)),
    "distances, p=1": formula(lambda x, w: torch.cdist(x, w, p=1.0), X3, w=(5, 3)),
    "squared distances by hand": formula(lambda x, w: ((x.unsqueeze(1) - w) ** 2).sum(-1), X2, w=(5, 3)),
    "cosine similarity to prototypes": formula(lambda x, w: F.cosine_similarity(x.unsqueeze(1), w, dim=-1), X2, w=(5, 3)),
}  # fmt: skip


@pytest.mark.parametrize("form", CLOSED.values(), ids=CLOSED)
def test_closed_forms(form):
    module, inputs = form()
    model = check(module, inputs)
    assert statuses(model) == {Status.EXACT}


@pytest.mark.parametrize("form", BATCHED.values(), ids=BATCHED)
def test_batched_forms(form):
    module, inputs = form()
    check(module, inputs, compiler="eager")  # AOTAutograd meets torch's own operators only, and one such form below


@pytest.mark.parametrize(
    "form", [CLOSED["einsum, ellipsis of heads"], CLOSED["bilinear, positions"], BATCHED["einsum, two parameters"]]
)
def test_another_number_of_samples_does_not_recompile(form):
    module, (x, *_) = form()
    model, _ = double(module, ())
    graphopt.transform(model, [TrueGrad()], compiler="aot_eager")
    for num in (4, 5, 3):
        batch = (torch.randn(num, *x.shape[1:], dtype=torch.float64),)
        expected = loop_over_samples(model_copy(form, model), batch, smooth, reduction="sum")
        with torch._dynamo.config.patch(error_on_recompile=num != 4):
            train_step(model, batch)
        assert_statistics(model, expected, num)


def test_a_product_that_sums_over_samples_is_refused():
    module, inputs = formula(lambda x, w: torch.einsum("ni,no->io", x, x @ w), X2, w=(3, 2))()
    model = check(module, inputs, loss=first_step)  # in front of the sum each sample has rows of its own
    assert find(model.w, SUM_GRAD_SQUARED) is not None
    module, inputs = formula(lambda x, w, v: torch.einsum("ni,no->io", x, x) @ v + w, X2, w=(3, 2), v=(3, 2))()
    graphopt.transform(module, [TrueGrad()], compiler="aot_eager")
    with pytest.raises(graphopt.errors.UnsupportedError, match="a product over the samples"):
        module(*inputs)


def first_step(output):
    """Linear in the output, so that the loss of a batch is the sum of those of its samples."""
    return (output * torch.arange(output.numel(), dtype=output.dtype).view_as(output)).sum()


def statuses(model):
    return {row.status for record in graphopt.records(model) for row in record.coverage}


def model_copy(form, model):
    module, _ = form()
    module.double().load_state_dict(model.state_dict())
    return module


@pytest.mark.slow
def test_inductor():
    module, inputs = CLOSED["einsum, ellipsis of heads"]()
    check(module, inputs, compiler="inductor")
