"""Optimizers as pure functions: any chain of modules (`chain`), and those of optorch by config, state and step."""

from graphopt.optim.core.transform import ChainState as ChainState
from graphopt.optim.core.transform import Step as Step
from graphopt.optim.core.transform import Transform as Transform
from graphopt.optim.core.transform import apply_updates as apply_updates
from graphopt.optim.core.transform import chain as chain
from graphopt.optim.functional.configs import AdamConfig as AdamConfig
from graphopt.optim.functional.configs import LARSConfig as LARSConfig
from graphopt.optim.functional.configs import SGDConfig as SGDConfig
from graphopt.optim.functional.grad_scaler import GradScalerState as GradScalerState
from graphopt.optim.functional.grad_scaler import init_grad_scaler as init_grad_scaler
from graphopt.optim.functional.grad_scaler import keep_if as keep_if
from graphopt.optim.functional.grad_scaler import scale_loss as scale_loss
from graphopt.optim.functional.grad_scaler import unscale_grads as unscale_grads
from graphopt.optim.functional.grad_scaler import update_scale as update_scale
from graphopt.optim.functional.registry import DEFAULT_OPTIMIZER_CONFIGS as DEFAULT_OPTIMIZER_CONFIGS
from graphopt.optim.functional.registry import DEFAULT_OPTIMIZER_STATES as DEFAULT_OPTIMIZER_STATES
from graphopt.optim.functional.registry import OPTIMIZER_STEP as OPTIMIZER_STEP
from graphopt.optim.functional.registry import get_optimizer_step as get_optimizer_step
from graphopt.optim.functional.registry import init_optimizer_state as init_optimizer_state
from graphopt.optim.functional.registry import register_optimizer as register_optimizer
from graphopt.optim.functional.schedules import build_lr_scheduler as build_lr_scheduler
from graphopt.optim.functional.steps import adam_step as adam_step
from graphopt.optim.functional.steps import lars_step as lars_step
from graphopt.optim.functional.steps import sgd_step as sgd_step
