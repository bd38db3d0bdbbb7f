"""Parameters that are used outside any captured graph: no pass has served them, and nobody has loaded their values."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from graphopt.annotations import SUM_GRAD_SQUARED
from graphopt.errors import UncapturedParameter, UnsupportedError
from graphopt.runtime.statistics import Statistic

if TYPE_CHECKING:
    from graphopt.transform import Setup

records_of: WeakIdKeyDictionary = WeakIdKeyDictionary()  # parameter -> records of the graphs that use it


def refuse_uncaptured(model: nn.Module, outputs: Any, setup: Setup) -> None:
    """Raise `UnsupportedError` for parameters that the outputs depend on, that no graph knows, and that must be served."""
    missing = {
        id(param): name
        for name, param in _uncaptured(model, setup)
        if setup.must_serve(name, cast(nn.Parameter, param))  # what may be skipped is only warned about
    }
    reached = leaves_of(outputs) if missing else set()
    if names := [name for key, name in missing.items() if key in reached]:
        raise UnsupportedError(
            f"{', '.join(names[:10])}{', ...' if len(names) > 10 else ''} of {type(model).__name__} would have gradients but no "
            f"statistics: {'they are' if len(names) > 1 else 'it is'} used outside any captured graph, where packed sequences, "
            "functions under torch.compiler.disable and code behind some graph breaks run (TORCH_LOGS=graph_breaks shows which). "
            "Pad sequences instead of packing them, or remove the break. To train without these statistics, use "
            "TrueGrad(unsupported='skip'), or leave the parameters out with TrueGrad(where=...)"
        )


def leaves_of(outputs: Any) -> set[int]:
    """Identities of the tensors that a backward pass from these would give gradients to."""
    waiting = [value.grad_fn for value in pytree.tree_leaves(outputs) if isinstance(value, Tensor)]
    seen, found = set(), set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:  # AccumulateGrad
            found.add(id(leaf))
        waiting += [parent for parent, _ in node.next_functions]
    return found


def _uncaptured(model: nn.Module, setup: Setup) -> Iterator[tuple[str, Tensor]]:
    """Trainable parameters that statistics are asked for, and that no graph has as an input."""
    passes = [item for item in setup.passes if SUM_GRAD_SQUARED in item.provides]
    for name, param in model.named_parameters():
        known = param in records_of or Statistic.name_in_graph(param) is not None
        if param.requires_grad and param.is_leaf and not known and any(item.selects(name, param) for item in passes):
            yield name, param


def watch_uncaptured(model: nn.Module, setup: Setup) -> None:
    """Warn when a parameter that no graph knows gets a gradient after all."""
    handles: list[Any] = []

    def warn(param: Tensor, name: str) -> None:
        for handle in handles:
            handle.remove()
        if Statistic.name_in_graph(param) is None:
            warnings.warn(
                f"{name} of {type(model).__name__} has a gradient but no statistics: it was used outside any captured graph, as "
                "functions under torch.compiler.disable, packed sequences and code behind some graph breaks are (TORCH_LOGS="
                "graph_breaks). graphopt.Report.of(model) lists all such parameters",
                UncapturedParameter,
                stacklevel=2,
            )

    for name, param in _uncaptured(model, setup):
        handles.append(param.register_post_accumulate_grad_hook(functools.partial(warn, name=name)))
