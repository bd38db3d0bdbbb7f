"""Every public module on a GPU, in all ways of running it; compiled kernels; a step inside of a CUDA graph."""

import pytest
import torch
from torch import nn

from graphopt import annotations
from graphopt.optim import Modular, m
from tests.optim.examples import NAMES, RESIDUALS, make, residuals_of, with_rate
from tests.optim.test_ways_and_faces import loss_of, make_params, needs_closure
from tests.optim.training import set_gradients

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)  # there are a thousand of them

# Numbers of the device's own generator.
RANDOM = set(
    """
    Dropout ForwardGradient GaussianHomotopy GaussianSmoothing MeZO NoiseSign NystromPCG NystromSketchAndSolve RDSA Randn
    RandomSample RandomStepSize RandomizedFDM SPSA SophiaH Uniform WeightDropout
    """.split()
)
# Products of bfloat16, in another order; eigenvectors of equal eigenvalues.
ROUNDED = {"Muon": 0.05, "Orthogonalize": 0.05, "SOAP": 0.05}
CHAINS = {
    "adamw": lambda: [m.Adam(), m.WeightDecay(0.1), m.LR(0.01)],
    "not a fused one": lambda: [m.Adam(eps_inside=True), m.WeightDecay(0.1), m.LR(0.01)],
    "norms": lambda: [m.ClipValue(1.0), m.Adam(), m.NormalizeByEMA(max_ema_growth=1.1), m.WeightDecay(0.1), m.LR(0.01)],
    "signs": lambda: [m.HeavyBall(), m.Sign(), m.LR(0.01)],
}
SHAPES = [(200, 100), (100,), (7, 3), (), (50, 50, 2), (5000,), (1300, 1000), (1200, 1000)]


def on_gpu(params):
    return [nn.Parameter(param.detach().cuda()) for param in params]


def give_gradients(params, others, step):
    """The same gradients and statistics on both devices."""
    set_gradients(params, step)
    for param, other in zip(params, others, strict=True):
        other.grad = None if param.grad is None else param.grad.cuda()
        statistic, num_samples = annotations.find_statistic(param)
        if statistic is not None:
            annotations.publish(other, statistic.cuda(), num_samples)


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"capturable": True}, {}], ids=str)
@pytest.mark.parametrize("name", sorted(set(NAMES) - RANDOM))
def test_every_module_as_on_the_cpu(name, options):
    params = make_params(name)
    others = on_gpu(params)
    torch.manual_seed(0)
    optimizers = [
        Modular(params, with_rate(make(name), 0.01), foreach=False),
        Modular(others, with_rate(make(name), 0.01), **options),
    ]

    def step(params, optimizer):
        def closure(backward=True):
            loss = residuals_of(params) if name in RESIDUALS else loss_of(params)
            if backward:
                optimizer.zero_grad()
                loss.backward()
            return loss

        optimizer.step(closure if needs_closure(optimizer.modules) else None)

    for number in range(3):
        give_gradients(params, others, number)
        step(params, optimizers[0])
        step(others, optimizers[1])
    tolerance = ROUNDED.get(name, 1e-8)
    for param, other in zip(params, others, strict=True):
        assert other.is_cuda
        torch.testing.assert_close(other.detach().cpu(), param.detach(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CHAINS)
def test_kernels(name):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    others = on_gpu(params)
    optimizers = [Modular(params, *CHAINS[name](), foreach=False), Modular(others, *CHAINS[name](), fused=True)]
    for _ in range(3):
        for param, other in zip(params, others, strict=True):
            param.grad = torch.randn(param.shape, generator=generator)
            other.grad = param.grad.cuda()
        for optimizer in optimizers:
            optimizer.step()
    # (a sign may turn where its argument is next to nothing)
    wrong = sum(
        int((~torch.isclose(o.cpu(), p, rtol=1e-4, atol=1e-5)).sum()) for p, o in zip(params, others, strict=True)
    )
    assert wrong <= 3


@pytest.mark.parametrize("name", CHAINS)
def test_inside_of_a_graph(name):
    make_tensors = lambda: [nn.Parameter(torch.ones(shape, device="cuda")) for shape in SHAPES]  # noqa: E731
    params, others = make_tensors(), make_tensors()
    optimizer = Modular(params, *CHAINS[name](), capturable=True)
    reference = Modular(others, *CHAINS[name](), capturable=True)
    for param in (*params, *others):
        param.grad = torch.linspace(-1, 1, param.numel(), device="cuda").reshape(param.shape)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(4):
        graph.replay()
    for _ in range(7):
        reference.step()
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-5, atol=1e-6)
    assert float(optimizer.state[params[0]]["step"]) == float(reference.state[others[0]]["step"]) == 7
