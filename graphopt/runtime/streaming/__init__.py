"""Train a model layer by layer: weights, gradients and optimizer state live in a store, one layer at a time on the device."""
