"""Small wrong changes to Python source: comparisons, arithmetic, constants, axes, negations, side names.

Each mutant is the source with one node changed. Docstrings, annotations, error texts and ``__all__`` are left alone:
they do not change what is computed.
"""

from __future__ import annotations

import ast
import collections
import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Mutant", "mutants"]

_COMPARE = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
}
_WORDS = {"columns": "rows", "rows": "columns", "max": "min", "min": "max"}
_NAMES = {"max": "min", "min": "max", "any": "all", "all": "any", "exp": "expm1", "ones_like": "zeros_like"}


@dataclass(frozen=True)
class Mutant:
    """One change: its line and enclosing function, what it is, and the whole changed source.

    ``identity`` stays the same while the enclosing function does, wherever it moves.
    """

    line: int
    where: str
    kind: str
    before: str
    after: str
    identity: str
    source: str = field(repr=False)


def mutants(source: str) -> Iterator[Mutant]:
    """Yield every mutant of a module's source, in order of lines."""
    tree = ast.parse(source)
    sites = [node for node in _live(tree) if not isinstance(node, ast.expr_context)]
    seen: collections.Counter[tuple[str, ...]] = collections.Counter()
    for position, node in enumerate(sites):
        for kind, change in _changes(node):
            changed_tree = copy.deepcopy(tree)
            target = [n for n in _live(changed_tree) if not isinstance(n, ast.expr_context)][position]
            before = ast.unparse(node)
            after_node = change(target)
            if ast.unparse(after_node) == before:  # two equal things exchanged
                continue
            _replace(changed_tree, target, after_node)
            ast.fix_missing_locations(changed_tree)
            text = ast.unparse(changed_tree)
            line = getattr(node, "lineno", 0)
            where, holder = _enclosing(tree, line)
            change = (where, kind, _short(before), _short(ast.unparse(after_node)))
            seen[change] += 1
            digest = hashlib.sha1(f"{change} {seen[change]} {holder}".encode(), usedforsecurity=False).hexdigest()[:16]
            yield Mutant(line, *change, digest, text)


def _enclosing(tree: ast.AST, line: int) -> tuple[str, str]:
    """Return name and text of the innermost function or class that holds a line, or ``"module"`` and nothing."""
    holders = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.lineno <= line <= (node.end_lineno or 0)
    ]
    if not holders:
        return "module", ""
    innermost = max(holders, key=lambda node: node.lineno)
    return innermost.name, ast.unparse(innermost)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 70 else f"{text[:67]}..."


def _live(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk the nodes whose value matters to a result."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Raise | ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            continue
        if isinstance(node, ast.arg):
            continue
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Literal":
            continue  # a type
        if isinstance(node, ast.AnnAssign):
            if node.value is not None:
                yield node.value
                yield from _live(node.value)
            continue
        if isinstance(node, ast.FunctionDef):
            if any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list):
                continue
            if node.name in ("__str__", "__repr__"):
                continue
            for part in (*node.args.defaults, *(d for d in node.args.kw_defaults if d is not None), *node.body):
                if isinstance(part, ast.Raise) or (isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant)):
                    continue
                yield part
                yield from _live(part)
            continue
        yield node
        yield from _live(node)


def _changes(node: ast.AST) -> Iterator[tuple[str, object]]:
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        yield "comparison", lambda n: ast.Compare(n.left, [_COMPARE[type(n.ops[0])]()], n.comparators)
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC and not _is_text(node):
        yield "arithmetic", lambda n: ast.BinOp(n.left, _ARITHMETIC[type(n.op)](), n.right)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "negation", lambda n: n.operand
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        if isinstance(node.operand, ast.Constant) and node.operand.value in (1, 2):
            yield "axis", lambda n: ast.UnaryOp(ast.USub(), ast.Constant(3 - n.operand.value))
        else:
            yield "sign", lambda n: n.operand
    if isinstance(node, ast.BoolOp):
        yield "boolean", lambda n: ast.BoolOp(ast.Or() if isinstance(n.op, ast.And) else ast.And(), n.values)
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        yield "condition", lambda n: _negated(n)
    if isinstance(node, ast.Constant):
        yield from _constants(node)
    if isinstance(node, ast.Attribute) and node.attr in _NAMES:
        yield "function", lambda n: ast.Attribute(n.value, _NAMES[n.attr], n.ctx)
    if isinstance(node, ast.Name) and node.id in ("max", "min", "any", "all") and isinstance(node.ctx, ast.Load):
        yield "function", lambda n: ast.Name(_NAMES[n.id], n.ctx)
    if isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple) and len(node.value.elts) == 2:
        yield "order", lambda n: ast.Return(ast.Tuple(n.value.elts[::-1], ast.Load()))
    if isinstance(node, ast.AugAssign) and type(node.op) in _ARITHMETIC:
        yield "arithmetic", lambda n: ast.AugAssign(n.target, _ARITHMETIC[type(n.op)](), n.value)


def _is_text(node: ast.BinOp) -> bool:
    parts = (node.left, node.right)
    return any(
        isinstance(p, ast.JoinedStr) or (isinstance(p, ast.Constant) and isinstance(p.value, str)) for p in parts
    )


def _negated(node: ast.If | ast.IfExp | ast.While) -> ast.AST:
    node.test = ast.UnaryOp(ast.Not(), node.test)
    return node


def _constants(node: ast.Constant) -> Iterator[tuple[str, object]]:
    value = node.value
    if isinstance(value, bool):
        yield "constant", lambda n: ast.Constant(not n.value)
    elif isinstance(value, int):
        yield "constant", lambda n: ast.Constant(n.value + 1)
    elif isinstance(value, float):
        yield "constant", lambda n: ast.Constant(n.value * 2 if n.value else 1.0)
    elif isinstance(value, str) and value in _WORDS:
        yield "word", lambda n: ast.Constant(_WORDS[n.value])


def _replace(tree: ast.AST, old: ast.AST, new: ast.AST) -> None:
    if old is new:
        return
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, name, new)
                return
            if isinstance(value, list):
                for index, item in enumerate(value):
                    if item is old:
                        value[index] = new
                        return
