#!/usr/bin/env python3
"""Check the floors of the package: a module imports only from the floors below its own.

The tables below are the complete policy. Nothing is imported or executed: the
package's sources are parsed, so the check takes a fraction of a second and needs nothing but
Python. It finds

1. a module without a floor, one that imports from a floor above its own, and one that imports from
   another package on its own floor;
2. a library used by anyone but the one module that may know it;
3. I/O, clocks, threads and randomness inside ``core/`` and ``policies/``, which are pure;
4. modules that must start fast and import torch, directly or through other modules;
5. cycles between modules.

Run ``python scripts/floors.py [ROOT]``; it exits 1 after printing one line per violation.
``--table`` prints the floors, top down, as Markdown: docs/design/001 holds that table, and a test
compares the two.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

PACKAGE = "functional_ckpt"

# Module path (relative to the package, shell pattern with {a,b}) -> floor. The first match counts.
FLOORS: dict[str, int] = {
    "errors.py": 0,
    "core/arrays/*": 1,
    "core/tree/*": 2,
    "core/nodes/*": 4,
    "core/*": 3,
    "policies/*": 3,
    "events.py": 3,
    "distributed/coordinator.py": 3,
    "distributed/*": 4,
    "handlers/*": 4,
    "runtime/*": 4,
    "storage/buckets/*": 5,
    "storage/*": 6,
    "format/*": 7,
    "steps/*": 8,
    "verify/*": 8,
    "saving/*": 9,
    "restoring/*": 9,
    "interop/{accelerate,lightning,ray,torchtitan,trainer}.py": 12,
    "interop/*": 10,
    "{manager,run}.py": 11,
    "checkpoint.py": 11,
    "flags/*": 12,
    "hooks.py": 12,
    "{protocols,step_names}.py": 12,
    "listeners.py": 12,
    "testing/*": 12,
    "transform/*": 12,
    "cli/*": 13,
    "__*__.py": 14,  # __init__.py and __main__.py
}

# Library -> the only modules that may name it. An empty tuple: none.
SOLE_IMPORTERS: dict[str, tuple[str, ...]] = {
    "tensorstore": ("format/*",),
    "torch.distributed": (
        "distributed/gloo.py",
        "distributed/torch_store.py",
        "interop/dcp_pieces.py",
        "interop/dcp_reader.py",
        "interop/dcp_writer.py",
    ),
    "torch.utils._pytree": ("core/tree/containers.py",),
    "orbax": ("steps/orbax_adapters.py",),
    "jax": (),
    "jaxlib": (),
    "pickle": ("interop/pickles.py",),  # into inert records: nothing it names is imported or run
}

# Modules whose import must not import torch, neither directly nor through another module.
TORCH_FREE: tuple[str, ...] = (
    "__init__.py",
    "errors.py",
    "events.py",
    "policies/*",
    "core/arrays/*",
    "core/nodes/*",
    "core/records/*",
    "core/tree/long_lists.py",
    "core/tree/structure.py",
    "core/tree/plain_json.py",
    "core/tree/walk.py",
    "storage/*",
    "format/*",
    "interop/hub_export.py",
    "interop/plain_files.py",
    "steps/names.py",
    "steps/history.py",
    "steps/index.py",
    "steps/late_metrics.py",
    "steps/node_inventory.py",
    "verify/*",
    "cli/*",
)

# Folders that only compute, and the modules that they must not import.
PURE: tuple[str, ...] = ("core/*", "policies/*")
IMPURE_MODULES = frozenset(
    {"absl", "asyncio", "atexit", "concurrent", "etils", "fcntl", "glob", "http", "io", "logging"}
    | {"mmap", "multiprocessing", "os", "pathlib", "queue", "random", "rich", "sched", "secrets"}
    | {"select", "shutil", "signal", "socket", "subprocess", "tempfile", "threading", "time"}
    | {"urllib"}
)
IMPURE_CALLS = frozenset(
    {"open", "input", "print", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}
    | {"datetime.datetime.now", "datetime.datetime.utcnow", "datetime.date.today"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Import:
    """One name that a module imports, or uses as an attribute of a library it imported."""

    name: str
    """Dotted, absolute; `from a import b` is `a.b`."""
    line: int
    at_import: bool
    """True if it runs when the module is imported: not in a function, not under TYPE_CHECKING."""
    spelled: bool = True
    """False for `torch.distributed` used as an attribute after `import torch`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """A parsed source file of the package."""

    path: str
    """Relative to the package, with forward slashes."""
    imports: tuple[Import, ...]
    calls: tuple[tuple[str, int], ...]
    """Dotted callee and line of every call."""

    @property
    def name(self) -> str:
        """The name that it is imported by."""
        parts = [PACKAGE, *self.path.removesuffix(".py").split("/")]
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    @property
    def folder(self) -> str:
        """The path of its package."""
        return self.path.rpartition("/")[0]

    @property
    def floor(self) -> int | None:
        """Its number in FLOORS."""
        rows = ((each, n) for row, n in FLOORS.items() for each in _spellings(row))
        return next((n for pattern, n in rows if fnmatchcase(self.path, pattern)), None)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Violation:
    """One broken rule, at one line."""

    path: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{PACKAGE}/{self.path}:{self.line}: {self.message}"


