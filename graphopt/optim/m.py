"""All optimizer modules, by name: ``from graphopt.optim import m``, then ``m.Adam()``."""

from graphopt.optim.adaptive.adam import Adam as Adam
from graphopt.optim.decay.weight_decay import WeightDecay as WeightDecay
from graphopt.optim.momentum.heavy_ball import HeavyBall as HeavyBall
from graphopt.optim.momentum.nag import NAG as NAG
from graphopt.optim.stabilization.clip_value import ClipValue as ClipValue
from graphopt.optim.stabilization.normalize_by_ema import NormalizeByEMA as NormalizeByEMA
from graphopt.optim.step_size.lr import LR as LR
from graphopt.optim.truegrad.adam import TrueGradAdam as TrueGradAdam
from graphopt.optim.truegrad.laprop import TrueGradLaProp as TrueGradLaProp
from graphopt.optim.truegrad.rmsprop import TrueGradRMSprop as TrueGradRMSprop
from graphopt.optim.truegrad.shampoo import TrueGradShampoo as TrueGradShampoo
