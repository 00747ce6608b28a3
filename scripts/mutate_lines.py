"""Which lines of the package a test runs, in all of its processes.

Each statement of an instrumented module sets a byte of a file that all processes of a test map.
"""

from __future__ import annotations

import ast
import hashlib
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["Lines", "digest", "instrument", "instrument_all", "mask"]

_MODULE = "_mutation_hits"


class Lines:
    """The lines that ran since the last reset, of an instrumented copy of the package."""

    def __init__(self, file: Path, sites: Sequence[tuple[str, int]]) -> None:
        self._sites = sites
        with file.open("r+b") as opened:
            self._hits = mmap.mmap(opened.fileno(), 0)

    def reset(self) -> None:
        """Forgets the lines that ran."""
        self._hits[:] = bytes(len(self._hits))

    def found(self) -> dict[str, str]:
        """Returns for each module a hexadecimal number with a bit for each line that ran."""
        bits: dict[str, int] = {}
        for number, is_hit in enumerate(self._hits[: len(self._sites)]):
            if is_hit:
                path, line = self._sites[number]
                bits[path] = bits.get(path, 0) | 1 << line
        return {path: f"{found:x}" for path, found in bits.items()}


def digest(source: bytes) -> str:
    """Returns a name for the content of a file."""
    return hashlib.blake2b(source, digest_size=8).hexdigest()


def mask(source: bytes, function: str, line: int | None) -> int:
    """Returns a number with the bits of a statement's first line, or else of a function's lines.

    Args:
        source: A module.
        function: The qualified name of a function; "" and the name of a class mean the module.
        line: A line of the statement; None for all of the function.
    """
    tree, found = ast.parse(source), 0
    if line is not None:
        for node in _statements(tree, source.decode().splitlines()):
            if _first_line(node) <= line <= (node.end_lineno or 0):
                found = 1 << _first_line(node)  # an inner statement follows the outer one

    def visit(node: ast.AST, name: str) -> int:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = f"{name}.{node.name}".lstrip(".")
            if name == function and not isinstance(node, ast.ClassDef):
                return (1 << (node.end_lineno or 0) + 1) - (1 << node.lineno)
        return next(filter(None, (visit(each, name) for each in ast.iter_child_nodes(node))), 0)

    return found or visit(tree, "") or -1


def instrument_all(
    base: Path, copy: Path, paths: Sequence[str], package: str
) -> tuple[Path, list[tuple[str, int]]]:
    """Instruments modules of a copy.

    Returns:
        The file that the modules map, and the module and line of each of its bytes.
    """
    sites: list[tuple[str, int]] = []
    for path in paths:
        source = (base / path).read_text()
        if source.strip():
            (copy / path).write_text(instrument(path, source, sites))
    file = copy / "mutation.hits"
    file.write_bytes(bytes(len(sites) + 1))
    (copy / package / f"{_MODULE}.py").write_text(
        f"import mmap\nwith open({str(file)!r}, 'r+b') as file:\n"
        "    HITS = mmap.mmap(file.fileno(), 0)\n"
    )
    return file, sites


def instrument(path: str, source: str, sites: list[tuple[str, int]]) -> str:
    """Returns a module in which each statement of a function marks that it runs.

    Args:
        path: The module.
        source: Its text.
        sites: Gets the module and the line of each statement.
    """
    lines = source.splitlines(keepends=True)
    tree = ast.parse(source)
    inserts: list[tuple[int, str]] = []
    for node in _statements(tree, lines):
        first = _first_line(node)
        inserts.append((first - 1, f"{' ' * node.col_offset}_mutation_hits_[{len(sites)}] = 1\n"))
        sites.append((path, first))
    start = 0
    for node in tree.body:
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if not is_text and not (isinstance(node, ast.ImportFrom) and node.module == "__future__"):
            break
        start = node.end_lineno or 0
    package = path.partition("/")[0]
    inserts.append((start, f"from {package}.{_MODULE} import HITS as _mutation_hits_\n"))
    for place, text in sorted(inserts, reverse=True):
        lines.insert(place, text)
    return "".join(lines)


def _statements(tree: ast.AST, lines: Sequence[str]) -> Iterator[ast.stmt]:
    """Yields the statements of functions before which a line can be inserted, outer ones first."""

    def visit(node: ast.AST, is_inside: bool) -> Iterator[ast.stmt]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt) and is_inside:
                is_text = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
                begins = lines[child.lineno - 1][child.col_offset :].startswith
                if not is_text and not (isinstance(child, ast.If) and begins("elif")):
                    yield child
            is_function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            is_class = isinstance(child, ast.ClassDef)
            yield from visit(child, (is_inside or is_function) and not is_class)

    return visit(tree, False)


def _first_line(node: ast.stmt) -> int:
    decorators: Sequence[ast.expr] = getattr(node, "decorator_list", ())
    return min([node.lineno, *(each.lineno for each in decorators)])
