"""graphopt: a compiler for training PyTorch models.

model = graphopt.transform(model)        # or torch.compile(model, backend="graphopt")
"""

from graphopt import _compat as _compat  # first: it checks the torch version
from graphopt import annotations as annotations
from graphopt import nn as nn
from graphopt import optim as optim
from graphopt import passes as passes
from graphopt.errors import GraphoptError as GraphoptError
from graphopt.initialization.grad_init_wrapper import GradInitWrapper as GradInitWrapper
from graphopt.initialization.learn_init import learn_init as learn_init
from graphopt.inspect.report import Report as Report
from graphopt.inspect.report import explain as explain
from graphopt.nn.patching import patch_model as patch_model
from graphopt.nn.patching import patch_torch as patch_torch
from graphopt.runtime.layer_modules import layers as layers
from graphopt.runtime.pipeline_stages import pipeline_stage as pipeline_stage
from graphopt.runtime.streaming.filling import fill_store as fill_store
from graphopt.runtime.streaming.layer2layer import Layer2Layer as Layer2Layer
from graphopt.transform import records as records
from graphopt.transform import restore as restore
from graphopt.transform import stream as stream
from graphopt.transform import transform as transform
