"""Modules against those of torchzero 0.4.4 that have the same names: equal, or different for a reason.

It shares no code with graphopt. Where both compute the same, they agree to rounding; where torchzero is wrong, the difference is
asserted, so that the reasons stay true; our tests of those modules follow the source that their docstrings name.
"""

import contextlib
import io

import pytest
import torch
from torch import nn

from graphopt.optim import Modular, m
from tests.optim.examples import PUBLIC

tz = pytest.importorskip("torchzero")

NUM_STEPS = 8
SHAPES = [(4, 3), (5,), (2, 3)]
RATE = 0.01


def of(name, *args, **kwargs):
    """A module by the same arguments in both libraries."""
    return lambda library: getattr(library, name)(*args, **kwargs)


def ema(library):
    return library.EMA(0.5)


def with_ema(name, *args, **kwargs):
    return lambda library: getattr(library, name)(ema(library), *args, **kwargs)


def of_two(name, *args, **kwargs):
    return lambda library: getattr(library, name)(ema(library), library.Sign(), *args, **kwargs)


def dense(name):
    """A full-matrix quasi-Newton method from the identity, without what only one of the two does beside it."""
    return lambda library: dense_with(library, name)


def dense_with(library, name, **options):
    ours = {"tol_reset": False} if library is m else {}
    return getattr(library, name)(init_scale=1.0, scale_first=False, **ours, **options)


def conjugate(name):
    return lambda library: getattr(library, name)(**{"reset_interval" if library is m else "restart_interval": None})


def with_closure(chain):
    """Steps on the gradients of a loss."""
    return chain, True


