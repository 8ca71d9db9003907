"""Small formulae over a config: sizes (`hidden_size / num_attention_heads`) and guards (`layer_types[L] == "full"`). Never `eval`.

Numbers, text, names of config keys (dotted into sub-configs), `+ - * / // %`, comparisons, `and or not`, `a if c else b`, `x[L]`,
and the functions `int ceil min max round_up stage`. `/` must divide without rest. A key that the config lacks counts as false,
so `head_dim or hidden_size / heads` falls back; used as a number it is an error that names the key.
"""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from ..errors import FormatError

Value = object
Names = Callable[[str], Value]
MAX_TEXT, MAX_NUMBER = 400, 1 << 40


class Missing:
    """What a name stands for that the config does not have: false, and an error when used as a number."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __bool__(self) -> bool:
        return False


def evaluate(text: str, names: Names) -> Value:
    """The value of a formula; `names` gives the value of a dotted key, or a `Missing`.

    >>> evaluate("head_dim or hidden / heads", {"hidden": 12, "heads": 4, "head_dim": None}.get)
    3

    Raises FormatError: the text is no formula, a key is missing or no number, a quotient has a rest, a number is out of bounds.
    """
    try:
        value = _value(_parsed(text), names)
    except RecursionError:
        raise FormatError("a formula is nested too deeply", found=text[:60]) from None
    if isinstance(value, Missing):
        raise FormatError(f"the config has no {value.name!r}", equation=text)
    return value


@lru_cache(maxsize=4096)
def _parsed(text: str) -> ast.expr:
    if len(text) > MAX_TEXT:
        raise FormatError("a formula is too long", found=f"{len(text)} characters", expected=f"at most {MAX_TEXT}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Python's own syntax, in a text that is none of ours
            return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise FormatError("this is not a formula", found=text) from None


def _value(node: ast.expr, names: Names) -> Value:
    match node:
        case ast.Constant(value=bool() | int() | float() | str() | None):
            return node.value
        case ast.Name() | ast.Attribute():
            return names(_dotted(node))
        case ast.Subscript():
            return _item(_value(node.value, names), _value(node.slice, names), node)
        case ast.BoolOp():
            value: Value = None
            for operand in node.values:
                value = _value(operand, names)
                if bool(value) == isinstance(node.op, ast.Or):
                    break
            return value
        case ast.UnaryOp(op=ast.Not()):
            return not _value(node.operand, names)
        case ast.UnaryOp(op=ast.USub()):
            return -_number(_value(node.operand, names), node)
        case ast.IfExp():
            return _value(node.body if _value(node.test, names) else node.orelse, names)
        case ast.BinOp():
            return _arithmetic(node, _number(_value(node.left, names), node), _number(_value(node.right, names), node))
        case ast.Compare(ops=[_]):
            return _compare(node, _value(node.left, names), _value(node.comparators[0], names))
        case ast.Tuple() | ast.List():
            return [_value(element, names) for element in node.elts]
        case ast.Call(func=ast.Name(), keywords=[]) if node.func.id in _FUNCTIONS:  # type: ignore[attr-defined]
            return _call(node, [_value(argument, names) for argument in node.args])
    raise FormatError("a formula holds only names, numbers, arithmetic and comparisons", found=ast.unparse(node))


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    if isinstance(node, ast.Name):
        return node.id
    raise FormatError("a formula holds only names, numbers, arithmetic and comparisons", found=ast.unparse(node))


def _number(value: Value, node: ast.AST) -> int | float:
    text = ast.unparse(node)
    if isinstance(value, Missing):
        raise FormatError(f"the config has no {value.name!r}", equation=text)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise FormatError("a config value must be a number", found=repr(value)[:60], equation=text)
    if not abs(value) <= MAX_NUMBER:  # also refuses nan
        raise FormatError("a config value is out of bounds", found=repr(value)[:60], expected=f"at most {MAX_NUMBER}", equation=text)
    return value


def _arithmetic(node: ast.BinOp, left: int | float, right: int | float) -> int | float:
    found = f"{left} and {right}"
    match node.op:
        case ast.Add():
            result = left + right
        case ast.Sub():
            result = left - right
        case ast.Mult():
            result = left * right
        case ast.Div() | ast.FloorDiv() | ast.Mod() if right == 0:
            raise FormatError("a config value must not be zero here", found=found, equation=ast.unparse(node))
        case ast.Div():
            result, rest = divmod(left, right)
            if rest:
                raise FormatError("a quotient of config values has a rest", found=found, equation=ast.unparse(node))
        case ast.FloorDiv():
            result = left // right
        case ast.Mod():
            result = left % right
        case _:
            raise FormatError("a formula has only + - * / // %", found=ast.unparse(node))
    return _number(result, node)


_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Is: lambda a, b: a is b,
    ast.IsNot: lambda a, b: a is not b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


def _compare(node: ast.Compare, left: Value, right: Value) -> bool:
    left, right = (None if isinstance(side, Missing) else side for side in (left, right))
    try:
        return _COMPARE[type(node.ops[0])](left, right)
    except TypeError:
        raise FormatError("config values cannot be compared", found=f"{left!r} and {right!r}"[:80], equation=ast.unparse(node)) from None


def _item(value: Value, index: Value, node: ast.Subscript) -> Value:
    if isinstance(value, Missing):
        return value
    try:
        return value[index]  # type: ignore[index]
    except (TypeError, LookupError):
        found = f"{index!r} of {value!r}"[:80]
        raise FormatError("a list in the config lacks this entry", found=found, equation=ast.unparse(node)) from None


def _round_up(value: int | float, multiple: int | float) -> int:
    return math.ceil(value / multiple) * int(multiple)


_FUNCTIONS: dict[str, tuple[int, Callable[..., int | float]]] = {
    "int": (1, int),
    "ceil": (1, math.ceil),
    "min": (2, min),
    "max": (2, max),
    "round_up": (2, _round_up),
    "stage": (2, min),
}


def _stage(number: Value, depths: Value, node: ast.Call) -> int:
    """The stage that block `number` is in, when stage i has depths[i] blocks."""
    left = _number(number, node)
    if not isinstance(depths, list):
        raise FormatError("a list is needed", found=repr(depths)[:60], equation=ast.unparse(node))
    for stage, depth in enumerate(depths):
        left -= _number(depth, node)
        if left < 0:
            return stage
    raise FormatError("a list in the config lacks this entry", found=f"block {number} of {depths!r}"[:80], equation=ast.unparse(node))


def _call(node: ast.Call, arguments: list[Value]) -> Value:
    name = node.func.id  # type: ignore[attr-defined]
    count, function = _FUNCTIONS[name]
    if len(arguments) != count:
        raise FormatError(f"{name} takes {count} values", found=ast.unparse(node))
    if name == "stage":
        return _stage(arguments[0], arguments[1], node)
    numbers = [_number(argument, node) for argument in arguments]
    if name == "round_up" and numbers[1] <= 0:
        raise FormatError("a config value must be positive here", found=str(numbers[1]), equation=ast.unparse(node))
    try:
        return _number(function(*numbers), node)
    except OverflowError:
        raise FormatError("a config value is out of bounds", found=str(numbers)[:60], equation=ast.unparse(node)) from None


@lru_cache(maxsize=4096)
def keys(text: str) -> frozenset[str]:
    """The config keys that a formula names.

    >>> sorted(keys("head_dim or layer.width / heads[L]"))
    ['head_dim', 'heads', 'width']
    """
    found: set[str] = set()
    stack: list[ast.AST] = [_parsed(text)]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Name | ast.Attribute):
            found.add(_dotted(node).removeprefix("layer."))
        elif isinstance(node, ast.Call):
            stack += node.args
        else:
            stack += ast.iter_child_nodes(node)
    return frozenset(found - {"L", "S"})
