"""What graphopt.nn promises beside its numbers: names, signatures, identity, lifetime, and errors that say what to type."""

import copy
import doctest
import inspect
import io
import pickle
import warnings

import pytest
import torch
from torch import nn as torch_nn
from torch.nn.utils.rnn import pack_padded_sequence

import graphopt
from graphopt import nn
from graphopt.annotations import NUM_SAMPLES, SUM_GRAD_SQUARED, find
from graphopt.errors import MissingAnnotation, StaleAnnotation, UnsupportedError
from graphopt.nn import traced_call, truegrad_parameter
from graphopt.passes import TrueGrad
from tests.nn.cases import N, rand
from tests.oracle import loop_over_samples

SUBMODULES = {
    "composite",
    "layers",
    "lazy",
    "losses",
    "mirror",
    "patching",
    "recurrent",
    "traced_call",
    "transformer",
    "truegrad_parameter",
}


def smooth(output):
    return (output + 0.3 * torch.arange(output.shape[-1])).sin().sum()


def statistic(param):
    return find(param, SUM_GRAD_SQUARED)


def plain(module):
    """The same of torch.nn, with the same values."""
    other = copy.deepcopy(module)
    for child in other.modules():
        if isinstance(child, nn.modules):
            child.__class__ = next(base for base in type(child).__mro__ if base.__module__.startswith("torch.nn."))
    return other


# --- names ------------------------------------------------------------------------------------------------------------------


def test_every_public_name_of_torch_is_there():
    mirrored = {cls.__name__: cls for cls in nn.modules}
    for name in (name for name in dir(torch_nn) if not name.startswith("_") and name != "modules"):
        expected = mirrored.get(name, getattr(torch_nn, name))
        assert getattr(nn, name) is expected, name
        assert name in dir(nn)
    assert nn.functional is torch_nn.functional
    assert nn.Parameter is torch_nn.Parameter
    with pytest.raises(AttributeError, match=r"neither graphopt\.nn nor torch\.nn has 'Liner'"):
        nn.Liner  # noqa: B018
    assert not SUBMODULES & set(dir(torch_nn))


def test_every_class_with_parameters_is_mirrored():
    """A class of torch.nn that is not mirrored makes no parameters: its source, and that of its bases, does not mention any."""
    building = ("Parameter(", "Linear(", "MultiheadAttention(", "EncoderLayer(", "_get_clones(")
    containers = {
        "Module",
        "Sequential",
        "ModuleList",
        "ModuleDict",
        "ParameterList",
        "ParameterDict",
        "RNNBase",
        "RNNCellBase",
        "Unflatten",
        "Container",
    }
    for name in dir(torch_nn):
        cls = getattr(torch_nn, name)
        if not isinstance(cls, type) or not issubclass(cls, torch_nn.Module) or name in containers:
            continue
        bases = [
            base for base in cls.__mro__ if base.__module__.startswith("torch.nn.") and base is not torch_nn.Module
        ]
        code = "".join(line for base in bases for line in inspect.getsource(base).splitlines(True) if ">>>" not in line)
        if any(text in code for text in building):
            assert issubclass(getattr(nn, name), cls), name
            assert getattr(nn, name) in nn.modules, name


def test_same_signatures():
    for cls in nn.modules:
        if cls.__name__ in ("LayerNorm1d", "LayerNorm2d", "LayerNorm3d"):
            continue
        original = next(base for base in cls.__mro__ if base.__module__.startswith("torch.nn."))
        assert inspect.signature(cls) == inspect.signature(original), cls
        assert issubclass(cls, original)


def test_device_dtype_and_bias():
    module = nn.Linear(3, 2, bias=False, device="meta", dtype=torch.float64)
    assert (module.weight.device.type, module.weight.dtype, module.bias) == ("meta", torch.float64, None)
    assert nn.LayerNorm(3, device="cpu", dtype=torch.bfloat16).bias.dtype is torch.bfloat16
    assert repr(nn.Linear(3, 2)) == repr(torch_nn.Linear(3, 2))


def test_truegrad_parameter_cannot_be_built():
    with pytest.raises(TypeError, match="cannot be built: the statistic comes from the module"):
        nn.TrueGradParameter(torch.zeros(2))
    assert type(nn.Linear(2, 3).weight) is torch_nn.Parameter
    assert not isinstance(torch.zeros(2), nn.TrueGradParameter)


def test_examples_in_docstrings():
    results = doctest.testmod(truegrad_parameter)
    assert results.attempted
    assert not results.failed


