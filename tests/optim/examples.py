"""One chain for every public module: how it is called where its defaults do not suffice, and on what it runs."""

import inspect

import torch

from graphopt.errors import OptionError
from graphopt.optim import Module, m

_ALL = {
    name: kind
    for name, kind in vars(m).items()
    if inspect.isclass(kind) and issubclass(kind, Module) and name[0] != "_"
}
PUBLIC = {name: kind for name, kind in _ALL.items() if kind.__name__ == name}
ALIASES = {name: kind for name, kind in _ALL.items() if kind.__name__ != name}


def is_matrix(p):
    return p.dim() >= 2


# Of modules that need arguments, and of those whose options change what is computed.
EXAMPLES = {
    "Add": lambda: m.Add(0.5),
    "Adagrad": lambda: m.Adagrad(0.1, 0.5, pow=3.0),
    "Alternate": lambda: m.Alternate(m.HeavyBall(), [m.Adam()]),
    "Averaging": lambda: m.Averaging(2),
    "BlockPartition": lambda: m.BlockPartition(m.Adam(), 2),
    "Clip": lambda: m.Clip(-0.5, 0.3),
    "ClipModules": lambda: m.ClipModules(m.HeavyBall(), -0.5, [m.Ones(), m.Mul(0.3)]),
    "ClipNorm": lambda: m.ClipNorm(0.5),
    "CopySign": lambda: m.CopySign(m.HeavyBall()),
    "CustomUnaryOperation": lambda: m.CustomUnaryOperation("tanh"),
    "DCTProjection": lambda: m.DCTProjection(m.Adam(), 2),
    "Div": lambda: m.Div(2.0),
    "DivModules": lambda: m.DivModules(m.EMA(0.9), [m.SqrtEMASquared(0.99), m.Add(1e-8)]),
    "Dropout": lambda: m.Dropout(0.3, graft=True),
    "FFTProjection": lambda: m.FFTProjection(m.Adam()),
    "Fill": lambda: m.Fill(0.1),
    "Freeze": lambda: m.Freeze(is_matrix),
    "GaLore": lambda: m.GaLore(m.Adam(), 1, 2),
    "GaussianHomotopy": lambda: m.GaussianHomotopy(3, 0.5, tol=0.02),
    "GradientAccumulation": lambda: m.GradientAccumulation(m.Adam(), 2),
    "Graft": lambda: m.Graft(m.Adam()),
    "GraftModules": lambda: m.GraftModules(m.HeavyBall(), m.Adam()),
    "GraftToUpdate": lambda: m.GraftToUpdate(m.Adam()),
    "GramSchimdt": lambda: m.GramSchimdt(m.HeavyBall()),
    "HigherOrderNewton": lambda: m.HigherOrderNewton(order=2),
    "GridLineSearch": lambda: m.GridLineSearch(0.0, 1.0, 4),
    "IntermoduleCautious": lambda: m.IntermoduleCautious(m.HeavyBall(), m.Adam()),
    "Lerp": lambda: m.Lerp(m.HeavyBall(), 0.3),
    "LerpModules": lambda: m.LerpModules(m.HeavyBall(), m.Adam(), 0.3),
    "Masked": lambda: m.Masked(is_matrix, m.Adam()),
    "Maximum": lambda: m.Maximum(m.HeavyBall()),
    "MaximumModules": lambda: m.MaximumModules(m.HeavyBall(), m.Adam()),
    "Mean": lambda: m.Mean(m.HeavyBall(), m.Adam()),
    "Median": lambda: m.Median(m.HeavyBall(), m.Adam(), m.Sign()),
    "MedianAveraging": lambda: m.MedianAveraging(3),
    "Minimum": lambda: m.Minimum(m.HeavyBall()),
    "MinimumModules": lambda: m.MinimumModules(m.HeavyBall(), m.Adam()),
    "MirroredClip": lambda: m.MirroredClip(0.3),
    "Mul": lambda: m.Mul(m.Adam()),
    "Multistep": lambda: m.Multistep([m.Adam(), m.LR(0.1)], 2),
    "NystromPCG": lambda: m.NystromPCG(3),
    "NystromSketchAndSolve": lambda: m.NystromSketchAndSolve(3, reg=1.0),
    "Pow": lambda: m.Pow(2.0),
    "PowModules": lambda: m.PowModules([m.HeavyBall(), m.Abs()], 2.0),
    "Previous": lambda: m.Previous(2),
    "PrintShape": lambda: m.PrintShape(print_fn=len),
    "PrintUpdate": lambda: m.PrintUpdate(print_fn=len),
    "Prod": lambda: m.Prod(m.HeavyBall(), m.Adam()),
    "RandomSample": lambda: m.RandomSample(0.5, seed=1),
    "RCopySign": lambda: m.RCopySign(m.HeavyBall()),
    "RDiv": lambda: m.RDiv(m.HeavyBall()),
    "Rescale": lambda: m.Rescale(-0.5, 0.5),
    "RMSprop": lambda: m.RMSprop(centered=True, amsgrad=True, init="update", inner=m.HeavyBall()),
    "RandomStepSize": lambda: m.RandomStepSize(seed=0),
    "RPow": lambda: m.RPow(2.0),
    "RSub": lambda: m.RSub(m.HeavyBall()),
    "ScaleModulesByCosineSimilarity": lambda: m.ScaleModulesByCosineSimilarity(m.HeavyBall(), m.Adam()),
    "Sqrt": lambda: [m.Abs(), m.Sqrt()],
    "Sequential": lambda: m.Sequential(m.LR(0.01), [m.Adam(), m.LR(0.1)]),
    "Split": lambda: m.Split(is_matrix, m.Adam(), m.HeavyBall()),
    "Sub": lambda: m.Sub(m.HeavyBall()),
    "SubModules": lambda: m.SubModules(m.HeavyBall(), m.Adam()),
    "Sum": lambda: m.Sum(m.HeavyBall(), m.Adam()),
    "Switch": lambda: m.Switch(m.HeavyBall(), m.Adam(), steps=[2]),
    "TensorizeProjection": lambda: m.TensorizeProjection(m.Adam(), 3),
    "TensorNormsProjection": lambda: m.TensorNormsProjection(m.Adam()),
    "Threshold": lambda: m.Threshold(-0.1, m.HeavyBall(), True),
    "UnaryLambda": lambda: m.UnaryLambda(lambda updates: [u.tanh() for u in updates]),
    "UnaryParameterwiseLambda": lambda: m.UnaryParameterwiseLambda(torch.tanh),
    "Uniform": lambda: m.Uniform(-0.5, 0.5),
    "VectorProjection": lambda: m.VectorProjection(m.Adam()),
    "WeightedAveraging": lambda: m.WeightedAveraging([0.5, 0.3, 0.2]),
    "WeightedMean": lambda: m.WeightedMean(m.HeavyBall(), m.Adam(), weights=[0.3, 0.7]),
    "WeightedSum": lambda: m.WeightedSum(m.HeavyBall(), m.Adam(), weights=[0.3, 0.7]),
    "Where": lambda: m.Where([m.Sign(), m.Maximum(0.0)], m.HeavyBall(), m.Adam()),
    "Wrap": lambda: m.Wrap(torch.optim.Adam, lr=0.1, weight_decay=0.1),
}
RESIDUALS = {"GaussNewton", "LevenbergMarquardt"}  # their closures return residuals instead of the loss
MATRICES_ONLY = {"Muon"}


def _makes_itself(kind):
    try:
        kind()
    except (TypeError, OptionError):
        return False
    return True


# New ones that need arguments must be entered above.
WITHOUT_EXAMPLE = [name for name, kind in PUBLIC.items() if name not in EXAMPLES and not _makes_itself(kind)]
NAMES = sorted(set(PUBLIC) - set(WITHOUT_EXAMPLE))


def make(name):
    """The module of a name, behind others that it needs."""
    made = EXAMPLES.get(name, PUBLIC[name])()
    return made if isinstance(made, list) else [made]


def residuals_of(params):
    """For the closures of `RESIDUALS`; not linear."""
    return torch.cat([((p - 0.3) * (1.0 + i) + torch.sin(p)).reshape(-1) for i, p in enumerate(params)])


def with_rate(modules, rate):
    """A chain that ends with a learning rate: one of its own, or `LR`."""
    return modules if modules[-1].must_be_last else [*modules, m.LR(rate)]