WITHOUT_ARGUMENTS = """
Abs AccumulateMean AccumulateSum Adagrad Adan Cautious CenteredEMASquared CenteredSqrtEMASquared Centralize ClipNormByEMA
ClipNormGrowth ClipValueByEMA ClipValueGrowth Clone Debias2 EMA EMASquared Exp Grad GradSign GraftGradToUpdate GraftToGrad
GraftToParams Identity LaplacianSmoothing LastAbsoluteRatio LastDifference LastGradDifference LastProduct LastRatio Lion NAG
NanToNum Negate NoiseSign Normalize NormalizeByEMA Ones OrthoGrad Params RMSprop Randn RandomSample Reciprocal Relative Rprop
ScaleByGradCosineSimilarity ScaleLRBySignChange Sign SignConsistencyLRs SqrtEMASquared UpdateGradientSignConsistency UpdateSign
UpdateToNone Warmup Zeros
""".split()
EQUAL = {
    **{name: of(name) for name in WITHOUT_ARGUMENTS},
    **{
        name: with_closure(of(name))
        for name in "AdaptiveBacktracking Backtracking FDM ForwardGradient PolyakStepSize RDSA ScipyMinimizeScalar SophiaH".split()
    },
    **{
        name: with_ema(name)
        for name in "Add CopyMagnitude CopySign Maximum Minimum Mul RCopySign RDiv RSub Sub".split()
    },
    **{
        name: of_two(name)
        for name in "IntermoduleCautious MaximumModules Mean MinimumModules Prod ScaleModulesByCosineSimilarity Sum".split()
    },
    **{
        name: with_closure(dense(name))
        for name in (
            "BFGS BroydenBad BroydenGood DFP FletcherVMM Greenstadt2 Horisho PSB ProjectedNewtonRaphson SR1 ThomasOptimalMethod"
        ).split()
    },
    "Adam": lambda library: library.Adam(**({"eps_inside": True} if library is m else {})),
    "Alternate": lambda library: library.Alternate(ema(library), [library.Sign()]),
    "Averaging": of("Averaging", 3),
    "CautiousWeightDecay": of("CautiousWeightDecay", 0.1),
    "Clip": of("Clip", -0.5, 0.3),
    "ClipModules": lambda library: library.ClipModules(ema(library), -0.5, [library.Ones(), library.Mul(0.3)]),
    "ClipNorm": of("ClipNorm", 0.5),
    "ClipValue": of("ClipValue", 0.5),
    "Debias": of("Debias", 0.9, 0.99),
    "Div": of("Div", 2.0),
    "DivByLoss": with_closure(of("DivByLoss")),
    "DivModules": lambda library: library.DivModules(ema(library), [library.SqrtEMASquared(0.99), library.Add(1e-8)]),
    "Fill": of("Fill", 0.1),
    "FletcherReeves": with_closure(conjugate("FletcherReeves")),
    "FullMatrixAdagrad": of("FullMatrixAdagrad", concat_params=True),
    "GaussianSmoothing": with_closure(of("GaussianSmoothing", n_samples=5, formula="forward2")),
    "GradientCorrection": with_closure(
        lambda library: dense_with(library, "Horisho", inner=library.GradientCorrection())
    ),
    "Graft": lambda library: (
        m.GraftModules(m.Sign(), m.EMA(0.5)) if library is m else tz.m.Graft(tz.m.Sign(), ema(tz.m))
    ),
    "LBFGS": with_closure(of("LBFGS")),
    "LR": of("LR", 0.1),
    "LSR1": with_closure(
        lambda library: m.LSR1(scale_first=False, scale_second=False) if library is m else tz.m.LSR1()
    ),
    "LerpModules": of_two("LerpModules", 0.3),
    "MARSCorrection": of("MARSCorrection", max_norm=None),
    "MedianAveraging": of("MedianAveraging", 3),
    "Multistep": with_closure(lambda library: library.Multistep([library.Sign(), library.LR(0.1)], 3)),
    "Newton": with_closure(lambda library: m.Newton(reg=0.0) if library is m else tz.m.Newton()),
    "NewtonCG": with_closure(
        lambda library: m.NewtonCG(hvp_method="autograd", tol=1e-12) if library is m else tz.m.NewtonCG(tol=1e-12)
    ),
    "NystromPCG": with_closure(of("NystromPCG", 5, tol=1e-14)),
    "NystromSketchAndSolve": with_closure(of("NystromSketchAndSolve", 23, reg=0.01)),
    "Orthogonalize": of("Orthogonalize", method="svd"),
    "PolakRibiere": with_closure(conjugate("PolakRibiere")),
    "Pow": of("Pow", 2.0),
    "ProjectedGradientMethod": with_closure(of("ProjectedGradientMethod")),
    "RPow": of("RPow", 2.0),
    "Sequential": with_closure(
        lambda library: (
            library.Sequential(library.LR(0.1), [library.Sign(), library.LR(0.1)])
            if library is m
            else library.Sequential([library.LR(0.1), [library.Sign(), library.LR(0.1)]])
        )
    ),
    "Shampoo": of("Shampoo", merge_small=False),
    "Split": lambda library: library.Split(lambda p: p.ndim >= 2, ema(library), library.Sign()),
    "Sqrt": lambda library: [library.Abs(), library.Sqrt()],
    "StepSize": of("StepSize", 0.3),
    "SubModules": of_two("SubModules"),
    "Switch": lambda library: library.Switch(ema(library), library.Sign(), steps=[3]),
    "Threshold": of("Threshold", 0.1, 0.3, update_above=True),
    "UnaryLambda": of("UnaryLambda", lambda updates: [2 * update for update in updates]),
    "UnaryParameterwiseLambda": of("UnaryParameterwiseLambda", torch.tanh),
    "Uniform": of("Uniform", 0.0, 1.0),
    "VectorProjection": lambda library: library.VectorProjection([library.Normalize()], project_params=False),
    "WeightDecay": of("WeightDecay", 0.1),
    "WeightedAveraging": of("WeightedAveraging", [0.5, 0.3, 0.2]),
    "Wrap": of("Wrap", torch.optim.Adam, lr=0.1),
}
DIFFERENT = {
    "ASAM": (
        with_closure(of("ASAM")),
        "the norm in the denominator is that of each tensor, not of all (arXiv:2102.11600, eq. 3)",
    ),
    "AccumulateMaximum": (of("AccumulateMaximum"), "it starts from 0 instead of the first update"),
    "AccumulateMinimum": (of("AccumulateMinimum"), "as the maximum"),
    "AccumulateProduct": (of("AccumulateProduct"), "it starts from 0, and stays there"),
    "BacktrackOnSignChange": (
        of("BacktrackOnSignChange"),
        "it makes the last step once more instead of taking it back",
    ),
    "BarzilaiBorwein": (with_closure(of("BarzilaiBorwein", "long")), "the first step is 1e-7 of the gradient"),
    "ConjugateDescent": (with_closure(conjugate("ConjugateDescent")), "the gradient before is never replaced"),
    "DaiYuan": (with_closure(conjugate("DaiYuan")), "as ConjugateDescent"),
    "GramSchimdt": (
        lambda library: library.GramSchimdt(ema(library)),
        "element-wise, so that nothing becomes orthogonal",
    ),
    "Greenstadt1": (with_closure(dense("Greenstadt1")), "the gradient before is that of the step after"),
    "HagerZhang": (with_closure(conjugate("HagerZhang")), "as ConjugateDescent"),
    "HeavyBall": (of("HeavyBall"), "the first update is 1.9 times the gradient, unlike torch.optim.SGD"),
    "HestenesStiefel": (with_closure(conjugate("HestenesStiefel")), "as ConjugateDescent"),
    "LiuStorey": (with_closure(conjugate("LiuStorey")), "as ConjugateDescent"),
    "McCormick": (with_closure(dense("McCormick")), "H instead of its transpose multiplies the gradient"),
    "Pearson": (with_closure(dense("Pearson")), "as McCormick"),
    "PowModules": (lambda library: library.PowModules([ema(library), library.Abs()], 3.0), "it divides"),
    "Previous": (of("Previous", 2), "the updates that it remembers are changed by the modules behind it"),
    "SAM": (with_closure(of("SAM")), "as ASAM (arXiv:2010.01412, eq. 2)"),
    "SOAP": (
        lambda library: library.SOAP(**({"merge_small": False} if library is m else {})),
        "the first step moves, and is counted in the correction for starting at zero",
    ),
    "SignConsistencyMask": (of("SignConsistencyMask"), "the first step is lost: zero counts as another sign"),
}
OTHER_NUMBERS = "draws other random numbers; tested against the distribution"
OTHER_INTERFACE = "takes other arguments"
BROKEN = "cannot be made or run there"
NOT_COMPARED = {
    "CubicRegularization": OTHER_INTERFACE,
    "CustomUnaryOperation": BROKEN,
    "DirectWeightDecay": "decays before or after the closure; equal without one, see WeightDecay",
    "Dropout": BROKEN,
    "DualNormCorrection": BROKEN,
    "FillLoss": BROKEN,
    "GaussNewton": OTHER_INTERFACE,
    "GradToNone": BROKEN,
    "GradientAccumulation": OTHER_INTERFACE,
    "LevenbergMarquardt": OTHER_INTERFACE,
    "MatrixMomentum": "another algorithm there, with a learning rate of its own",
    "MeZO": OTHER_NUMBERS,
    "MulByLoss": BROKEN,
    "MuonAdjustLR": BROKEN,
    "NegateOnLossIncrease": "evaluates the loss at other points there",
    "PrintShape": "prints",
    "PrintUpdate": "prints",
    "RandomStepSize": OTHER_NUMBERS,
    "RandomizedFDM": OTHER_NUMBERS,
    "SPSA": OTHER_NUMBERS,
    "SSVM": "another factor in front of what is learned; ours is compared with the paper's formulas",
    "StrongWolfe": "another point that satisfies the conditions",
    "WeightDropout": BROKEN,
    "WeightedMean": BROKEN,
    "WeightedSum": BROKEN,
}


