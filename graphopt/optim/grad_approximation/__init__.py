"""Gradients from values of the loss."""
