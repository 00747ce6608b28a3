"""Every small change that `scripts/mutants` can make to a module: one edit of its text each."""

from __future__ import annotations

import ast
import dataclasses
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

__all__ = ["WEIGHTS", "Mutant", "find", "sample"]

WEIGHTS: Mapping[str, int] = {
    "del_call": 6,
    "drop_if": 4,
    "neg_if": 2,
    "del_raise": 2,
    "del_lock": 1,
    "del_finally": 1,
    "cmp": 2,
    "boolop": 1,
    "binop": 1,
    "const_int": 1,
    "const_bool": 1,
    "minmax": 1,
    "ret_none": 1,
    "swap_args": 2,
}
"""The kinds of change and their weights: omissions, which lose data, are drawn most often."""

_COMPARISONS = {
    "<": "<=",
    "<=": "<",
    ">": ">=",
    ">=": ">",
    "==": "!=",
    "!=": "==",
    "in": "not in",
    "not in": "in",
    "is": "is not",
    "is not": "is",
}
_LOCKS = re.compile(r"mutex|lock|alone|condition", re.IGNORECASE)
# Log messages and hooks for tests: removing one changes no behaviour.
_SAID = re.compile(r"(_log|logging|warnings)\.|(\w+\.)*operation\(")


@dataclasses.dataclass(frozen=True, slots=True)
class Mutant:
    """One change.

    Attributes:
        path: The module, relative to the repository.
        function: The qualified name of the function that is changed; "" for the module itself.
        kind: One of `WEIGHTS`.
        line: The line of the change.
        start: Its first byte in the module.
        end: The byte after its last.
        old: The text that is replaced.
        new: The new text.
    """

    path: str
    function: str
    kind: str
    line: int
    start: int
    end: int
    old: str
    new: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Names the change also when lines above it change."""
        return self.path, self.function, self.kind, " ".join(self.old.split())

    def apply(self, source: bytes) -> bytes:
        """The module with the change."""
        return source[: self.start] + self.new.encode() + source[self.end :]


def find(path: str, source: bytes) -> list[Mutant]:
    r"""Every change of a module, in order.

    >>> for each in find("x.py", b"def f(a):\n    if a < 1:\n        g(a)\n"):
    ...     print(each.kind, "|", each.old, "|", each.new)
    drop_if | a < 1 | False
    neg_if | a < 1 | not (a < 1)
    cmp | < | <=
    const_int | 1 | 2
    del_call | g(a) | pass
    """
    return list(_Finder(path, source).visit(ast.parse(source), ""))


def sample(mutants: Sequence[Mutant], count: int, seed: int) -> list[Mutant]:
    """Draws a kind by its weight, then a module that has it, then a change; none twice."""
    rng = random.Random(seed)
    left: dict[str, dict[str, list[Mutant]]] = {}
    for each in mutants:
        left.setdefault(each.kind, {}).setdefault(each.path, []).append(each)
    drawn: list[Mutant] = []
    while len(drawn) < count and left:
        kinds = sorted(left)
        kind = rng.choices(kinds, [WEIGHTS[each] for each in kinds])[0]
        path = rng.choice(sorted(left[kind]))
        found = left[kind][path]
        drawn.append(found.pop(rng.randrange(len(found))))
        if not found:
            del left[kind][path]
        if not left[kind]:
            del left[kind]
    return drawn


class _Finder:
    def __init__(self, path: str, source: bytes) -> None:
        self._path, self._source = path, source
        self._starts = [0]
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    def visit(self, node: ast.AST, function: str) -> Iterator[Mutant]:
        """Yields the changes of a node and of its children."""
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            function = f"{function}.{node.name}".lstrip(".")
        if isinstance(node, ast.Expr) and _SAID.match(self._text(node)):
            return
        is_inside = bool(function)
        for kind, start, end, new in self._edits(node, is_inside):
            old = self._source[start:end].decode()
            line = self._source.count(b"\n", 0, start) + 1
            yield Mutant(self._path, function, kind, line, start, end, old, new)
        for child in _children(node):
            yield from self.visit(child, function)

    def _at(self, line: int, column: int) -> int:
        return self._starts[line - 1] + column

    def _span(self, *nodes: ast.AST) -> tuple[int, int]:
        first, last = nodes[0], nodes[-1]
        assert isinstance(first, (ast.expr, ast.stmt)) and isinstance(last, (ast.expr, ast.stmt))  # noqa: S101
        end_line, end_column = last.end_lineno or 0, last.end_col_offset or 0
        return self._at(first.lineno, first.col_offset), self._at(end_line, end_column)

    def _text(self, node: ast.AST) -> str:
        start, end = self._span(node)
        return self._source[start:end].decode()

    def _edits(self, node: ast.AST, is_inside: bool) -> Iterator[tuple[str, int, int, str]]:
        if isinstance(node, ast.stmt):
            yield from self._statement_edits(node)
        elif isinstance(node, ast.expr):
            yield from self._expression_edits(node, is_inside)

    def _statement_edits(self, node: ast.stmt) -> Iterator[tuple[str, int, int, str]]:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield "del_call", *self._span(node), "pass"
        elif isinstance(node, ast.If):
            if not node.orelse:
                yield "drop_if", *self._span(node.test), "False"
            yield "neg_if", *self._span(node.test), f"not ({self._text(node.test)})"
        elif isinstance(node, ast.Raise) and node.exc is not None:
            yield "del_raise", *self._span(node), "pass"
        elif isinstance(node, ast.Return) and node.value is not None:
            if not (isinstance(node.value, ast.Constant) and node.value.value is None):
                yield "ret_none", *self._span(node), "return None"
        elif isinstance(node, ast.Try) and node.finalbody:
            yield "del_finally", *self._span(node.finalbody[0], node.finalbody[-1]), "pass"
        elif isinstance(node, ast.With):
            for item in node.items:
                if item.optional_vars is None and _LOCKS.search(self._text(item.context_expr)):
                    span = self._span(item.context_expr)
                    yield "del_lock", *span, '__import__("contextlib").nullcontext()'

    def _expression_edits(
        self, node: ast.expr, is_inside: bool
    ) -> Iterator[tuple[str, int, int, str]]:
        if isinstance(node, ast.IfExp):
            yield "neg_if", *self._span(node.test), f"not ({self._text(node.test)})"
        elif isinstance(node, ast.Compare):
            yield from self._gap("cmp", node.left, node.comparators[0], _COMPARISONS)
        elif isinstance(node, ast.BoolOp):
            swapped = {"and": "or", "or": "and"}
            yield from self._gap("boolop", node.values[0], node.values[1], swapped)
        elif isinstance(node, ast.BinOp):
            yield from self._gap("binop", node.left, node.right, {"+": "-", "-": "+", "//": "*"})
        elif isinstance(node, ast.Constant) and is_inside:
            if type(node.value) is int:
                yield "const_int", *self._span(node), str(node.value + 1)
            elif type(node.value) is bool:
                yield "const_bool", *self._span(node), str(not node.value)
        elif isinstance(node, ast.Call):
            yield from self._call_edits(node)

    def _call_edits(self, node: ast.Call) -> Iterator[tuple[str, int, int, str]]:
        if isinstance(node.func, ast.Name) and node.func.id in ("min", "max"):
            yield "minmax", *self._span(node.func), {"min": "max", "max": "min"}[node.func.id]
            return  # in any order
        if self._text(node.func) in ("isinstance", "issubclass", "getattr", "hasattr"):
            return  # a TypeError at once: nothing to learn
        if len(node.args) >= 2 and not any(isinstance(a, ast.Starred) for a in node.args[:2]):
            first, second = node.args[:2]
            if ast.dump(first) != ast.dump(second):
                between = self._source[self._span(first)[1] : self._span(second)[0]].decode()
                new = f"{self._text(second)}{between}{self._text(first)}"
                yield "swap_args", *self._span(first, second), new

    def _gap(
        self, kind: str, left: ast.expr, right: ast.expr, swapped: Mapping[str, str]
    ) -> Iterator[tuple[str, int, int, str]]:
        """Yields the change of the operator between two operands."""
        start, end = self._span(left)[1], self._span(right)[0]
        text = self._source[start:end].decode()
        found = re.search(r"not\s+in|is\s+not|\w+|[<>=!+/-]+", text)
        operator = " ".join(found[0].split()) if found else ""
        if found and operator in swapped:
            yield kind, start + found.start(), start + found.end(), swapped[operator]


def _children(node: ast.AST) -> Iterable[ast.AST]:
    """Yields the children of a node that are executed, except messages and annotations."""
    if isinstance(node, ast.Raise) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ):
        return
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "args", "bases") and not isinstance(
            node, ast.Call
        ):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, ast.JoinedStr):
                yield child
