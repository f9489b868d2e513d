"""Small changes of a function's code, each of which a test should notice."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass

_OTHER_COMPARISON = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
_OTHER_ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}


@dataclass(frozen=True, slots=True)
class Mutant:
    """The bytes [start, stop) of a file, in a function, become `text`."""

    path: str
    function: str
    kind: str
    line: int
    last_line: int
    start: int
    stop: int
    text: str

    def applied(self, source: bytes) -> bytes:
        """The file's content with the change."""
        return source[: self.start] + self.text.encode() + source[self.stop :]

    def shown(self, source: bytes) -> str:
        """The change in one line."""
        before = " ".join(source[self.start : self.stop].decode().split())
        return f"{self.path}:{self.line} {self.function}: {self.kind}: {before:.70} -> {self.text:.70}"


def mutants(path: str, source: bytes) -> Iterator[Mutant]:
    """All of a file's; those of a function inside another are of the outer one."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for name, function in _functions(ast.parse(source), ""):
        for statement in function.body:
            for node in _code(statement):
                for kind, target, text in _changes(node):
                    start = starts[target.lineno - 1] + target.col_offset
                    stop = starts[(target.end_lineno or 0) - 1] + (target.end_col_offset or 0)
                    yield Mutant(path, name, kind, target.lineno, target.end_lineno or 0, start, stop, text)


def raised(source: bytes) -> Iterator[tuple[range, str]]:
    """The lines and the text of each statement that raises an error."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and node.exc is not None:
            yield range(node.lineno, (node.end_lineno or 0) + 1), ast.unparse(node)


def _functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield prefix + child.name, child
        elif isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")


def _code(node: ast.AST) -> Iterator[ast.AST]:
    """What a change of does something: no messages of errors, annotations or parts of f-strings, whose places the
    parser of Python 3.11 does not tell."""
    yield node
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.Raise | ast.Assert | ast.JoinedStr):
                yield from _code(child)


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.expr | ast.stmt, str]]:
    """Kind, what is replaced, and by which text."""
    match node:
        case ast.If(test=test, body=[ast.Raise(), *_]):
            yield "drop check", test, "False"
    match node:
        case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
            yield "negate", test, f"(not ({ast.unparse(test)}))"
        case ast.Compare(ops=[op, *rest]) if type(op) in _OTHER_COMPARISON:
            yield "comparison", node, _changed(node, ops=[_OTHER_COMPARISON[type(op)](), *rest])
        case ast.BoolOp(op=op):
            yield "and, or", node, _changed(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())
        case ast.BinOp(op=op) if type(op) in _OTHER_ARITHMETIC:
            yield "arithmetic", node, _changed(node, op=_OTHER_ARITHMETIC[type(op)]())
        case ast.Constant(value=int(value)) if type(value) is int:
            yield "constant", node, f"({value + 1})"
            yield "constant", node, f"({value - 1})"
        case ast.Expr(value=ast.Call()) | ast.AugAssign():
            yield "drop statement", node, "pass"
        case ast.Call(args=[first, second, *rest]) if not isinstance(first, ast.Starred) and not isinstance(
            second, ast.Starred
        ):
            yield "arguments", node, _changed(node, args=[second, first, *rest])


def _changed(node: ast.expr, **fields: object) -> str:
    other = copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return f"({ast.unparse(other)})"
