"""A run of element-wise rules as a graph over one-dimensional tensors, and the numbers that it needs.

The graph is traced once for each kind of tensors, whatever their number and sizes:

    numbers (hyper-parameters, step count)  ->  prologue  ->  row      tensors of shape (), on the host, once a step
    row, elements (parameter, gradient, state ...)  ->  body  ->  what is written back

What depends on numbers alone (``1 - beta ** step``) is thereby computed once and not once for each element, and a change of
a hyper-parameter changes an input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from graphopt.optim.core.arithmetic import state_dtype
from graphopt.optim.core.bounds import is_number
from graphopt.optim.core.context import Context, Settings
from graphopt.optim.core.flat.tracing import FakeSizes
from graphopt.optim.core.module import Module, Rule

aten = torch.ops.aten

# Elements of the tensors that a graph is traced with: far above what Inductor reduces in another way.
NUM_SAMPLE_ELEMENTS = 2**20

PARAM, UPDATE, GRAD, OUT = "param", "update", "grad", "out"
STEP, NUMEL = "step", "numel"


class Kind(NamedTuple):
    """What a program is traced for.

    Attributes:
        rules: their `structure`.
        choices: their hyper-parameters, but for numbers.
        param_dtype: of the parameter.
        grad_dtype: of its gradient.
        device: of all tensors.
        writes_param: whether the update is subtracted from the parameter, or handed on.
        takes_grad: whether the incoming update is the gradient itself.
        maximize: whether the gradient is negated.
        annotations: name, and dtype where it is a tensor, of each annotation.
    """

    rules: tuple[Any, ...]
    choices: tuple[Any, ...]
    param_dtype: torch.dtype
    grad_dtype: torch.dtype
    device: torch.device
    writes_param: bool
    takes_grad: bool
    maximize: bool
    annotations: tuple[tuple[str, torch.dtype | None], ...]


@dataclass(frozen=True, eq=False)
class Program:
    """A traced run of rules.

    Attributes:
        numbers: names of the numbers, in the order of the prologue's inputs.
        elements: names of the one-dimensional tensors, in the order of the body's inputs after ``row``.
        targets: for each output of the body the element that it replaces.
        prologue: computes ``row`` (float64) of the numbers, tensors of shape ().
        body: computes the outputs of ``row`` and the elements.
        reduces: whether the body has reductions.
        dtypes: of the elements.
        scalars: for each element whether it has shape () rather than the tensor's: a number that is
            remembered, or the number of elements.
    """

    numbers: tuple[str, ...]
    elements: tuple[str, ...]
    targets: tuple[int, ...]
    prologue: GraphModule
    body: GraphModule
    reduces: bool
    dtypes: tuple[torch.dtype, ...]
    scalars: tuple[bool, ...]

    @property
    def scalar_names(self) -> set[str]:
        """The elements that have shape ()."""
        return {name for name, is_scalar in zip(self.elements, self.scalars, strict=True) if is_scalar}

    @property
    def keeps_apart(self) -> bool:
        """Whether the result for an element depends on which others are in its tensor."""
        return self.reduces or any(self.scalars)


class _Same(NamedTuple):
    """A value that equals itself alone, and is kept alive so that no other takes its place."""

    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return id(self.value)


def structure(rules: Sequence[Rule]) -> tuple[Any, ...]:
    """Which rules stand where in a run."""
    return tuple(
        (type(rule), tuple((name, structure(_rules_of(chain))) for name, chain in rule.children.items()))
        for rule in rules
    )


def read_settings(
    rules: Sequence[Rule], settings_of: Callable[[Rule], Settings]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The hyper-parameters of a run of rules.

    Returns:
        Those that are inputs of a program, in the order of its ``numbers``; and everything else on which the mathematics
        may depend, own attributes of the rules included, in a form that can be compared.
    """
    numbers: list[Any] = []
    choices: list[Any] = []
    for rule in every_rule(rules):
        for name, value in settings_of(rule).items():
            if is_dynamic(rule, name, value):
                numbers.append(value)
                choices.append(float)
            else:
                choices.append(_frozen(value))
        choices += [(name, _frozen(value)) for name, value in vars(rule).items() if name not in _OF_EVERY_RULE]
    return tuple(numbers), tuple(choices)


