"""The pass `TrueGrad`: sums over samples of squared gradients, exactly, computed beside the gradient."""

from graphopt.passes.truegrad.truegrad import TrueGrad as TrueGrad