def test_membership_follows_copies_and_conversions():
    module = nn.Linear(2, 3)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.double()):
        assert all(isinstance(param, nn.TrueGradParameter) for param in other.parameters())
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other = nn.Linear(2, 3)
    other.load_state_dict(torch.load(buffer), assign=True)
    assert isinstance(other.weight, nn.TrueGradParameter)
    assert isinstance(nn.Linear(2, 3, device="meta").to_empty(device="cpu").weight, nn.TrueGradParameter)
    weight = module.weight
    del module, other
    assert not isinstance(weight, nn.TrueGradParameter)  # nothing serves it any more


# --- the life of the statistic ----------------------------------------------------------------------------------------------


def test_two_identical_steps_give_the_same_statistic():
    module, x = nn.Linear(3, 2).double(), rand(N, 3)
    found = []
    for _ in range(2):
        module.zero_grad()
        smooth(module(x)).backward()
        found.append(statistic(module.weight).clone())
    assert torch.equal(*found)


def test_gradient_accumulation_adds():
    module = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 2)).double()
    batches = [rand(N, 2, 5), rand(N - 1, 2, 5)]
    for batch in batches:
        smooth(module(batch)).backward()
    expected = loop_over_samples(plain(module), (torch.cat(batches),), smooth, reduction="sum")
    for name, param in module.named_parameters():
        torch.testing.assert_close(statistic(param), expected[name].sum_grad_squared, rtol=1e-9, atol=1e-12)
        assert find(param, NUM_SAMPLES) == 2 * N - 1


def test_a_mean_loss_needs_no_factor():
    """One scale for every parameter: the sum of squares of contributions to ``p.grad`` (peers differ by operator)."""
    module, x = nn.Linear(3, 2).double(), rand(8, 3)
    module(x).square().sum(1).mean().backward()
    expected = loop_over_samples(plain(module), (x,), lambda y: y.square().sum())
    for name, param in module.named_parameters():
        torch.testing.assert_close(statistic(param), expected[name].sum_grad_squared, rtol=1e-9, atol=1e-12)


def test_module_called_twice_in_one_backward_is_an_error_when_read():
    module = nn.Linear(3, 3)
    smooth(module(torch.tanh(module(torch.randn(N, 3))))).backward()
    assert module.weight.grad is not None
    with pytest.raises(
        StaleAnnotation, match=r"used by 2 calls of graphopt\.nn within one backward pass.*graphopt\.transform"
    ):
        find(module.weight, SUM_GRAD_SQUARED)
    module.zero_grad()
    smooth(module(torch.randn(N, 3))).backward()
    assert statistic(module.weight) is not None


def test_tied_modules_are_an_error_when_read():
    table, head = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
    head.weight = table.weight
    smooth(head(torch.tanh(table(torch.randint(0, 7, (N, 5)))))).backward()
    with pytest.raises(StaleAnnotation, match="used by 2 calls"):
        find(table.weight, SUM_GRAD_SQUARED)


def test_module_called_twice_with_a_backward_each():
    module, batches = nn.Linear(3, 2).double(), [rand(N, 3), rand(N, 3)]
    for loss in [smooth(module(batch)) for batch in batches]:
        loss.backward()
    expected = loop_over_samples(plain(module), (torch.cat(batches),), smooth, reduction="sum")
    torch.testing.assert_close(statistic(module.weight), expected["weight"].sum_grad_squared, rtol=1e-9, atol=1e-12)


def test_modules_that_disagree_on_the_number_of_samples_are_an_error_when_read():
    """A table of positions, looked up once for all samples: its own call cannot know."""
    positions, mix = nn.Embedding(5, 3), nn.Linear(3, 2)
    smooth(mix(torch.randn(N, 5, 3) + positions(torch.arange(5).unsqueeze(0)))).backward()
    for param in (positions.weight, mix.weight):
        with pytest.raises(
            StaleAnnotation, match=rf"disagree on how many samples .*Embedding\(input\) 1, Linear\(input\) {N}"
        ):
            find(param, SUM_GRAD_SQUARED)


# --- frozen, without gradients, in other hands ------------------------------------------------------------------------------


def test_frozen_weight_keeps_the_gradient_of_its_input():
    module, x = nn.Linear(3, 2).double(), rand(N, 3).requires_grad_()
    module.weight.requires_grad_(False)
    smooth(module(x)).backward()
    expected = loop_over_samples(plain(module), (x.detach(),), smooth, reduction="sum")
    torch.testing.assert_close(statistic(module.bias), expected["bias"].sum_grad_squared, rtol=1e-9, atol=1e-12)
    assert statistic(module.weight) is None
    (reference,) = torch.autograd.grad(smooth(plain(module)(x)), x)
    torch.testing.assert_close(x.grad, reference)


