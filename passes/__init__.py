"""The rewriting passes. This folder installs as ``graphopt.passes``."""

if __name__ != "graphopt.passes":
    raise ImportError("import graphopt.passes, not passes: a second copy would register every rule twice")

from graphopt.passes.gradinit import GradInit as GradInit
from graphopt.passes.layer_to_layer import LayerToLayer as LayerToLayer
from graphopt.passes.truegrad import TrueGrad as TrueGrad
