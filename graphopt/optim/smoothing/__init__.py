"""Modules that smooth the gradient or the loss."""
