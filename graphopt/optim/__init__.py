"""Optimizers that read what the passes leave on the parameters."""

from graphopt.optim.clip_grad import clip_grad_norm_ as clip_grad_norm_
from graphopt.optim.tgadamw import TGAdamW as TGAdamW
