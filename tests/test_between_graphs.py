"""Tensors that are computed between two graphs, outside of any: nobody knows where their samples are, so nothing is guessed."""

import warnings

import pytest
import torch
from torch import nn

import graphopt
from graphopt.annotations import SUM_GRAD_SQUARED, find
from graphopt.errors import OptionError, SampleAxisError, UncapturedParameter, UnsupportedError
from graphopt.passes import TrueGrad
from tests.oracle import loop_over_samples


class Selects(nn.Module):
    """Rows of several samples, chosen by their values in eager code."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        rows = torch.tanh(self.first(x)).flatten(0, 1)
        torch._dynamo.graph_break()
        rows = rows[rows[:, 0] > 0]
        return self.second(rows)


def loss(output):
    return output.sin().sum()


def test_is_refused_by_name():
    model = graphopt.transform(Selects(), compiler="eager")
    with pytest.raises(
        UnsupportedError, match=r"second\.weight: .*computed between two graphs.*sample_axis_between_graphs"
    ):
        model(torch.randn(4, 5, 3))


def test_what_comes_before_is_exact():
    model, x = Selects().double(), torch.randn(4, 5, 3).double()
    expected = loop_over_samples(model, (x,), loss, reduction="sum")
    graphopt.transform(model, [TrueGrad(unsupported="skip")], compiler="eager")
    loss(model(x)).backward()
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.grad, expected[name].grad)
        if name.startswith("first"):
            torch.testing.assert_close(param.sum_grad_squared, expected[name].sum_grad_squared)
        else:
            assert find(param, SUM_GRAD_SQUARED) is None


class Masked(nn.Module):
    """A mask that is drawn in eager code, as of wav2vec: data, which belongs to the rows that it lies beside."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.filler = nn.Linear(3, 3), nn.Linear(3, 2), nn.Parameter(torch.randn(3))

    @torch._dynamo.disable
    def draw(self, x):
        return torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2]) % 3 == 0

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        mask = self.draw(x)
        return self.second(torch.where(mask[..., None], self.filler, hidden))


def test_data_between_graphs_is_data():
    torch.manual_seed(0)
    model, x = Masked().double(), torch.randn(4, 6, 3).double()  # six positions: each sample's mask is the same
    expected = loop_over_samples(model, (x,), loss, reduction="sum")
    graphopt.transform(model, compiler="eager")
    loss(model(x)).backward()
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.sum_grad_squared, expected[name].sum_grad_squared, msg=name)
        assert param.num_samples == 4


def test_option():
    with pytest.raises(OptionError, match="sample_axis_between_graphs is 'first'; it is an int or None"):
        graphopt.transform(nn.Linear(2, 2), options={"sample_axis_between_graphs": "first"})


class Packs(nn.Module):
    """A recurrent layer over a packed sequence, which Dynamo leaves out of its graphs."""

    def __init__(self):
        super().__init__()
        self.before, self.layer = nn.Linear(3, 3), nn.GRU(3, 4, batch_first=True)

    def forward(self, x):
        packed = nn.utils.rnn.pack_padded_sequence(self.before(x), torch.tensor([5, 4, 3, 2]), batch_first=True)
        output, _ = self.layer(packed)
        return nn.utils.rnn.pad_packed_sequence(output, batch_first=True)[0]


def test_a_parameter_that_no_graph_uses_is_refused():
    model, x = graphopt.transform(Packs(), compiler="eager"), torch.randn(4, 5, 3)
    for _ in range(2):
        with pytest.raises(
            UnsupportedError, match=r"layer\.weight_ih_l0, .* of Packs would have gradients.*packed sequences"
        ):
            model(x)
    with torch.no_grad():
        model(x)


def test_a_parameter_that_no_graph_uses_is_not_asked_for():
    model, x = graphopt.transform(Packs(), [TrueGrad(where="before.*")], compiler="eager"), torch.randn(4, 5, 3)
    with warnings.catch_warnings(action="error", category=UncapturedParameter):
        loss(model(x)).backward()
    assert model.before.weight.sum_grad_squared is not None


def test_a_parameter_that_no_graph_uses_is_named_when_it_gets_a_gradient():
    model, x = graphopt.transform(Packs(), [TrueGrad(unsupported="skip")], compiler="eager"), torch.randn(4, 5, 3)
    with pytest.warns(
        UncapturedParameter, match=r"layer\.\w+ of Packs has a gradient but no statistics.*packed sequences"
    ):
        loss(model(x)).backward()
    assert model.before.weight.sum_grad_squared is not None
    assert find(model.layer.weight_hh_l0, SUM_GRAD_SQUARED) is None
    model.zero_grad()
    loss(model(x)).backward()  # once is enough


