"""Operators that work element by element, with broadcasting, but do not carry torch's tag that says so."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Node

from graphopt.passes.truegrad.sample_axis import Known, Layout, Lost, SampleAxis, agreed, axis_rule, value_of

_ELEMENTWISE = (
    "absolute arccos arccosh arcsin arcsinh arctan arctan2 arctanh bucketize complex conj _conj divide exponential fill fix "
    "floor_divide greater greater_equal hardswish imag isclose isin isreal less less_equal lift lift_fresh log_sigmoid "
    "multiply negative not_equal poisson polar _prelu_kernel random real resolve_conj resolve_neg rrelu_with_noise subtract "
    "uniform zero broadcast_tensors special_digamma special_erf special_erfc special_erfinv special_exp2 special_expit "
    "special_expm1 special_gammainc special_gammaincc special_gammaln special_i0 special_log1p special_logit special_ndtr "
    "special_polygamma special_psi special_round special_sinc special_xlogy"
).split()
_LOSSES = (  # without reduction
    "margin_ranking_loss soft_margin_loss hinge_embedding_loss poisson_nll_loss"
).split()


@axis_rule(*_ELEMENTWISE)
def elementwise(node: Node, value: Tensor, known: Known) -> Layout:
    """The samples of all arguments lie on one axis of the result."""
    if str(node.target).startswith(
        "aten.masked_scatter"
    ):  # takes elements of its source in order, whatever row they are in
        return Lost(node, "masked_scatter moves values from sample to sample")
    return broadcast(node, value.ndim, known)


@axis_rule(*_LOSSES)
def loss(node: Node, value: Tensor, known: Known) -> Layout:
    """An element-wise loss, unless it is reduced to one number."""
    return broadcast(node, value.ndim, known) if value.ndim else Lost(node, "a loss over all samples")


def broadcast(node: Node, ndim: int, known: Known) -> Layout:
    """The axis of the samples among ``ndim`` axes to which all arguments broadcast."""
    found = {
        layout.at(layout.axis + ndim - value_of(argument).ndim)
        for argument in node.all_input_nodes
        if isinstance(layout := known.layout(argument), SampleAxis)
    }
    return agreed(found, node)