def is_dynamic(rule: Rule, name: str, value: Any) -> bool:
    """Whether a hyper-parameter is an input of the program rather than part of it."""
    return name in rule.bounds and is_number(value)


def trace(
    kind: Kind, rules: Sequence[Rule], settings_of: Callable[[Rule], Settings], path_of: Callable[[Rule], str]
) -> Program:
    """Trace a run of rules.

    Args:
        kind: what for.
        rules: element-wise rules.
        settings_of: a rule's hyper-parameters; of numbers only that they are numbers matters.
        path_of: a rule's name, for its state.
    """
    recipe = _Recipe(kind, rules, settings_of, path_of)
    graph_module, elements = recipe.trace()
    return _split(graph_module, recipe, elements)


class _Recipe:
    """The function that is traced, and the names of its inputs and outputs."""

    def __init__(
        self,
        kind: Kind,
        rules: Sequence[Rule],
        settings_of: Callable[[Rule], Settings],
        path_of: Callable[[Rule], str],
    ) -> None:
        self.kind, self.rules, self.path_of = kind, rules, path_of
        self.settings = {path_of(rule): settings_of(rule) for rule in every_rule(rules)}
        self.numbers = [STEP]
        for rule in every_rule(rules):
            path = path_of(rule)
            self.numbers += [f"{path}.{n}" for n, v in self.settings[path].items() if is_dynamic(rule, n, v)]
        self.numbers += [name for name, dtype in kind.annotations if dtype is None]
        self.targets: list[str] = []

    def trace(self) -> tuple[GraphModule, list[str]]:
        kind, fakes = self.kind, FakeSizes(NUM_SAMPLE_ELEMENTS)
        (size,) = fakes.sizes
        with fakes.active():
            samples: dict[str, Tensor] = {
                PARAM: torch.empty(size, dtype=kind.param_dtype, device=kind.device),
                GRAD: torch.empty(size, dtype=kind.grad_dtype, device=kind.device),
            }
            wide = state_dtype(samples[PARAM])
            if not kind.takes_grad:
                samples[UPDATE] = torch.empty(size, dtype=wide, device=kind.device)
            for name, dtype in kind.annotations:
                if dtype is not None:
                    samples[name] = torch.empty(size, dtype=dtype, device=kind.device)
            for rule in every_rule(self.rules):
                settings = self.settings[self.path_of(rule)]
                fields = getattr(rule.state_type(settings), "_fields", ())
                for name, tensor in zip(fields, rule.init(samples[PARAM], settings) if fields else (), strict=True):
                    samples[f"{self.path_of(rule)}.{name}"] = tensor
            if not kind.writes_param:
                samples[OUT] = torch.empty(size, dtype=wide, device=kind.device)
            samples[NUMEL] = torch.empty((), dtype=torch.float64, device=kind.device)
            numbers = [torch.zeros((), dtype=torch.float64) for _ in self.numbers]
        names = list(samples)

        def function(*inputs: Tensor) -> list[Tensor]:
            numbers = dict(zip(self.numbers, inputs, strict=False))
            return self._run(numbers, dict(zip(names, inputs[len(self.numbers) :], strict=True)))

        return fakes.graph(function, [*numbers, *samples.values()]), names

    def _run(self, numbers: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> list[Tensor]:
        kind = self.kind
        param = tensors[PARAM]
        wide = state_dtype(param)
        grad = tensors[GRAD].to(wide)
        if kind.maximize:
            grad = -grad
        update = grad if kind.takes_grad else tensors[UPDATE]
        wide_param = param.to(wide)
        news: dict[str, Tensor] = {}

        def run(rules: Sequence[Rule], update: Tensor) -> Tensor:
            for rule in rules:
                path = self.path_of(rule)
                settings = Settings({n: numbers.get(f"{path}.{n}", v) for n, v in self.settings[path].items()})
                operands = {name: run(_rules_of(chain), update) for name, chain in rule.children.items()}
                context = Context(
                    param=wide_param,
                    grad=grad,
                    count=numbers[STEP],
                    numel=tensors[NUMEL],
                    operands=operands,
                    annotations={name: tensors.get(name, numbers.get(name)) for name, _ in kind.annotations},
                )
                state_type: Any = rule.state_type(self.settings[path])
                state = () if state_type is None else state_type(*[tensors[f"{path}.{n}"] for n in state_type._fields])
                update, state = rule.update(update, state, settings, context)
                for name, new in zip(getattr(state, "_fields", ()), state, strict=True):
                    news[f"{path}.{name}"] = new
            return update

        update = run(self.rules, update)
        if kind.writes_param:
            news[PARAM] = (wide_param - update).to(kind.param_dtype)
        else:
            news[OUT] = update.clone() if update is grad else update
        self.targets = [name for name, new in news.items() if new is not tensors.get(name)]
        return [news[name] for name in self.targets]


def every_rule(rules: Sequence[Rule]) -> list[Rule]:
    """Rules and their children, parents first."""
    found: list[Rule] = []
    for rule in rules:
        found.append(rule)
        for chain in rule.children.values():
            found += every_rule(_rules_of(chain))
    return found


def _rules_of(chain: Sequence[Module]) -> list[Rule]:
    return [module for module in chain if isinstance(module, Rule)]


_OF_EVERY_RULE = frozenset(vars(Rule()))


def _frozen(value: Any) -> Any:
    """A value in a form that can be compared and hashed, and does not change when the value does."""
    if isinstance(value, (list, tuple)):
        return (type(value), *map(_frozen, value))
    if isinstance(value, (dict, set, frozenset)):
        items = value.items() if isinstance(value, dict) else value
        return (type(value), frozenset(map(_frozen, items)))
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return value
    return _Same(value)


def _split(graph_module: GraphModule, recipe: _Recipe, names: Sequence[str]) -> Program:
    """Cut the traced graph into prologue and body."""
    graph = graph_module.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    num_numbers = len(recipe.numbers)
    numbers, elements = placeholders[:num_numbers], placeholders[num_numbers:]
    output = next(node for node in graph.nodes if node.op == "output")
    scalar: set[Node] = set(numbers)
    for node in graph.nodes:
        if node.op in ("call_function", "get_attr"):
            value = node.meta.get("val")
            if all(item in scalar for item in node.all_input_nodes) and isinstance(value, Tensor) and value.dim() == 0:
                scalar.add(node)
    derived = [node for node in graph.nodes if node in scalar and any(user not in scalar for user in node.users)]
    prologue, body = Graph(graph_module), Graph(graph_module)

    copies: dict[Node, Any] = {}
    for node in numbers:
        copies[node] = prologue.placeholder(node.name)
    for node in graph.nodes:
        if node in scalar and node not in copies:
            copies[node] = prologue.node_copy(node, lambda item: copies[item])
    wide = [prologue.call_method("to", (copies[node], torch.float64)) for node in derived]
    prologue.output(prologue.call_function(torch.stack, (wide,)) if wide else None)

    copies = {}
    row = body.placeholder("row")
    used = [index for index, node in enumerate(elements) if node.users or names[index] in recipe.targets]
    for index in used:
        copies[elements[index]] = body.node_copy(elements[index])
    for index, node in enumerate(derived):
        entry = body.call_function(aten.select.int, (row, 0, index))
        dtype = node.meta["val"].dtype
        if dtype != torch.float64:
            entry = body.call_function(aten._to_copy.default, (entry,), {"dtype": dtype})
        copies[node] = entry
    for node in graph.nodes:
        if node not in scalar and node not in copies and node.op in ("call_function", "get_attr"):
            copies[node] = body.node_copy(node, lambda item: copies[item])
    results: Any = output.args[0]
    body.output([copies[node] if isinstance(node, Node) else node for node in results])
    kept = [names[index] for index in used]
    return Program(
        numbers=tuple(recipe.numbers),
        elements=tuple(kept),
        targets=tuple(kept.index(name) for name in recipe.targets),
        prologue=GraphModule(graph_module, prologue),
        body=GraphModule(graph_module, body),
        reduces=any(_is_reduction(node) for node in body.nodes),
        dtypes=tuple(elements[index].meta["val"].dtype for index in used),
        scalars=tuple(elements[index].meta["val"].dim() == 0 for index in used),
    )


REDUCTIONS = (aten.sum.default, aten.amax.default, aten.amin.default)


def _is_reduction(node: Node) -> bool:
    return node.op == "call_function" and node.target in REDUCTIONS