def test_no_trace_without_gradients():
    module, x = nn.Linear(11, 13), torch.randn(N, 11)
    before = len(traced_call._traces)
    with torch.no_grad():
        module(x)
    module.requires_grad_(False)
    assert not module(x).requires_grad
    assert len(traced_call._traces) == before


def test_equal_layers_share_a_trace_and_changes_make_new_ones():
    x = torch.randn(N, 2, 9, 9)
    first, second = nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3)
    first(x)
    before = len(traced_call._traces)
    second(x), first(torch.randn(2 * N, 2, 9, 9))
    assert len(traced_call._traces) == before
    second.dilation = (2, 2)
    assert second(x).shape == (N, 2, 5, 5)
    assert len(traced_call._traces) == before + 1


def test_dropout_follows_the_mode():
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.5, batch_first=True)
    x = torch.randn(N, 3, 4)
    torch.manual_seed(1)
    noisy = layer(x)
    torch.manual_seed(1)
    torch.testing.assert_close(noisy, plain(layer)(x))
    assert not torch.allclose(noisy, layer.eval()(x))
    torch.testing.assert_close(layer(x), plain(layer)(x))


def test_inside_a_transformed_model_the_whole_graph_serves():
    module = nn.Linear(3, 3)
    model = torch_nn.Sequential(module, torch_nn.Tanh(), module).double()
    x = rand(N, 3)
    expected = loop_over_samples(plain(model), (x,), smooth, reduction="sum")
    graphopt.transform(model, [TrueGrad()], compiler="aot_eager")
    smooth(model(x)).backward()
    torch.testing.assert_close(statistic(module.weight), expected["0.weight"].sum_grad_squared, rtol=1e-9, atol=1e-12)


def test_torch_compile_sees_torchs_own_forward():
    module, x = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm([1, 3]), nn.ReLU(), nn.Linear(3, 2)).double(), rand(N, 3)
    compiled = torch.compile(copy.deepcopy(module), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x))
    graphopt.transform(module, [TrueGrad()], compiler="aot_eager", options={"fullgraph": True})
    smooth(module(x)).backward()
    assert all(find(param, NUM_SAMPLES) == N for param in module.parameters())


def test_torch_func_and_fake_tensors_go_through():
    module, x = nn.Linear(3, 2), torch.randn(N, 3)
    params = dict(module.named_parameters())
    grads = torch.func.vmap(
        torch.func.grad(lambda p, row: torch.func.functional_call(module, p, (row,)).sin().sum()), (None, 0)
    )(params, x)
    smooth_sin = module(x).sin().sum()
    smooth_sin.backward()
    torch.testing.assert_close(statistic(module.weight), grads["weight"].square().sum(0))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert module(mode.from_tensor(x)).shape == (N, 2)


def test_a_layer_of_tensors_that_are_no_parameters():
    """``functional_call`` with tensors of a hyper-network: torch's forward, and gradients for what made them."""
    module, x = nn.Linear(3, 2), torch.randn(N, 3)
    weight = torch.randn(2, 3, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.func.functional_call(module, {"weight": weight * 2, "bias": torch.zeros(2)}, (x,)).sum().backward()
    torch.testing.assert_close(weight.grad, 2 * x.sum(0).expand(2, 3))


def test_parametrized():
    module = torch_nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)).double()
    x = rand(N, 3)
    expected = loop_over_samples(plain(module), (x,), smooth, reduction="sum")
    smooth(module(x)).backward()
    for name, param in module.named_parameters():
        torch.testing.assert_close(statistic(param), expected[name].sum_grad_squared, rtol=1e-9, atol=1e-12)


def test_autocast():
    module, x = nn.Linear(3, 2), torch.randn(N, 3)
    other = plain(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, expected = module(x), other(x)
    assert torch.equal(output, expected)
    output.float().sum().backward(), expected.float().sum().backward()
    assert torch.equal(module.weight.grad, other.weight.grad)
    assert statistic(module.weight).dtype is torch.float32
    torch.testing.assert_close(
        statistic(module.weight), x.bfloat16().float().square().sum(0).expand(2, 3), rtol=2e-2, atol=1e-3
    )
    assert module(x).dtype is torch.float32


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant):
    module, x = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double(), rand(N, 3).requires_grad_()
    expected = loop_over_samples(plain(module), (x.detach(),), smooth, reduction="sum")
    smooth(torch.utils.checkpoint.checkpoint(module, x, use_reentrant=reentrant)).backward()
    for name, param in module.named_parameters():
        torch.testing.assert_close(statistic(param), expected[name].sum_grad_squared, rtol=1e-9, atol=1e-12)