def check(root: Path) -> tuple[int, list[Violation]]:
    """Checks the package below a checkout.

    Args:
        root: The directory that holds the package's directory.

    Returns:
        How many modules there are, and every violation, sorted.
    """
    package = root / PACKAGE
    modules = [
        _parse(path.relative_to(package).as_posix(), path.read_text(encoding="utf-8"))
        for path in sorted(package.rglob("*.py"))
    ]
    by_name = {module.name: module for module in modules}
    violations: set[Violation] = set()
    for module in modules:
        violations.update(_floor_violations(module, by_name))
        violations.update(_library_violations(module))
        violations.update(_purity_violations(module))
        violations.update(_torch_violations(module, by_name))
    violations.update(_cycle_violations(by_name))
    return len(modules), sorted(violations)


def _parse(path: str, source: str) -> Module:
    package = [PACKAGE, *path.split("/")[:-1]]
    tree = ast.parse(source, filename=path)
    imports = tuple(_imports(tree, package, at_import=True))
    libraries = {item.name.partition(".")[0] for item in imports}
    attributes = (
        Import(name=name, line=node.lineno, at_import=False, spelled=False)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and (name := _dotted(node)) is not None
        and name.partition(".")[0] in libraries
    )
    calls = (
        (_dotted(node.func) or "", node.lineno)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    )
    return Module(path=path, imports=(*imports, *attributes), calls=tuple(calls))


def _imports(node: ast.AST, package: list[str], *, at_import: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(name=alias.name, line=child.lineno, at_import=at_import)
        elif isinstance(child, ast.ImportFrom):
            base = [child.module] if child.module else []
            if child.level:
                base = package[: len(package) - child.level + 1] + base
            for alias in child.names:
                name = ".".join([*base, alias.name])
                yield Import(name=name, line=child.lineno, at_import=at_import)
        elif isinstance(child, ast.If) and _dotted(child.test) in (
            "TYPE_CHECKING",
            "typing.TYPE_CHECKING",
        ):
            for part in child.body:
                yield from _imports(ast.Module([part], []), package, at_import=False)
            yield from _imports(ast.Module(child.orelse, []), package, at_import=at_import)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, package, at_import=at_import and not inside)


def _dotted(node: ast.AST) -> str | None:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (base := _dotted(node.value)) is not None:
        return f"{base}.{node.attr}"
    return None


def _resolve(name: str, by_name: dict[str, Module]) -> Module | None:
    """Returns the module of this package that holds a name: itself or the nearest package above."""
    while name:
        if name in by_name:
            return by_name[name]
        name = name.rpartition(".")[0]
    return None


def _ours(module: Module, by_name: dict[str, Module]) -> Iterator[tuple[Import, Module]]:
    for item in module.imports:
        target = _resolve(item.name, by_name) if item.spelled else None
        if target is not None and target is not module:
            yield item, target


def _floor_violations(module: Module, by_name: dict[str, Module]) -> Iterator[Violation]:
    if module.floor is None:
        message = "has no floor: add it to FLOORS in scripts/floors.py"
        yield Violation(path=module.path, line=1, message=message)
        return
    for item, target in _ours(module, by_name):
        floor = target.floor
        if floor is None or floor < module.floor:
            continue
        if floor == module.floor and module.folder == target.folder:
            continue
        where = "above" if floor > module.floor else "another package on"
        message = (
            f"floor {module.floor} imports {item.name} from {where} it "
            f"({target.path} is on floor {floor})"
        )
        yield Violation(path=module.path, line=item.line, message=message)


