"""A filter by an expression over measured columns, such as `words >= 50 and alpha_ratio > 0.6 or lang == 'zh'`.

The expression has Python's syntax. It is parsed by `ast`, checked node by node against what is allowed, and computed by
pyarrow.compute on whole columns; nothing of it is ever run as Python. There are

    columns      the measures of operators/text/counts.py, and any column of the table (lang, lang_score, quality, source, ...)
    constants    numbers, strings, True, False
    logic        and, or, not
    comparison   < <= > >= (numbers, also in chains), == !=, in and not in a list of constants, `is None`, `is not None`
    arithmetic   + - * / and the sign, on numbers; abs(x), log(x), min(x, y, ...), max(x, y, ...)
    strings      contains(x, 'part'), starts_with(x, 'part'), ends_with(x, 'part'), length(x)

All numbers are 64-bit floats. A missing value, nan, x / 0 and the logarithm of what is not positive are null. Whatever is
computed from a null is null, except that `False and null` is False and `True or null` is True. A row whose expression is
null is dropped, or kept with `nulls: keep`.
"""

from __future__ import annotations

import ast
import difflib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from operators.config import Settings, SettingsError, nearest
from operators.filters.thresholds import analysis_of
from operators.operator import Filter
from operators.text import counts
from operators.text.analysis import Analysis

Kind = Literal["number", "string", "boolean", "unknown"]
Columns = Mapping[str, pa.Array]

_LONGEST_CHARACTERS = 10_000
_DEEPEST = 100
_KNOWN: dict[str, Kind] = {
    "id": "string", "source": "string", "url": "string", "lang": "string", "lang_score": "number", "quality": "number",
}  # fmt: skip
_COMPARE: dict[type[ast.cmpop], str] = {
    ast.Lt: "less", ast.LtE: "less_equal", ast.Gt: "greater", ast.GtE: "greater_equal", ast.Eq: "equal", ast.NotEq: "not_equal",
}  # fmt: skip
_ARITHMETIC: dict[type[ast.operator], str] = {ast.Add: "add", ast.Sub: "subtract", ast.Mult: "multiply", ast.Div: "divide"}
_STRING_TESTS = {"contains": "match_substring", "starts_with": "starts_with", "ends_with": "ends_with"}
_FUNCTIONS = ("abs", "log", "min", "max", "length", *_STRING_TESTS)
_TEXTS = {"text", "content", "html"}
_NULL_NUMBER = pa.scalar(None, pa.float64())


@dataclass(frozen=True)
class Node:
    """A checked piece of an expression: what it gives, the columns it reads, and how it is computed (array or scalar)."""

    kind: Kind
    columns: tuple[str, ...]
    compute: Callable[[Columns], Any]


class FilterExpressionSettings(Settings):
    """What to keep."""

    keep: str = Field(description="keep documents for which this holds, e.g. `words >= 50 and alpha_ratio > 0.6 or lang == 'zh'`")
    nulls: Literal["drop", "keep"] = Field(default="drop", description="what to do where the expression is null (unknown)")