def make_params():
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in SHAPES]


def run(library, entry):
    """Where the parameters are after some steps."""
    chain, has_closure = entry if isinstance(entry, tuple) else (entry, False)
    params = make_params()
    made = chain(library)
    modules = made if isinstance(made, list) else [made]
    kind = Modular if library is m else tz.Optimizer
    optimizer = kind(params, *modules, library.LR(RATE))
    generator = torch.Generator().manual_seed(2)
    torch.manual_seed(0)

    def closure(backward=True):
        loss = sum(((p - 0.3) ** 2).sum() * (1 + i) + 0.1 * (p**4).sum() for i, p in enumerate(params)) + 1
        if backward:
            for p in params:
                p.grad = None
            loss.backward()
        return loss

    for _ in range(NUM_STEPS):
        if has_closure:
            optimizer.step(closure)
        else:
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in params])


def difference(entry):
    with contextlib.redirect_stdout(io.StringIO()):
        ours, theirs = run(m, entry), run(tz.m, entry)
    assert ours.isfinite().all()
    return float((ours - theirs).abs().max())


def test_tables_name_every_module_that_both_have():
    shared = {name for name in PUBLIC if hasattr(tz.m, name)}
    tables = [set(EQUAL), set(DIFFERENT), set(NOT_COMPARED)]
    assert set().union(*tables) - {"CopyMagnitude"} == shared - {"CopyMagnitude"}
    assert sum(map(len, tables)) == len(set().union(*tables))


@pytest.mark.parametrize("name", EQUAL)
@pytest.mark.filterwarnings("ignore:multiple learning rate modules")
def test_equal(name):
    assert difference(EQUAL[name]) < 1e-9


@pytest.mark.parametrize("name", DIFFERENT)
def test_different(name):
    entry, reason = DIFFERENT[name]
    assert difference(entry) > 1e-4, reason
