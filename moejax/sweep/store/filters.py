"""Conditions on the rows of a table, such as `noise_std < 0.2 and method == 'spectral_em'`.

A condition is read by Python's parser and evaluated here: columns, constants, comparisons, and, or, not. Nothing else is
accepted, so that a condition runs no code.
"""

from __future__ import annotations

import ast
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd

from moejax.checks import brief, brief_text
from moejax.registry import nearest

LONGEST_CONDITION = 10_000
"""Characters; a longer one may nest deeper than the parser can."""
CONSTANTS = {"true": True, "false": False, "default": None}
"""Words of a sweep file, besides Python's own True, False and None."""
_ORDERED: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
ACCEPTED = "columns, numbers, texts in quotes, lists, == != < <= > >= in, and, or, not"


def matching_rows(table: pd.DataFrame, condition: str, option: str = "--where") -> pd.DataFrame:
    """The rows of a table that meet a condition.

    Args:
        table: any table.
        condition: the condition; empty for all rows.
        option: its name in messages.

    Raises:
        ValueError: the condition has another form or an unknown column, compares numbers with text, or no row meets it.
    """
    if not condition:
        return table
    expression = _parsed(condition, option)
    mask = _Condition(table, condition, option).mask(expression)
    if not mask.any():
        unseen = _unseen_text(expression, table)
        hint = f"; {unseen}" if unseen else ""
        raise ValueError(f"{option} {condition}: none of {len(table):,} rows meets it{hint}")
    return table[mask]


def _parsed(condition: str, option: str) -> ast.expr:
    try:
        if len(condition) > LONGEST_CONDITION:
            raise ValueError(f"more than {LONGEST_CONDITION:,} characters")
        with warnings.catch_warnings(action="ignore"):  # on unusual escapes in a text
            return ast.parse(condition.strip(), mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        words = error.msg if isinstance(error, SyntaxError) else brief_text(error)
        raise ValueError(f"{option} {brief_text(condition)}: {words}; expected {ACCEPTED}") from None


class _Condition:
    """Evaluates the parts of one condition."""

    def __init__(self, table: pd.DataFrame, condition: str, option: str):
        self._table = table
        self._place = f"{option} {brief_text(condition)}"

    def mask(self, node: ast.expr) -> np.ndarray:
        """(rows,) bool: the rows that meet a part of the condition."""
        match node:
            case ast.BoolOp(op, parts):
                masks = [self.mask(part) for part in parts]
                return (
                    np.logical_and.reduce(masks) if isinstance(op, ast.And) else np.logical_or.reduce(masks)
                )
            case ast.UnaryOp(ast.Not(), operand):
                return ~self.mask(operand)
            case ast.Compare(left, operators, others):
                sides = [left, *others]
                masks = [
                    self._compared(sides[index], kind, sides[index + 1])
                    for index, kind in enumerate(operators)
                ]
                return np.logical_and.reduce(masks)
            case ast.Name():
                column = self._value(node)
                if isinstance(column, pd.Series) and column.dtype == bool:
                    return column.to_numpy()
        raise self._refusal(node)

    def _compared(self, left: ast.expr, kind: ast.cmpop, right: ast.expr) -> np.ndarray:
        one, other = self._value(left), self._value(right)
        if not isinstance(one, pd.Series) and not isinstance(other, pd.Series):
            raise ValueError(
                f"{self._place}: expected a column in {ast.unparse(left)} .. {ast.unparse(right)}"
            )
        if isinstance(kind, ast.In | ast.NotIn):
            if not isinstance(one, pd.Series) or not isinstance(other, tuple):
                raise ValueError(f"{self._place}: expected COLUMN in [VALUE, ..]")
            found = np.logical_or.reduce([np.zeros(len(one), bool), *(_equal(one, value) for value in other)])
            return found if isinstance(kind, ast.In) else ~found
        if isinstance(kind, ast.Eq | ast.NotEq):
            self._check_kinds(left, one, right, other)
            equal = _equal(one, other) if isinstance(one, pd.Series) else _equal(other, one)
            return equal if isinstance(kind, ast.Eq) else ~equal
        if type(kind) not in _ORDERED:
            raise ValueError(f"{self._place}: `is` is not accepted; expected {ACCEPTED}")
        return self._ordered(left, one, right, other, _ORDERED[type(kind)])

    def _ordered(
        self, left: ast.expr, one: Any, right: ast.expr, other: Any, compare: Callable[[Any, Any], Any]
    ) -> np.ndarray:
        self._check_kinds(left, one, right, other)
        sides = [side.to_numpy() if isinstance(side, pd.Series) else side for side in (one, other)]
        if all(_is_number(side) for side in sides):
            return np.asarray(compare(*sides), dtype=bool)
        count = len(self._table)
        columns = [list(side) if isinstance(side, np.ndarray) else [side] * count for side in sides]
        return np.fromiter((_holds(compare, *pair) for pair in zip(*columns, strict=True)), bool, count)

    def _check_kinds(self, left: ast.expr, one: Any, right: ast.expr, other: Any) -> None:
        """Refuse a comparison of a column of numbers with text, or of text with a number."""
        for node, column, value in ((left, one, other), (right, other, one)):
            if not isinstance(column, pd.Series) or isinstance(value, pd.Series):
                continue
            if isinstance(value, str) and _is_number(column.to_numpy()):
                raise ValueError(
                    f"{self._place}: {ast.unparse(node)} holds numbers, got the text {brief(value)}"
                )
            texts = all(isinstance(entry, str) for entry in column)
            if isinstance(value, int | float) and len(column) and texts:
                raise ValueError(
                    f"{self._place}: {ast.unparse(node)} holds text, got {brief(value)}; write it in quotes"
                )

    def _value(self, node: ast.expr) -> Any:
        """A column as a Series, a list as a tuple, or a constant."""
        match node:
            case ast.Constant(bool() | int() | float() | str() | None as value):
                return value
            case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)):
                return -value
            case ast.List(entries) | ast.Tuple(entries):
                values = tuple(self._value(entry) for entry in entries)
                if not any(isinstance(value, pd.Series) for value in values):
                    return values
            case ast.Name(name):
                if name in self._table:
                    return self._table[name]
                if name in CONSTANTS:
                    return CONSTANTS[name]
                columns = [str(column) for column in self._table]
                raise ValueError(
                    f"{self._place}: {name} is no column; {nearest(name, columns)} (a text is written in quotes)"
                )
        raise self._refusal(node)

    def _refusal(self, node: ast.expr) -> ValueError:
        return ValueError(
            f"{self._place}: {brief_text(ast.unparse(node))} is not accepted; expected {ACCEPTED}"
        )


