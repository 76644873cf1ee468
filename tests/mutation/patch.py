"""Give a loaded module the code of changed source, without importing anything anew.

Functions are changed in place: every name under which a function is known, in whatever module, and every instance of a
class sees the change. A private constant of the module is set anew. What else is decided when a module is executed
(defaults, decorators, dataclass fields, public constants) cannot be changed so; :func:`can_change` tells the two apart.
"""

from __future__ import annotations

import ast
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["can_change", "change_code"]


def can_change(before: str, after: str) -> bool:
    """Whether two sources differ in the bodies of functions and methods, and in private constants, alone."""
    return _skeleton(before) == _skeleton(after)


def change_code(module: types.ModuleType, source: str) -> None:
    """Put the code of every function and method in ``source`` into those of the loaded module, and its constants."""
    present = {ast.dump(node) for node in ast.parse(Path(str(module.__file__)).read_text(encoding="utf-8")).body}
    for node in ast.parse(source).body:
        if _is_private_constant(node) and ast.dump(node) not in present:
            exec(compile(ast.Module([node], []), "constant", "exec"), module.__dict__)
    compiled = compile(source, str(module.__file__), "exec")
    for code in _functions(compiled):
        holder: Any = module
        *classes, name = code.co_qualname.split(".")
        for part in classes:
            holder = getattr(holder, part)
        function = _plain(vars(holder).get(name))
        if function is not None:
            function.__code__ = code


def _is_private_constant(node: ast.stmt) -> bool:
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        return False
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
    return isinstance(target, ast.Name) and target.id.startswith("_") and target.id != "__all__"


def _skeleton(source: str) -> str:
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not _is_private_constant(node)]
    for holder in ast.walk(tree):
        if isinstance(holder, ast.Module | ast.ClassDef):
            for node in holder.body:
                if isinstance(node, ast.FunctionDef):
                    node.body = [ast.Pass()]
    return ast.dump(tree)


def _functions(code: types.CodeType) -> Iterator[types.CodeType]:
    """Code of functions of the module and methods of its classes; not of what is local to a function."""
    for constant in code.co_consts:
        if not isinstance(constant, types.CodeType) or "<" in constant.co_qualname:
            continue
        if constant.co_flags & 0x2:  # new locals: a function, not the body of a class
            yield constant
        else:
            yield from _functions(constant)


def _plain(found: Any) -> Any:
    """The function behind a property, a static method or a cache, which is emptied."""
    if isinstance(found, property):
        found = found.fget
    if isinstance(found, staticmethod | classmethod):
        found = found.__func__
    if hasattr(found, "cache_clear"):
        found.cache_clear()
        found = found.__wrapped__
    return found if isinstance(found, types.FunctionType) else None
