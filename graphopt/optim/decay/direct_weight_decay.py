"""Weight decay of the parameters themselves."""

from __future__ import annotations

import torch

from graphopt.errors import UnsupportedError
from graphopt.optim.core.bounds import NON_NEGATIVE, numbers
from graphopt.optim.core.context import Number
from graphopt.optim.core.module import Module
from graphopt.optim.core.var import Var
from graphopt.optim.decay.weight_decay import pull


class DirectWeightDecay(Module):
    """Subtract ``weight_decay`` times the derivative of ``|θ|^ord / ord`` from the parameters at once, beside the update.

    The step is that of `WeightDecay` behind `LR`, wherever it stands in the chain: what is behind it does not change the
    decay. Put it last if there are modules that evaluate the closure, which would otherwise see parameters that have decayed
    already.

    Args:
        weight_decay: the factor.
        ord: order of the norm; 1, 2 or any larger number.

    Raises:
        OptionError: the factor is negative.
        UnsupportedError: in a pure function (`graphopt.optim.core.transform.chain`), which must not write to parameters.

    Reference: Loshchilov, Hutter, "Decoupled Weight Decay Regularization", arXiv:1711.05101, 2017, algorithm 2, without the
    schedule multiplier.
    """

    bounds = numbers(weight_decay=NON_NEGATIVE)
    treats_each_alone = True

    def __init__(self, weight_decay: Number = 1e-2, ord: int = 2) -> None:
        super().__init__({"weight_decay": weight_decay, "ord": ord})

    def step(self, var: Var) -> Var:
        """Decay."""
        if self.binding is not None and self.binding.groups is None:
            raise UnsupportedError(
                f"{self.place}: it writes to the parameters, which a pure function must not; nothing was changed. Write "
                "WeightDecay behind LR, which makes the same step"
            )
        var.get_update()  # of the parameters as they are
        for param in var.params:
            settings = self.get_settings(param)
            wide = torch.promote_types(param.dtype, torch.float32)
            before = param.to(wide, copy=True)  # (autograd may keep it, and then it must stay as it is)
            param.copy_(before - pull(before, settings.ord) * settings.weight_decay)
        return var
