"""Where a node of a graph comes from, in the user's words: operator, module path, source line."""

import re
from pathlib import Path

from torch.fx import Node

_PACKAGE = str(Path(__file__).parents[1])


def describe(node: Node) -> str:
    """One line, such as ``aten.add.Tensor in transformer.h.0 (model.py:41: return x + self.bias)``."""
    parts = [operator_name(node)]
    if path := module_path(node):
        parts.append(f"in {path}")
    if line := source_line(node):
        parts.append(f"({line})")
    return " ".join(parts)


def operator_name(node: Node) -> str:
    """The operator with namespace and overload, or the node's own name for inputs."""
    return str(node.target) if node.op == "call_function" else node.name


def module_path(node: Node) -> str:
    """Qualified name of the innermost module whose forward made the node, without Dynamo's decoration."""
    stack = node.meta.get("nn_module_stack") or {}
    return next((plain_name(path) for path, _ in reversed(list(stack.values()))), "")


def source_line(node: Node) -> str:
    """``file:line: code`` of the user's innermost frame; nothing for what only modules of torch do."""
    found = re.findall(r'File "([^"]+)", line (\d+), in \S+\n\s*(.*)', node.stack_trace or "")
    frames = [frame for frame in found if not frame[0].startswith(_PACKAGE)]
    return f"{frames[-1][0]}:{frames[-1][1]}: {frames[-1][2].strip()}" if frames else ""


def plain_name(source: str) -> str:
    """Turn Dynamo's ``L['self']._modules['a']._parameters['weight']`` into ``a.weight``."""
    source = re.sub(r"\._(?:modules|parameters|buffers)\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", source)
    source = re.sub(r"\[['\"]?([^\]'\"]+)['\"]?\]", r".\1", source)
    source = re.sub(r"^(?:L|G)\.", "", source).replace("slice_None, None, None_", "")
    return re.sub(r"^(?:self|module|model|fn)\.", "", source) if "." in source else source
