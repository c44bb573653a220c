"""What a search is to minimise, and what it must keep, as users write them.

An objective is arithmetic over names of metrics, `kl + 0.1*ppl`; a constraint compares one metric
with a number, `arc_easy>=0.99x`, where the `x` means times the original model's value.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from autoq.errors import InputError

ALIASES: Mapping[str, str] = {
    "kl": "kl_divergence",
    "ppl": "perplexity",
    "top1": "top1_agreement",
}
"""Short name -> metric."""

_BINARY: Mapping[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_UNARY: Mapping[type[ast.unaryop], Callable[[float], float]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_LONGEST = 300  # characters; deeper nesting than that allows could exhaust Python's own stack
_CONSTRAINT = re.compile(
    r"\s*(?P<metric>[^<>=]*[^<>=\s])\s*(?P<sign>>=|<=)\s*(?P<value>[^<>=\s]+?)(?P<times>x?)\s*"
)


def canonical_name(name: str) -> str:
    """The metric that a name or a short name stands for."""
    return ALIASES.get(name, name)


@dataclass(frozen=True, slots=True)
class Objective:
    """A number to be minimised, made from metrics."""

    text: str  # as it was written
    metrics: frozenset[str]  # full names
    _tree: ast.expr

    @property
    def only_metric(self) -> str | None:
        """The metric that the objective is, as it stands; None where anything is done to it."""
        return _name(self._tree)

    def value(self, metrics: Mapping[str, float]) -> float:
        """The objective of one model.

        Args:
            metrics: full name -> value; others than the objective's are ignored.
        Raises:
            InputError: a metric is missing, or it divides by zero or takes the logarithm of a
                number that is not above zero.
        """
        missing = sorted(self.metrics - metrics.keys())
        if missing:
            raise InputError(
                f"the objective {self.text!r} needs {', '.join(missing)}, which was not measured; "
                "measure it, or leave it out"
            )
        try:
            return _value(self._tree, metrics)
        except (ZeroDivisionError, ValueError, OverflowError) as error:
            used = ", ".join(f"{name} = {metrics[name]:g}" for name in sorted(self.metrics))
            raise InputError(
                f"the objective {self.text!r} has no value for {used} ({error}); write another"
            ) from None

    def per_sequence(self, metrics: Mapping[str, Sequence[float]]) -> tuple[float, ...]:
        """The objective on each sequence, for paired comparison.

        Where the objective is not linear its mean over sequences is not `value` of the means.

        Args:
            metrics: full name -> one value for each sequence, the same sequences for all.
        Raises:
            InputError: a metric has no values, or the metrics have them on different sequences;
                and what `value` raises.
        """
        counts = {name: len(metrics.get(name, ())) for name in sorted(self.metrics)}
        if len(set(counts.values())) != 1 or 0 in counts.values():
            found = ", ".join(f"{name} has {count}" for name, count in counts.items())
            raise InputError(
                f"the objective {self.text!r} needs every metric on the same sequences, and "
                f"{found}; compare its values for the whole data instead"
            )
        return tuple(
            self.value({name: metrics[name][index] for name in self.metrics})
            for index in range(next(iter(counts.values())))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraint:
    """A bound on one metric."""

    metric: str  # full name
    kind: Literal["at_least", "at_most"]
    value: float
    relative_to_original: bool  # `value` counts the original model's own

    def limit(self, original: float | None = None) -> float:
        """The bound in the metric's own unit.

        Args:
            original: what the original model has; needed for relative bounds.
        Raises:
            InputError: the bound is relative, and `original` is unknown.
        """
        if not self.relative_to_original:
            return self.value
        if original is None:
            raise InputError(
                f"{self} counts the original model's {self.metric}, which was not measured; "
                "measure it, or give a plain number"
            )
        return self.value * original

    def holds(self, measured: float, original: float | None = None) -> bool:
        """Whether a model keeps the bound; NaN never does."""
        limit = self.limit(original)
        return measured >= limit if self.kind == "at_least" else measured <= limit

    def __str__(self) -> str:
        sign = ">=" if self.kind == "at_least" else "<="
        return f"{self.metric}{sign}{self.value:g}{'x' if self.relative_to_original else ''}"


def parse_objective(text: str) -> Objective:
    """Read arithmetic over metrics: + - * / ( ) numbers, log(...), and names.

    A name is that of a metric (`kl`, `ppl` and `top1` are short for the common three), that of an
    evaluation task (`arc_easy`), or a task's metric (`arc_easy.acc_norm`); a name that is no word
    of Python stands in quotes. Nothing is executed: the text is parsed, and only these parts of
    Python's grammar are known.

    Raises:
        InputError: it is not such an expression, names no metric, or a part without metrics has no
            value, such as 1/0; says which part.
    """
    if len(text) > _LONGEST:
        raise InputError(f"an objective has at most {_LONGEST} characters, got {len(text)}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError):
        raise InputError(
            f"an objective must be arithmetic over metrics such as 'kl + 0.1*ppl', got {text!r}"
        ) from None
    metrics = frozenset(_names(tree, text))
    if not metrics:
        raise InputError(f"an objective must name a metric, such as kl, got {text!r}")
    _constant(tree, text)
    return Objective(text.strip(), metrics, tree)


def parse_constraint(text: str) -> Constraint:
    """Read "METRIC>=NUMBER", "METRIC<=NUMBER", or the same with an x after the number.

    Raises:
        InputError: it is neither, or the number is not finite.
    """
    found = _CONSTRAINT.fullmatch(text)
    value = _number(found["value"]) if found else None
    if found is None or value is None:
        raise InputError(
            "a constraint must be a metric, >= or <=, and a number, with x for times the "
            f"original's, such as 'arc_easy>=0.99x' or 'kl<=0.01', got {text!r}"
        )
    return Constraint(
        metric=canonical_name(found["metric"]),
        kind="at_least" if found["sign"] == ">=" else "at_most",
        value=value,
        relative_to_original=bool(found["times"]),
    )


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _names(node: ast.expr, text: str) -> list[str]:
    """Full names of the metrics in an expression; refuses whatever is not arithmetic."""
    name = _name(node)
    if name is not None:
        return [name]
    match node:
        case ast.Constant(value=int() | float() as value) if _is_number(value):
            return []
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in _UNARY:
            return _names(operand, text)
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _BINARY:
            return _names(left, text) + _names(right, text)
        case ast.Call(func=ast.Name(id="log"), args=[argument], keywords=[]):
            return _names(argument, text)
    raise InputError(
        f"an objective may hold names of metrics, numbers, + - * / ( ) and log(), and {text!r} "
        f"holds {ast.unparse(node)!r}; leave that out"
    )


def _constant(node: ast.expr, text: str) -> float | None:
    """The value of a part without metrics, None of others; refuses what never has a value."""
    if _name(node) is not None:
        return None
    parts = [part for part in ast.iter_child_nodes(node) if isinstance(part, ast.expr)]
    operands = node.args if isinstance(node, ast.Call) else parts
    values = [_constant(operand, text) for operand in operands]
    try:
        if isinstance(node, ast.BinOp) and type(node.op) is ast.Div and values[1] == 0:
            raise ZeroDivisionError("division by zero")
        if None in values:
            return None
        return _value(node, {})
    except (ZeroDivisionError, ValueError, OverflowError) as error:
        raise InputError(
            f"the objective {text!r} never has a value, because {ast.unparse(node)} has none "
            f"({error}); write another"
        ) from None


def _is_number(value: float) -> bool:
    return not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _name(node: ast.expr) -> str | None:
    match node:
        case ast.Name(id=name):
            return canonical_name(name)
        case ast.Attribute(value=ast.Name(id=task), attr=metric):
            return f"{task}.{metric}"
        case ast.Constant(value=str(name)):
            return canonical_name(name)
    return None


def _value(node: ast.expr, metrics: Mapping[str, float]) -> float:
    name = _name(node)
    if name is not None:
        return float(metrics[name])
    match node:
        case ast.Constant(value=int() | float() as value):
            return float(value)
        case ast.UnaryOp(op=sign, operand=operand):
            return _UNARY[type(sign)](_value(operand, metrics))
        case ast.BinOp(left=left, op=operation, right=right):
            return _BINARY[type(operation)](_value(left, metrics), _value(right, metrics))
        case ast.Call(args=[argument]):
            return math.log(_value(argument, metrics))
    raise AssertionError(ast.dump(node))  # _names refused it