def _library_violations(module: Module) -> Iterator[Violation]:
    for item in module.imports:
        for library, allowed in SOLE_IMPORTERS.items():
            if not _is_in(item.name, library):
                continue
            if any(fnmatchcase(module.path, pattern) for pattern in allowed):
                continue
            who = f"only {' or '.join(allowed)}" if allowed else "no module"
            message = f"uses {library}: {who} may"
            yield Violation(path=module.path, line=item.line, message=message)


def _purity_violations(module: Module) -> Iterator[Violation]:
    if not any(fnmatchcase(module.path, pattern) for pattern in PURE):
        return
    folder = module.path.partition("/")[0]
    for item in module.imports:
        if (library := item.name.partition(".")[0]) in IMPURE_MODULES:
            message = f"{folder} is pure and has no use for {library}"
            yield Violation(path=module.path, line=item.line, message=message)
    for name, line in module.calls:
        if name in IMPURE_CALLS:
            yield Violation(
                path=module.path, line=line, message=f"{folder} is pure and cannot call {name}()"
            )


def _torch_violations(module: Module, by_name: dict[str, Module]) -> Iterator[Violation]:
    if not any(fnmatchcase(module.path, pattern) for pattern in TORCH_FREE):
        return
    seen = {module.path}
    todo: list[tuple[Module, int, str]] = [(module, 0, "")]
    while todo:
        current, line, chain = todo.pop()
        for item in current.imports:
            if not item.at_import:
                continue
            at = line or item.line  # report the import in the module that promised
            if _is_in(item.name, "torch"):
                message = f"must not import torch, and does{chain and ' through ' + chain}"
                yield Violation(path=module.path, line=at, message=message)
                return
            for target in _executed(item.name, by_name):
                if target.path not in seen:
                    seen.add(target.path)
                    todo.append((target, at, f"{chain} -> {target.path}".removeprefix(" -> ")))


def _executed(name: str, by_name: dict[str, Module]) -> Iterator[Module]:
    """Yields the modules of this package that an import executes, ``__init__`` of packages too."""
    parts = name.split(".")
    prefixes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return (by_name[prefix] for prefix in prefixes if prefix in by_name)


def _cycle_violations(by_name: dict[str, Module]) -> Iterator[Violation]:
    done: set[str] = set()

    def visit(module: Module, trail: tuple[str, ...]) -> Iterator[Violation]:
        if module.path in trail:
            cycle = (*trail[trail.index(module.path) :], module.path)
            yield Violation(path=module.path, line=1, message=f"import cycle {' -> '.join(cycle)}")
            return
        if module.path in done:
            return
        for item, target in _ours(module, by_name):
            if item.at_import:
                yield from visit(target, (*trail, module.path))
        done.add(module.path)

    for module in by_name.values():
        yield from visit(module, ())


def _is_in(name: str, library: str) -> bool:
    return name == library or name.startswith(f"{library}.")


def _first_sentence(doc: str) -> str:
    paragraph = doc.partition("\n\n")[0]
    return " ".join(paragraph.split())


def _spellings(row: str) -> list[str]:
    """Returns the shell patterns that a row of FLOORS means: `{a,b}.py` is `a.py` and `b.py`."""
    start, brace, rest = row.partition("{")
    if not brace:
        return [row]
    names, _, end = rest.partition("}")
    return [f"{start}{name}{end}" for name in names.split(",")]


def table(root: Path) -> str:
    """Returns FLOORS as Markdown, top down: the number, the row and its docstring."""
    package = root / PACKAGE
    rows = ["| floor | modules | what they do |", "| --- | --- | --- |"]
    for pattern, floor in sorted(FLOORS.items(), key=lambda row: (-row[1], row[0])):
        first = _spellings(pattern)[0]
        home = package / first.replace("/*", "/__init__.py").replace("__*__", "__init__")
        doc = ast.get_docstring(ast.parse(home.read_text(encoding="utf-8"))) or ""
        rows.append(f"| {floor} | `{pattern}` | {_first_sentence(doc)} |")
    return "\n".join(rows) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Prints every violation below the checkout named, or this one; the exit code says if any.

    With `--table`, prints the floors as the table of docs/design/001.
    """
    root = Path(__file__).resolve().parent.parent
    if "--table" in arguments:
        print(table(root), end="")
        return 0
    if arguments:
        root = Path(arguments[0])
    num_modules, violations = check(root)
    for violation in violations:
        print(violation)
    print(f"floors: {num_modules} modules, {len(violations)} violations")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
