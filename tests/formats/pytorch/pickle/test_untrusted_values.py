"""No value out of a pickle is formatted, compared or hashed by Python before it is known what it is.

The rules look at the source, where values without a type (`Any`) come from files: the parameters of that type, what the
unpickler loads, and what is taken out of these.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[4] / "formats" / "pytorch"
MODULES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
#: What tells what a value is; a function that asks this of a value may compare and hash it.
CHECKS = {"isinstance", "type", "is_tensor", "_is_text", "_is_count", "_is_storage_key", "_is_size", "_is_shape"}
#: What gives a bounded text, a number or a checked value of whatever it gets.
SAFE_CALLS = CHECKS | {"brief", "described", "shortened", "reason_of", "text_of", "key_of", "len", "id"}
#: Attributes that are texts or numbers of ours, whatever object of ours they are asked of.
SAFE_ATTRIBUTES = {"dtype", "nbytes", "itemsize", "shape", "name", "module", "path", "size", "class_name", "count"}
#: Modules of JSON, whose values are no larger than the file, whatever is done with them once.
JSON = {"exported/program", "exported/pt2_tensors", "exported/graph"}
#: What the rules find, but is known there: why, by module.
KNOWN = {
    ("pickle/files", "key"): "a text of up to 1024 characters (_is_storage_key)",
    ("pickle/files", "view_key"): "likewise",
    ("pickle/files", "offset"): "a count (_is_count)",
    ("pickle/files", "size"): "likewise",
    ("pickle/files", "key not in storages"): "a text of up to 1024 characters, which _storage_of has checked",
    ("modules/state_dict", "str(key)"): "an integer, asked before",
    ("modules/state_dict", "count"): "how many tensors there are",
    ("modules/state_dict", "id(value) not in seen"): "an identity",
    ("modules/state_dict", "key != keys[0]"): "a key, which key_of has made: never a container",
    ("exported/graph", "str(cause)"): "an exception of PyTorch",
    ("pickle/globals", "module"): "a text of up to 1024 characters",
    ("pickle/globals", "name"): "likewise",
    ("pickle/globals", "offset"): "a count, of which the line before makes sure",
    ("pickle/globals", "last >= held"): "sums of checked counts",
    ("exported/program", "name"): "an entry of a table of ours",
    (
        "pickle/records",
        "', '.join((_key_text(part, spend, depth + 1) for part in value))",
    ): "texts of parts, counted",
    ("pickle/records", "value.bit_length()"): "a number of bits",
}


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            yield node


def names_in(expression: ast.AST) -> Iterator[str]:
    """The names that the value of an expression is made of; what is safe to format does not count."""
    if isinstance(expression, ast.Call):
        name = expression.func.id if isinstance(expression.func, ast.Name) else ""
        if name in SAFE_CALLS:
            return
    if isinstance(expression, ast.Attribute) and expression.attr in SAFE_ATTRIBUTES:
        return
    if isinstance(expression, ast.Compare):
        return
    if isinstance(expression, ast.Name):
        yield expression.id
    for inner in ast.iter_child_nodes(expression):
        yield from names_in(inner)


def untrusted(function: ast.FunctionDef) -> set[str]:
    """The names in a function that may be any value out of a file."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    found = {a.arg for a in arguments if a.annotation is not None and ast.unparse(a.annotation) in ("Any", "object")}
    before = -1
    while len(found) != before:
        before = len(found)
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                targets, source = node.targets, node.value
            elif isinstance(node, ast.For | ast.comprehension):
                targets, source = [node.target], node.iter
            elif isinstance(node, ast.NamedExpr):
                targets, source = [node.target], node.value
            else:
                continue
            loaded = any(isinstance(n, ast.Attribute) and n.attr == "load" for n in ast.walk(source))
            if loaded or found & set(names_in(source)):
                found |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return found


