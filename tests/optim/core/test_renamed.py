"""Names of torchzero that mean the same here."""

import inspect

import pytest

from graphopt import optim
from graphopt.errors import OptionError
from graphopt.optim import m

KEYWORDS = [
    (m.EMA, {"debias": True}, {"debiased": True}),
    (m.RMSprop, {"debias": True}, {"debiased": True}),
    (m.Adam, {"debias": False}, {"debiased": False}),
    (m.NystromPCG, {"rank": 3}, {"sketch_size": 3}),
    (m.Newton, {"damping": 0.5}, {"reg": 0.5}),
    (m.PolyakStepSize, {"f_star": 0.5}, {"min_obj_value": 0.5}),
    (m.BFGS, {"restart_interval": 5, "ptol_restart": False}, {"reset_interval": 5, "tol_reset": False}),
    (m.DaiYuan, {"restart_interval": 5}, {"reset_interval": 5}),
]


@pytest.mark.parametrize(("kind", "theirs", "ours"), KEYWORDS)
def test_keywords(kind, theirs, ours):
    assert kind(**theirs).defaults == kind(**ours).defaults
    assert set(theirs).isdisjoint(inspect.signature(kind).parameters)
    with pytest.raises(OptionError, match="are the same"):
        kind(**theirs, **ours)


CLASSES = {
    "DYHS": "HybridHS_DY",
    "GradientSampling": "GaussianHomotopy",
    "GraftInputToOutput": "Graft",
    "GraftOutputToInput": "RGraft",
    "ICUM": "ColumnUpdatingMethod",
    "Medianveraging": "MedianAveraging",
}


@pytest.mark.parametrize("name", CLASSES)
def test_modules(name):
    assert getattr(m, name) is getattr(m, CLASSES[name])


def test_classes_of_the_core():
    assert optim.Optimizer is optim.Modular
    assert optim.Objective is optim.Var
    assert optim.HessianUpdateStrategy is optim.QuasiNewtonH
    assert optim.LineSearchBase is optim.LineSearch
    assert optim.ProjectionBase is optim.Projection


def test_hessian_products():
    assert m.NewtonCG(hvp_method="fd_forward").defaults["hvp_method"] == "fd_forward"