def test_an_unused_parameter_is_no_reason_to_warn():
    model = Selects()
    model.register_parameter("unused", nn.Parameter(torch.zeros(3)))
    graphopt.transform(model, [TrueGrad(unsupported="skip")], compiler="eager")
    loss(model(torch.randn(4, 5, 3))).backward()
    assert model.unused.grad is None


class Frozen(nn.Module):
    """A head on features of a frozen backbone, which Dynamo compiles apart, or leaves out."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.backbone, self.head = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 2)
        self.backbone.requires_grad_(False)

    @torch.compiler.disable
    def outside(self, x):
        return self.backbone(x)

    def forward(self, x):
        if self.way == "disabled":
            return self.head(self.outside(x))
        with torch.set_grad_enabled(self.way == "break"):
            features = self.backbone(x)
            torch._dynamo.graph_break()
        return self.head(features)


@pytest.mark.parametrize("num", [4, 1])
@pytest.mark.parametrize(
    ("way", "options"), [("break", {}), ("no_grad", {}), ("disabled", {"sample_axis_between_graphs": 0})]
)
def test_features_of_a_frozen_backbone(way, options, num):
    model, x = Frozen(way).double(), torch.randn(num, 3).double()
    expected = loop_over_samples(model, (x,), loss, reduction="sum")
    graphopt.transform(model, compiler="eager", options=options)
    loss(model(x)).backward()
    for name, param in model.head.named_parameters(prefix="head"):
        torch.testing.assert_close(param.sum_grad_squared, expected[name].sum_grad_squared)
        assert param.num_samples == num


def test_features_that_nobody_follows_are_named():
    model = graphopt.transform(Frozen("disabled"), compiler="eager")
    with pytest.raises(SampleAxisError, match=r"head\.\w+ has no input.*sample_axis_between_graphs"):
        model(torch.randn(4, 3))


class TwoParts(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(1, 2)

    def forward(self, x):
        pooled = torch.tanh(self.first(x)).mean(1, keepdim=True)
        torch._dynamo.graph_break()
        return self.second(pooled)


def test_one_sample_across_a_break():
    model, x = TwoParts().double(), torch.randn(1, 3).double()
    graphopt.transform(model, compiler="eager")
    loss(model(x)).backward()
    for param in model.parameters():
        torch.testing.assert_close(param.sum_grad_squared, param.grad.square())


class Tables(nn.Module):
    """A table beside the samples, computed in eager code."""

    def __init__(self):
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 3), nn.Parameter(torch.randn(3))

    @torch.compiler.disable
    def table(self, x):
        return torch.arange(x.shape[1], dtype=x.dtype).unsqueeze(1).expand(-1, 3)

    def forward(self, x):
        return self.linear(x) * (self.table(x) * self.scale).cos()


class TablesBehindABreak(Tables):
    """The samples come from eager code as well."""

    @torch.compiler.disable
    def enter(self, x):
        return torch.tanh(self.linear(x))

    def forward(self, x):
        return self.enter(x) * (self.table(x) * self.scale).cos()


def test_a_table_is_no_batch_beside_samples_from_eager_code():
    model, x = TablesBehindABreak().double(), torch.randn(4, 5, 3).double()
    expected = loop_over_samples(model, (x,), loss, reduction="sum")
    options = {"sample_axis_between_graphs": 0}
    graphopt.transform(model, [TrueGrad(where="scale")], compiler="eager", options=options)
    loss(model(x)).backward()
    torch.testing.assert_close(model.scale.sum_grad_squared, expected["scale"].sum_grad_squared)


def test_an_axis_that_a_tensor_does_not_have():
    model = graphopt.transform(Selects(), compiler="eager", options={"sample_axis_between_graphs": 2})
    with pytest.raises(OptionError, match=r"sample_axis_between_graphs=2, but .* has shape \(\d+, 3\)"):
        model(torch.randn(4, 5, 3))


def test_a_table_is_no_batch():
    """What has other rows than the batch holds no samples, whatever the option says."""
    model, x = Tables().double(), torch.randn(4, 5, 3).double()
    expected = loop_over_samples(model, (x,), loss, reduction="sum")
    graphopt.transform(model, compiler="eager", options={"sample_axis_between_graphs": 0})
    loss(model(x)).backward()
    for name, param in model.named_parameters():
        torch.testing.assert_close(param.sum_grad_squared, expected[name].sum_grad_squared)