def _is_number(side: Any) -> bool:
    if isinstance(side, np.ndarray):
        return side.dtype.kind in "iuf"
    return isinstance(side, int | float) and not isinstance(side, bool)


def _equal(column: pd.Series, value: Any) -> np.ndarray:
    """(rows,) bool: entries that equal a constant, or the entry of another column in the same row."""
    others = value if isinstance(value, pd.Series) else [value] * len(column)
    if _is_number(column.to_numpy()) and (isinstance(value, pd.Series) or _is_number(value)):
        return np.asarray(column.to_numpy() == (value.to_numpy() if isinstance(value, pd.Series) else value))
    pairs = zip(column, others, strict=True)
    # True == 1 in Python, but a column of true and false holds no numbers
    return np.fromiter(
        ((isinstance(a, bool) == isinstance(b, bool)) and bool(a == b) for a, b in pairs), bool, len(column)
    )


def _holds(compare: Callable[[Any, Any], Any], one: Any, other: Any) -> bool:
    """False for values that have no order, such as None and a number."""
    try:
        return bool(compare(one, other))
    except TypeError:
        return False


def _unseen_text(expression: ast.expr, table: pd.DataFrame) -> str:
    """A hint on a text that is compared with a column which does not hold it; empty if there is none."""
    for node in ast.walk(expression):
        if not isinstance(node, ast.Compare) or not isinstance(node.left, ast.Name):
            continue
        values: Sequence[ast.expr] = node.comparators
        if isinstance(values[0], ast.List | ast.Tuple):
            values = values[0].elts
        held = (
            {entry for entry in table[node.left.id] if isinstance(entry, str)}
            if node.left.id in table
            else set()
        )
        for value in values:
            if isinstance(value, ast.Constant) and isinstance(value.value, str) and value.value not in held:
                return f"{node.left.id} is never {brief(value.value)}: {nearest(value.value, sorted(held))}"
    return ""
