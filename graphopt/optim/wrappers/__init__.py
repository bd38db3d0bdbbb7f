"""Optimizers of other libraries with the interface of `torch.optim`."""
