"""Modules that average squares of per-sample gradients: `graphopt.annotations.SUM_GRAD_SQUARED`."""
