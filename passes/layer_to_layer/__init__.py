"""The pass that marks the boundaries between layers, and what it needs to find them."""

from graphopt.passes.layer_to_layer.layer_to_layer import LayerToLayer as LayerToLayer
