"""Optimizers that read what the passes leave on the parameters, and optimizers that wrap others."""

from graphopt.optim import functional as functional
from graphopt.optim import m as m
from graphopt.optim import wrappers as wrappers
from graphopt.optim.clip_grad import clip_grad_norm_ as clip_grad_norm_
from graphopt.optim.conjugate_gradient.conjugate_gradient_base import ConjugateGradientBase as ConjugateGradientBase
from graphopt.optim.core.in_backward import fuse_into_backward as fuse_into_backward
from graphopt.optim.core.modular import Modular as Modular
from graphopt.optim.core.module import Module as Module
from graphopt.optim.core.module import Rule as Rule
from graphopt.optim.core.var import Var as Var
from graphopt.optim.grad_approximation.grad_approximator import GradApproximator as GradApproximator
from graphopt.optim.graft import Graft as Graft
from graphopt.optim.line_search.line_search import LineSearch as LineSearch
from graphopt.optim.optimizer_optimizer import OptimizerOptimizer as OptimizerOptimizer
from graphopt.optim.projections.projection import Projection as Projection
from graphopt.optim.quasi_newton.quasi_newton_h import QuasiNewtonH as QuasiNewtonH
from graphopt.optim.sign import Sign as Sign
from graphopt.optim.tgadamw import TGAdamW as TGAdamW
from graphopt.optim.tglaprop import TGLaProp as TGLaProp
from graphopt.optim.tgrmsprop import TGRMSProp as TGRMSProp
from graphopt.optim.weight_decay import L1WeightDecay as L1WeightDecay
from graphopt.optim.weight_decay import L2WeightDecay as L2WeightDecay
from graphopt.optim.weight_decay import LpWeightDecay as LpWeightDecay
from graphopt.optim.weight_decay import WeightDecay as WeightDecay
from graphopt.optim.weight_decay import WeightDecayChain as WeightDecayChain
from graphopt.optim.weight_decay import WeightDecayToEMA as WeightDecayToEMA
from graphopt.optim.weight_decay import WeightDecayToInit as WeightDecayToInit

# What torchzero calls them: the seed's version, and 0.4.
ConguateGradientBase = ConjugateGradientBase
HessianUpdateStrategy = QuasiNewtonH
LineSearchBase = LineSearch
Objective = Var
Optimizer = Modular
ProjectionBase = Projection