class FilterExpression(Filter):
    """Keep the documents for which an expression over measures and columns holds.

    The reason names the columns of the part (between the outermost `and`s) that does not hold first, as `words`, or as
    `null_words` where that part is unknown; the value is the left side of its comparison, where that is a number.
    """

    name: ClassVar[str] = "filter_expression"
    settings = FilterExpressionSettings
    decide_options = frozenset({"keep", "nulls"})

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._parts = compile_expression(self.config.keep, self.name)
        named = dict.fromkeys(column for part in self._parts for column in part.condition.columns)
        self._measured = counts.found_with(named)
        self.reads = tuple(column for column in named if column not in counts.MEASURES)
        self.needs = (*(("text",) if self._measured else ()), *self.reads)  # type: ignore[misc]
        self.uses_analysis = bool(self._measured)  # type: ignore[misc]

    def check_columns(self, columns: list[str]) -> None:
        for name in self.reads:
            if name not in columns:
                raise KeyError(self._unknown(name, columns))
        super().check_columns(columns)

    def check_spelling(self, columns: list[str]) -> None:
        """Before there is data: raises SettingsError for a name much like one of `columns` or a measure, but neither."""
        for name in self.reads:
            if name not in columns and difflib.get_close_matches(name, {*counts.MEASURES, *columns}, 1, 0.75):
                raise SettingsError(self._unknown(name, columns))

    def _unknown(self, name: str, columns: list[str]) -> str:
        known = sorted({*counts.MEASURES, *columns} - _TEXTS)
        position = _position_of(self.config.keep, name)
        return f"{self.name}: no column {name!r} (character {position} of {self.config.keep!r}){nearest(name, known)}"

    def measured_as(self) -> dict[str, Any]:
        return dict.fromkeys([*self._measured, *self.reads], True)

    def measure(self, table: pa.Table, analysis: Analysis | None = None) -> dict[str, pa.Array]:
        """The measures (operators.text.counts) that the expression names, and those found along with them."""
        if not self._measured:
            return {}
        return {name: pa.array(values) for name, values in counts.count(analysis_of(table, analysis), self._measured).items()}

    def decide(self, table: pa.Table, scores: dict[str, pa.Array]) -> tuple[pa.Array, pa.Array]:
        rows = table.num_rows
        columns = {name: _numbers(values) for name, values in scores.items()}
        for name in self.reads:
            values = _column(table[name], name, self.name)
            columns[name] = _typed(values, _KNOWN[name], (name,), self.name) if name in _KNOWN else values
        found, holds = [], [_filled(part.condition.compute(columns), rows) for part in self._parts]
        code = np.full(rows, -1)
        for number in reversed(range(len(holds))):
            if self.config.nulls == "drop":
                code[pc.is_null(holds[number]).to_numpy(zero_copy_only=False)] = 2 * number + 1
        for number in reversed(range(len(holds))):
            code[pc.fill_null(pc.invert(holds[number]), False).to_numpy(zero_copy_only=False)] = 2 * number
        value = np.full(rows, np.nan)
        for number, part in enumerate(self._parts):
            names = ",".join(part.condition.columns) or "constant"
            found += [names, f"null_{names}"]
            mine = code == 2 * number
            if part.left is not None and mine.any():
                value[mine] = pc.fill_null(_filled(part.left.compute(columns), rows), np.nan).to_numpy(zero_copy_only=False)[mine]
        reason = pa.array(found, pa.string()).take(pa.array(code, mask=code < 0))
        return reason, pa.array(value, pa.float64(), mask=np.isnan(value))


@dataclass(frozen=True)
class Part:
    """One of the conditions between the outermost `and`s; `left` is the number that its comparison looks at, if it is one."""

    condition: Node
    left: Node | None


def compile_expression(text: str, where: str = "expression") -> list[Part]:
    """The conditions of an expression, all of which must hold. Raises SettingsError with the position of what is wrong."""
    if len(text) > _LONGEST_CHARACTERS:
        raise SettingsError(f"{where}: an expression has at most {_LONGEST_CHARACTERS:,} characters, this one {len(text):,}")
    source = text.replace("\n", " ").replace("\r", " ")
    lead = len(source) - len(source.lstrip())
    compiler = _Compiler(source[lead:], where, lead)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in strings
            tree = ast.parse(source[lead:], mode="eval")
        conditions = tree.body.values if isinstance(tree.body, ast.BoolOp) and isinstance(tree.body.op, ast.And) else [tree.body]
        return [compiler.part(condition) for condition in conditions]
    except SyntaxError as error:
        place = f" at character {lead + (error.offset or len(source) - lead + 1)}" if source.strip() else ""
        raise SettingsError(f"{where}: {error.msg}{place} of {text!r}") from None
    except (ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, SettingsError):
            raise
        raise SettingsError(f"{where}: cannot be read ({error or type(error).__name__}): {text[:200]!r}") from None