def formatted(tree: ast.AST) -> Iterator[str]:
    """Where untrusted values become text, or any value does in a way that takes all of it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FormattedValue) and (node.conversion != -1 or node.format_spec):
            yield ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            whole = node.func.id == "str" and len(node.args) == 1
            if whole or node.func.id in ("repr", "ascii", "format", "hash"):
                yield ast.unparse(node)
        elif is_format(node):
            yield ast.unparse(node)
    for function in functions(tree):
        values = untrusted(function)
        for node in ast.walk(function):
            if isinstance(node, ast.FormattedValue) and values & set(names_in(node.value)):
                yield ast.unparse(node.value)


def is_format(node: ast.AST) -> bool:
    """Whether it is `text.format(…)` or `text % …`."""
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Mod) and isinstance(node.left, ast.Constant)
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format"


def compared(tree: ast.AST) -> Iterator[str]:
    """Where untrusted values are compared or hashed in functions that do not ask what they are."""
    for function in functions(tree):
        values = untrusted(function)
        for node in ast.walk(function):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CHECKS:
                values -= {n.id for a in node.args for n in ast.walk(a) if isinstance(n, ast.Name)}
        for node in ast.walk(function):
            if isinstance(node, ast.Compare) and not all(isinstance(op, ast.Is | ast.IsNot) for op in node.ops):
                operands = [node.left, *node.comparators]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("set", "frozenset", "dict", "sorted", "min"):
                operands = [arg.elt if isinstance(arg, ast.GeneratorExp) else arg for arg in node.args]
            elif isinstance(node, ast.Dict):
                operands = [key for key in node.keys if key is not None]
            elif isinstance(node, ast.DictComp):
                operands = [node.key]
            elif isinstance(node, ast.SetComp):
                operands = [node.elt]
            else:
                continue
            if any(values & set(names_in(operand)) for operand in operands):
                yield ast.unparse(node)


def found(module: str, source: str) -> list[str]:
    """What both rules find in the source of a module."""
    tree = ast.parse(source)
    return [*formatted(tree), *([] if module in JSON else compared(tree))]


@pytest.mark.parametrize("module", MODULES)
def test_values_are_described_and_checked(module: str) -> None:
    unknown = {what for what in found(module, MODULES[module].read_text()) if (module, what) not in KNOWN}
    assert not unknown, (
        "describe them with nibblecast.formats.pytorch.pickle.records.described, or ask first what they are"
    )


def test_all_that_is_known_is_still_there() -> None:
    there = {(module, what) for module, path in MODULES.items() for what in found(module, path.read_text())}
    assert KNOWN.keys() <= there


@pytest.mark.parametrize(
    "line",
    [
        'raise Error(f"no storage: {value!r:.80}")',
        'raise Error(f"no storage: {value:.80}")',
        'raise Error(f"a storage of class {value}")',
        '_, kind, key = value\n    raise Error(f"a storage of class {kind}")',
        'for part in value:\n        raise Error(f"a part {part}")',
        'raise Error(f"a scale {quantizer.scale!r}")',
        'protocol = unpickler.load()\n    raise Error(f"protocol {protocol}")',
        'raise Error("no storage: %s" % value)',
        'raise Error("no storage: {}".format(value))',
        "name = str(value)",
        "name = repr(value)",
        "number = hash(value)",
        "if value == 1001:\n        pass",
        "if unpickler.load() != value:\n        pass",
        'if value in ("latin1", "ascii"):\n        pass',
        "if set(value) != {1}:\n        pass",
        "keys = {key: 1 for key in value}",
        "keys = {part for part in value}",
    ],
)
def test_the_rules_find_what_they_are_for(line: str) -> None:
    source = f"def read(value: Any, quantizer: Quantizer, unpickler: Unpickler) -> None:\n    {line}\n"
    assert found("pickle/files", source)


@pytest.mark.parametrize(
    "line",
    [
        'raise Error(f"no storage: {described(value)}")',
        'raise Error(f"no storage but {type(value).__name__} of {len(value)}")',
        "if type(value) is int and value == 1001:\n        pass",
        "keys = {key_of(part, spend): 1 for part in value}",
    ],
)
def test_the_rules_allow_what_is_safe(line: str) -> None:
    assert not found("pickle/files", f"def read(value: Any) -> None:\n    {line}\n")