def test_output_changed_in_place():
    module, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Linear(3, 2)).double(), rand(N, 3)
    expected = loop_over_samples(plain(module), (x,), smooth, reduction="sum")
    smooth(module(x)).backward()
    for name, param in module.named_parameters():
        torch.testing.assert_close(statistic(param), expected[name].sum_grad_squared, rtol=1e-9, atol=1e-12)


# --- particular layers ------------------------------------------------------------------------------------------------------


def test_layer_norm_over_axes_that_need_not_be_there():
    module, x = nn.LayerNorm([1, 10]).double(), rand(16, 10)
    assert module.weight.shape == (1, 10)
    torch.testing.assert_close(module(x), torch_nn.functional.layer_norm(x, (10,)))
    smooth(module(x)).backward()
    normalised = torch_nn.functional.layer_norm(x, (10,))
    gradient = torch.cos(normalised + 0.3 * torch.arange(10))
    torch.testing.assert_close(statistic(module.weight), (gradient * normalised).square().sum(0, keepdim=True))
    torch.testing.assert_close(module(x.unsqueeze(1)), torch_nn.LayerNorm([1, 10]).double()(x.unsqueeze(1)))
    with pytest.raises(RuntimeError, match="normalized_shape"):
        module(rand(16, 9))


@pytest.mark.parametrize(("name", "shape"), [("BatchNorm1d", (N, 3)), ("BatchNorm2d", (N, 3, 2, 5))])
@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"track_running_stats": False}])
def test_batch_norm_in_training(name, shape, options):
    """A sample's contribution is the term of its own rows; running statistics move as torch's do."""
    module, original = (getattr(library, name)(3, **options).double() for library in (nn, torch_nn))
    for step in range(3):
        x = rand(*shape)
        module.zero_grad()
        outputs = [each(x) for each in (module, original)]
        torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
        for mine, theirs in zip(module.buffers(), original.buffers(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
        smooth(outputs[0]).backward()
        axes = tuple(range(2, x.ndim))
        mean, variance = x.mean((0, *axes), keepdim=True), x.var((0, *axes), keepdim=True, correction=0)
        normalised = (x - mean) / (variance + module.eps).sqrt()
        gradient = torch.cos(normalised + 0.3 * torch.arange(x.shape[-1]))
        rows = (gradient * normalised).sum(axes) if axes else gradient * normalised
        torch.testing.assert_close(statistic(module.weight), rows.square().sum(0))
        assert find(module.weight, NUM_SAMPLES) == N, step


def test_masks_for_each_head():
    module = nn.MultiheadAttention(4, 2).double()
    x, mask = rand(5, N, 4), torch.rand(N * 2, 5, 5) > 0.7
    mask[:, range(5), range(5)] = False
    original = plain(module)
    expected = {}
    for n in range(N):
        row = x[:, n : n + 1]
        output, _ = original(row, row, row, attn_mask=mask[2 * n : 2 * n + 2])
        grads = torch.autograd.grad(smooth(output), list(original.parameters()))
        for (name, _), grad in zip(original.named_parameters(), grads, strict=True):
            expected[name] = expected.get(name, 0) + grad.square()
    output, _ = module(x, x, x, attn_mask=mask)
    torch.testing.assert_close(output, original(x, x, x, attn_mask=mask)[0])
    smooth(output).backward()
    for name, param in module.named_parameters():
        torch.testing.assert_close(statistic(param), expected[name], rtol=1e-9, atol=1e-12)


def test_samples_on_another_axis():
    module = nn.Linear(3, 2).double()
    module.sample_axis = 1
    x = rand(5, N, 3)
    smooth(module(x)).backward()
    expected = loop_over_samples(plain(module), (x,), smooth, reduction="sum", axes=1)
    torch.testing.assert_close(statistic(module.weight), expected["weight"].sum_grad_squared, rtol=1e-9, atol=1e-12)
    assert find(module.weight, NUM_SAMPLES) == N


def test_lazy_modules_become_graphopts():
    module = nn.LazyLinear(2)
    assert isinstance(module, nn.modules)
    smooth(module(torch.randn(N, 3))).backward()
    assert type(module) is nn.Linear
    assert statistic(module.weight) is not None
    assert isinstance(module.weight, nn.TrueGradParameter)


def test_children_of_composites_are_graphopts():
    model = nn.Transformer(4, 2, 1, 1, 6, batch_first=True)
    owners = [m for m in model.modules() if list(m.parameters(recurse=False))]
    assert owners
    assert all(isinstance(module, nn.modules) for module in owners)
    assert all(isinstance(param, nn.TrueGradParameter) for param in model.parameters())


def test_embedding_that_renormalises_its_rows():
    module, rows = nn.Embedding(7, 3, max_norm=1.0).double(), torch.randint(0, 7, (N, 5))
    original = plain(module)
    smooth(module(rows)).backward()
    original(rows)  # norms are cut in place, at the first look-up
    torch.testing.assert_close(module.weight, original.weight)
    expected = loop_over_samples(original, (rows,), smooth, reduction="sum")
    torch.testing.assert_close(statistic(module.weight), expected["weight"].sum_grad_squared, rtol=1e-9, atol=1e-12)


def test_no_samples():
    """An expert that got none: gradients are zero, and what was there stays."""
    module, x = nn.Linear(3, 2).double(), rand(N, 3)
    smooth(module(x)).backward()
    before = statistic(module.weight).clone()
    smooth(module(x[:0])).backward()
    assert torch.equal(statistic(module.weight), before)
    assert find(module.weight, NUM_SAMPLES) == N


# --- refusals ---------------------------------------------------------------------------------------------------------------


def test_sparse_gradients_are_refused_by_name():
    module = nn.Embedding(7, 3, sparse=True)
    with pytest.raises(UnsupportedError, match=r"weight: .*sparse=False") as caught:
        module(torch.randint(0, 7, (N, 5)))
    assert "Embedding(input) of graphopt.nn" in "".join(caught.value.__notes__)
    assert "test_nn.py" in "".join(caught.value.__notes__)


def test_bags_of_different_lengths_are_refused_by_name():
    module = nn.EmbeddingBag(7, 3, mode="sum")
    with pytest.raises(UnsupportedError, match=r"weight: .*embedding_bag"):
        module(torch.randint(0, 7, (9,)), torch.tensor([0, 2, 5]))


def test_packed_sequences_are_refused():
    packed = pack_padded_sequence(torch.randn(5, 2, 3), [5, 3])
    with pytest.raises(UnsupportedError, match=r"PackedSequence, in which samples share no axis.*pad_packed_sequence"):
        nn.LSTM(3, 4)(packed)


def test_adaptive_softmax_is_refused_and_evaluates():
    module = nn.AdaptiveLogSoftmaxWithLoss(16, 10, [3, 6])
    x, target = torch.randn(N, 16), torch.tensor([0, 4, 9, 2])
    with pytest.raises(UnsupportedError, match=r"AdaptiveLogSoftmaxWithLoss\(input_, target_\) cannot be traced"):
        module(x, target)
    with torch.no_grad():
        torch.testing.assert_close(module(x, target).loss, plain(module)(x, target).loss)


def test_other_tensors_are_refused():
    with pytest.raises(
        UnsupportedError, match=r"Linear\(input\) got a .*modules of graphopt\.nn take plain dense tensors"
    ):
        nn.Linear(3, 2)(torch.randn(N, 3).to_sparse())


def test_hooks_inside_a_composite_are_refused():
    layer = nn.TransformerEncoderLayer(4, 2, 6)
    layer.linear1.register_forward_hook(lambda *_: None)
    with pytest.raises(UnsupportedError, match=r"linear1 .* hooks.*graphopt\.transform"):
        layer(torch.randn(3, N, 4))


def test_mistakes_are_torchs_to_report():
    for library in (nn, torch_nn):
        with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
            library.Linear(3, 2)(torch.randn(N, 4))
        with pytest.raises(TypeError, match="positional argument"):
            library.Linear(3, 2)(torch.randn(N, 3), 1, 2)
        with pytest.raises(TypeError, match="unexpected keyword argument 'inputs'"):
            library.Linear(3, 2)(inputs=torch.randn(N, 3))


def test_missing_statistic_says_what_provides_it():
    with pytest.raises(MissingAnnotation, match="provided by"):
        graphopt.annotations.get(nn.Linear(3, 2).weight, SUM_GRAD_SQUARED)