class _Compiler:
    """Turns allowed nodes of Python's syntax into column operations; refuses all others."""

    def __init__(self, source: str, where: str, lead: int) -> None:
        self._source, self._where, self._lead = source, where, lead

    def part(self, node: ast.expr) -> Part:
        condition = self._want("boolean", node, 0)
        left = None
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
            left = self._node(node.left, 1)
            if left.kind != "number" or not left.columns:
                left = None
        return Part(condition, left)

    def _refuse(self, node: ast.AST, message: str) -> SettingsError:
        offset = getattr(node, "col_offset", 0)  # in bytes
        position = len(self._source.encode()[:offset].decode("utf-8", "replace")) + 1 + self._lead
        return SettingsError(f"{self._where}: {message} at character {position} of {self._source!r}")

    def _want(self, kind: Kind, node: ast.expr, depth: int) -> Node:
        found = self._node(node, depth)
        if found.kind not in (kind, "unknown"):
            raise self._refuse(node, f"a {kind} is wanted, not a {found.kind},")
        if found.kind == "unknown":  # a column of the table, whose type is known when it is there
            return Node(kind, found.columns, lambda columns: _typed(found.compute(columns), kind, found.columns, self._where))
        return found

    def _node(self, node: ast.expr, depth: int) -> Node:
        if depth > _DEEPEST:
            raise self._refuse(node, f"nested deeper than {_DEEPEST}")
        if isinstance(node, ast.Constant):
            return self._constant(node)
        if isinstance(node, ast.Name):
            name = node.id
            kind: Kind = "number" if name in counts.MEASURES else _KNOWN.get(name, "unknown")
            if name in _TEXTS:
                raise self._refuse(node, f"{name!r} itself cannot be used, only measures of it,")
            return Node(kind, (name,), lambda columns: columns[name])
        if isinstance(node, ast.BoolOp):
            function = pc.and_kleene if isinstance(node.op, ast.And) else pc.or_kleene
            return _fold(function, [self._want("boolean", value, depth + 1) for value in node.values])
        if isinstance(node, ast.UnaryOp):
            return self._unary(node, depth)
        if isinstance(node, ast.BinOp):
            if type(node.op) not in _ARITHMETIC:
                raise self._refuse(node, f"operator {type(node.op).__name__} is not allowed (allowed: + - * /)")
            operands = [self._want("number", side, depth + 1) for side in (node.left, node.right)]
            return _arithmetic(_ARITHMETIC[type(node.op)], operands)
        if isinstance(node, ast.Compare):
            return self._compare(node, depth)
        if isinstance(node, ast.Call):
            return self._call(node, depth)
        raise self._refuse(node, f"{type(node).__name__} is not allowed")

    def _constant(self, node: ast.Constant) -> Node:
        value = node.value
        if isinstance(value, bool):
            scalar: Any = pa.scalar(value)
            return Node("boolean", (), lambda columns: scalar)
        if isinstance(value, int | float):
            try:
                scalar = pa.scalar(float(value), pa.float64())
            except OverflowError:
                raise self._refuse(node, "this number is too large") from None
            return Node("number", (), lambda columns: scalar)
        if isinstance(value, str):
            try:
                scalar = pa.scalar(value, pa.string())
            except UnicodeEncodeError:
                raise self._refuse(node, "this string holds a lone surrogate") from None
            return Node("string", (), lambda columns: scalar)
        raise self._refuse(node, f"the constant {value!r} is not allowed")

    def _unary(self, node: ast.UnaryOp, depth: int) -> Node:
        if isinstance(node.op, ast.Not):
            operand = self._want("boolean", node.operand, depth + 1)
            return Node("boolean", operand.columns, lambda columns: pc.invert(operand.compute(columns)))
        if isinstance(node.op, ast.USub | ast.UAdd):
            operand = self._want("number", node.operand, depth + 1)
            return operand if isinstance(node.op, ast.UAdd) else _arithmetic("negate", [operand])
        raise self._refuse(node, "operator ~ is not allowed (write `not`)")

    def _compare(self, node: ast.Compare, depth: int) -> Node:
        found, left = [], node.left
        for operator, right in zip(node.ops, node.comparators, strict=True):
            found.append(self._comparison(node, left, operator, right, depth + 1))
            left = right
        return _fold(pc.and_kleene, found)

    def _comparison(self, whole: ast.Compare, left: ast.expr, operator: ast.cmpop, right: ast.expr, depth: int) -> Node:
        if isinstance(operator, ast.Is | ast.IsNot):
            if not (isinstance(right, ast.Constant) and right.value is None):
                raise self._refuse(right, "`is` takes only None (write == to compare)")
            operand = self._node(left, depth)
            test = pc.is_null if isinstance(operator, ast.Is) else pc.is_valid
            return Node("boolean", operand.columns, lambda columns: test(operand.compute(columns)))
        if isinstance(operator, ast.In | ast.NotIn):
            return self._membership(left, operator, right, depth)
        first, second = self._node(left, depth), self._node(right, depth)
        kinds = {first.kind, second.kind} - {"unknown"}
        if len(kinds) > 1:
            raise self._refuse(whole, f"a {first.kind} is compared with a {second.kind}")
        ordered = type(operator) not in (ast.Eq, ast.NotEq)
        kind: Kind = "number" if ordered else (kinds.pop() if kinds else "unknown")
        if kind != "unknown":
            first, second = self._want(kind, left, depth), self._want(kind, right, depth)
        function = getattr(pc, _COMPARE[type(operator)])
        where = self._where

        def compute(columns: Columns) -> Any:
            try:
                return function(first.compute(columns), second.compute(columns))
            except pa.ArrowNotImplementedError:
                raise SettingsError(f"{where}: columns {first.columns} and {second.columns} are of different types") from None

        return Node("boolean", _union([first, second]), compute)

    def _membership(self, left: ast.expr, operator: ast.cmpop, right: ast.expr, depth: int) -> Node:
        if not isinstance(right, ast.List | ast.Tuple | ast.Set) or not right.elts:
            raise self._refuse(right, "`in` takes a list of constants, e.g. lang in ['zh', 'en'],")
        items = [self._node(item, depth) for item in right.elts]
        if any(item.columns for item in items) or len({item.kind for item in items}) > 1:
            raise self._refuse(right, "`in` takes constants of one kind")
        operand = self._want(items[0].kind, left, depth)
        values = pa.array([item.compute({}).as_py() for item in items])
        negated = isinstance(operator, ast.NotIn)

        def compute(columns: Columns) -> Any:
            found = operand.compute(columns)
            hit = pc.is_in(found, value_set=values)  # False for null
            hit = pc.if_else(pc.is_valid(found), hit, pa.scalar(None, pa.bool_()))
            return pc.invert(hit) if negated else hit

        return Node("boolean", operand.columns, compute)

    def _call(self, node: ast.Call, depth: int) -> Node:
        if not isinstance(node.func, ast.Name) or node.func.id not in _FUNCTIONS:
            name = node.func.id if isinstance(node.func, ast.Name) else ast.unparse(node.func)
            raise self._refuse(node, f"unknown function {name!r}{nearest(name, list(_FUNCTIONS))}")
        name, given = node.func.id, node.args
        if node.keywords or any(isinstance(item, ast.Starred) for item in given):
            raise self._refuse(node, f"{name}() takes plain arguments")
        if name in _STRING_TESTS:
            if len(given) != 2 or not (isinstance(given[1], ast.Constant) and isinstance(given[1].value, str)):
                raise self._refuse(node, f"{name}() takes a column and a string, e.g. {name}(url, 'edu')")
            operand, part = self._want("string", given[0], depth + 1), given[1].value
            self._constant(given[1])
            test = getattr(pc, _STRING_TESTS[name])
            return Node("boolean", operand.columns, lambda columns: test(operand.compute(columns), part))
        if name == "length":
            if len(given) != 1:
                raise self._refuse(node, "length() takes one string")
            operand = self._want("string", given[0], depth + 1)
            return Node("number", operand.columns, lambda columns: pc.utf8_length(operand.compute(columns)).cast(pa.float64()))
        if len(given) != 1 if name in ("abs", "log") else len(given) < 2:
            raise self._refuse(node, f"{name}() takes {'one number' if name in ('abs', 'log') else 'two numbers or more'}")
        operands = [self._want("number", item, depth + 1) for item in given]
        return _arithmetic({"abs": "abs", "log": "ln", "min": "min_element_wise", "max": "max_element_wise"}[name], operands)


