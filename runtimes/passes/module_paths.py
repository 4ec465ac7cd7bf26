"""The module of the generator that an fx node comes from: the one name that reports, plans and bisection use."""

from __future__ import annotations

import re

from torch.fx import Node

OUTERMOST = "(outermost)"
# How torch.export begins the path of a module, and the modules that wire a component.
_PREFIX = re.compile(r"^(L\['self'\]\.?)?(module\.|module$)?")


def module_path(node: Node) -> str:
    """Returns the dotted path of the module that a node was traced in.

    What stands between modules has none of its own: it gets that of what it was computed from, or else of what reads
    it, so that a place in PyTorch is always named and never a node of a traced graph.
    """
    return traced_in(node) or _nearest(node, "all_input_nodes") or _nearest(node, "users") or OUTERMOST


def traced_in(node: Node) -> str:
    """Returns the dotted path of the module that a node was traced in, '' for the outermost."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = _PREFIX.sub("", str(stack[-1][0])) if stack else ""
    return path or _of_constants(node)


def path_of_parameter(name: str, reader: Node) -> str:
    """Returns the path of the module that holds a constant: of what reads it."""
    return _nearest(reader, "users") or name


def _of_constants(node: Node) -> str:
    """Returns the module of a parameter or buffer that a node reads or is, '' if it reads none with a path."""
    targets = [str(n.target) for n in (node, *node.all_input_nodes) if n.op == "get_attr" and "." in str(n.target)]
    paths = [_PREFIX.sub("", target.rpartition(".")[0]) for target in targets]
    return next(filter(None, paths), "")


def _nearest(node: Node, direction: str) -> str:
    """Returns the path of the nearest node in a direction that has one."""
    seen, at = {node}, [node]
    while at:
        following = [n for one in at for n in getattr(one, direction) if n not in seen]
        for found in following:
            if path := traced_in(found):
                return path
        seen.update(following)
        at = following
    return ""
