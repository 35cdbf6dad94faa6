"""Which statements at the top of a script may be executed before it runs: its imports.

Only up to the first that may do anything else, for what a module finds when it is imported
(the environment, the path, a seed) may be the work of what stands before.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import Final

_PLAIN: Final = (
    *(ast.Constant, ast.Name, ast.Attribute, ast.Tuple, ast.List, ast.Dict, ast.Set),
    *(ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.JoinedStr, ast.FormattedValue),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context, ast.keyword),
)
"""What does nothing when it is evaluated."""
_CALLED: Final = frozenset(
    {
        "os.environ.setdefault",
        "sys.path.append",
        "sys.path.insert",
        "warnings.filterwarnings",
        "warnings.simplefilter",
    }
)
"""Calls that may be made twice, once here and once by the script."""
_PATHS: Final = frozenset(
    {"str", "Path", "pathlib.Path", "os.getcwd"}
    | {f"os.path.{name}" for name in ("abspath", "dirname", "join", "realpath")}
)
"""Calls that only compute paths, and so do methods of what they give."""


@dataclass(frozen=True, slots=True)
class Preamble:
    """The beginning of a script.

    Attributes:
        statements: Those to execute, in order.
        rest: Line of the first import that is left to the script; None if there is none.
    """

    statements: tuple[ast.stmt, ...]
    rest: int | None


def preamble(source: str | bytes, until: int | None = None) -> Preamble:
    """Find it.

    Args:
        source: The script.
        until: The line of a statement that ends it, and is not part of it.

    Raises:
        SyntaxError: It is no Python.
        ValueError: It has null bytes.
    """
    body = ast.parse(source).body
    end = next(
        (i for i, each in enumerate(body) if not _is_quiet(each) or each.lineno == until),
        len(body),
    )
    imports = [each.lineno for each in body[end:] if _imports(each)]
    return Preamble(tuple(body[:end]), imports[0] if imports else None)


def unguarded(source: str | bytes) -> int | None:
    """Where a script does its work for whoever imports it; None if it asks for its name first.

    Args:
        source: The script.

    Returns:
        The line of the first statement that is more than a definition.

    Raises:
        SyntaxError: It is no Python.
        ValueError: It has null bytes.
    """
    body = ast.parse(source).body
    if any("__name__" in map(_name, ast.walk(each)) for each in body if isinstance(each, ast.If)):
        return None
    return next((each.lineno for each in body if _works(each)), None)


def _works(statement: ast.stmt) -> bool:
    match statement:
        case ast.If(body=body, orelse=orelse) | ast.Try(body=body, orelse=orelse):
            return any(map(_works, [*body, *orelse]))
        case ast.Expr():
            return not _is_quiet(statement)
    return isinstance(statement, ast.For | ast.While | ast.With)


def _imports(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.If | ast.Try):
        return any(_imports(each) for each in statement.body)
    return isinstance(statement, ast.Import | ast.ImportFrom)


def _is_quiet(statement: ast.stmt) -> bool:
    match statement:
        case ast.Import() | ast.ImportFrom() | ast.Pass() | ast.Expr(ast.Constant()):
            return True
        case ast.Expr(ast.Call(func=called, args=args, keywords=keywords)):
            return _name(called) in _CALLED and all(map(_is_path, [*args, *keywords]))
        case ast.Assign(targets=targets, value=value):
            return all(map(_is_settable, targets)) and _is_plain(value)
        case ast.AnnAssign(target=target, value=value, annotation=annotation):
            return _is_settable(target) and all(_is_plain(e) for e in (annotation, value) if e)
        case ast.If(test=test, body=body, orelse=orelse):
            return _is_plain(test) and all(map(_is_quiet, [*body, *orelse]))
        case ast.Try(body=body, handlers=handlers, orelse=orelse, finalbody=last):
            handled = [each for handler in handlers for each in handler.body]
            return all(map(_is_quiet, [*body, *handled, *orelse, *last]))
    return False


def _is_settable(target: ast.expr) -> bool:
    """A name, or a variable of the environment."""
    if isinstance(target, ast.Subscript):
        return _name(target.value) == "os.environ" and _is_plain(target.slice)
    return isinstance(target, ast.Name)


def _is_plain(node: ast.AST) -> bool:
    return all(isinstance(each, _PLAIN) for each in ast.walk(node))


def _is_path(node: ast.AST) -> bool:
    """Plain, or a path that is computed."""
    if isinstance(node, ast.Call):
        of = node.func
        while isinstance(of, ast.Attribute):
            of = of.value
        known = _name(node.func) in _PATHS or (isinstance(of, ast.Call) and _is_path(of))
        return known and all(map(_is_path, [*node.args, *node.keywords]))
    if not isinstance(node, (*_PLAIN, ast.Subscript)):
        return False
    return all(map(_is_path, ast.iter_child_nodes(node)))


def _name(node: ast.AST) -> str:
    """The dotted name that it is; empty if it is none."""
    if isinstance(node, ast.Attribute) and (before := _name(node.value)):
        return f"{before}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""