def _union(nodes: list[Node]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for node in nodes for name in node.columns))


def _fold(function: Callable[[Any, Any], Any], nodes: list[Node]) -> Node:
    def compute(columns: Columns) -> Any:
        found = nodes[0].compute(columns)
        for node in nodes[1:]:
            found = function(found, node.compute(columns))
        return found

    return Node("boolean", _union(nodes), compute)


def _arithmetic(name: str, operands: list[Node]) -> Node:
    function: Any = getattr(pc, name)
    options = {"skip_nulls": False} if name.endswith("element_wise") else {}

    def compute(columns: Columns) -> Any:
        given = [operand.compute(columns) for operand in operands]
        if name == "divide":
            given[1] = pc.if_else(pc.equal(given[1], 0.0), _NULL_NUMBER, given[1])
        if name == "ln":
            given[0] = pc.if_else(pc.greater(given[0], 0.0), given[0], _NULL_NUMBER)
        return _without_nan(function(*given, **options))

    return Node("number", _union(operands), compute)


def _without_nan(values: Any) -> Any:
    return pc.if_else(pc.is_nan(values), _NULL_NUMBER, values)


def _numbers(values: pa.Array) -> pa.Array:
    return _without_nan(values.cast(pa.float64()))


def _column(column: pa.ChunkedArray, name: str, where: str) -> pa.Array:
    """A column of the table as float64, string or bool. Raises SettingsError for other types."""
    values: Any = column.combine_chunks()
    if isinstance(values, pa.ChunkedArray):
        values = pa.array([], column.type)
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind):
        return _numbers(values.cast(kind))
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return values.cast(pa.string())
    if pa.types.is_boolean(kind):
        return values.cast(pa.bool_())
    raise SettingsError(f"{where}: column {name!r} is {column.type}; numbers, strings and booleans can be used")


def _typed(values: Any, kind: Kind, columns: tuple[str, ...], where: str) -> Any:
    wanted = {"number": pa.float64(), "string": pa.string(), "boolean": pa.bool_()}[kind]
    if isinstance(values, pa.Array) and values.null_count == len(values):
        return values.cast(wanted)
    if values.type != wanted:
        raise SettingsError(f"{where}: column {columns[0]!r} is {values.type} where a {kind} is wanted")
    return values


def _filled(values: Any, rows: int) -> pa.Array:
    """An array of that many rows, of an array or a scalar."""
    return pa.repeat(values, rows) if isinstance(values, pa.Scalar) else values


def _position_of(text: str, name: str) -> int:
    """The character (from 1) at which a name stands first in an expression that has been compiled."""
    source = text.replace("\n", " ").replace("\r", " ")
    lead = len(source) - len(source.lstrip())
    tree = ast.parse(source[lead:], mode="eval")
    offset = min(node.col_offset for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == name)
    return lead + len(source[lead:].encode()[:offset].decode("utf-8", "replace")) + 1
