"""Optimizers of other libraries with the interface of `torch.optim`. The libraries are imported when one of them makes a step."""

from graphopt.optim.wrappers.ask_tell import AskTellOptimizer as AskTellOptimizer
from graphopt.optim.wrappers.nevergrad import NevergradOptimizer as NevergradOptimizer
from graphopt.optim.wrappers.nlopt import NLOptOptimizer as NLOptOptimizer
from graphopt.optim.wrappers.scipy import ScipyDE as ScipyDE
from graphopt.optim.wrappers.scipy import ScipyDualAnnealing as ScipyDualAnnealing
from graphopt.optim.wrappers.scipy import ScipyMinimize as ScipyMinimize
from graphopt.optim.wrappers.scipy import ScipyRootOptimization as ScipyRootOptimization
from graphopt.optim.wrappers.split import SplitOptimizers as SplitOptimizers
