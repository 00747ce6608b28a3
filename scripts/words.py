#!/usr/bin/env python3
"""Find phrases that a reader has to translate, and words that the field does not use.

Run ``python scripts/words.py``; it prints ``file:line: pattern: text`` for every folder in
`CLEAN` and exits 1 if there is any. ``--all`` covers every folder, ``--count`` prints a table of
patterns and folders. In Python files only comments, docstrings and strings of several words are
read; in Markdown everything but inline code. docs/glossary.md has the words to use instead.
"""

from __future__ import annotations

import argparse
import ast
import collections
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SUFFIXES = {".py", ".md"}
FOLDERS = ("functional_ckpt", "tests", "docs", "examples", "benchmarks", "scripts", ".")
SKIPPED = ("scripts/words.py", "tests/test_words.py", "docs/benchmarks")

CLEAN: tuple[str, ...] = (
    "functional_ckpt",
    "docs",
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "tests",
    "examples",
    "benchmarks",
    "scripts",
)
"""Paths (folders or files) where a match fails the check."""

PATTERNS = {
    "what (use a noun)": r"\bwhat\b(?!:| (to|if|for|kind|happens?|happened|happening|failed|fails|"
    r"differs|changed|went|does|do|did|(it|they|you|this|that) (does|do))\b)",
    "begin (start)": r"\b(begin(s|ning)?|began|begun)\b(?!:)",
    "place (index, offset, path, slot)": r"(?<!\bin )(?<!\btake )(?<!\btakes )\bplaces?\b",
    "whole (complete, entire, intact)": r"\bwhole\b",
    "tell (notify, report)": r"\b(un)?(tell|tells|told|telling)\b",
    "ours, theirs (native, foreign)": r"\b(ours|theirs|another program('s)?)\b",
    "go on (continue, resume)": r"\b(go|goes|going|went) on\b",
    "nobody, somebody, whoever (passive)": r"\b(nobody|somebody|anybody|whoever)\b",
    "that is none (invalid, unknown)": r"\b(that|which) (is|are|was|were) none\b",
    "so many, so long (this many)": r"\bso (many|much|often|long|few) (?!as\b|that\b)",
    "further (remote, another)": r"\bfurther\b",
    "lie (is stored, is located)": r"\b(lie|lies|lay|lain|lying)\b",
    "anew, for ever (again, forever)": r"\b(anew|for ever)\b",
    "road, by way of (path, through)": r"\b(roads?|by way of)\b",
    "house, room (package, module, space)": r"\b(house|upstairs|room|rooms)\b",
}
COMPILED = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in PATTERNS.items()}
ANY = re.compile("|".join(PATTERNS.values()), re.IGNORECASE)

ALLOWED = re.compile(
    r"<n>/begun|in the first place|in places|whole numbers?|placeholder|chat room|lay(s|ing)? out",
    re.IGNORECASE,
)
"""Phrases in which a word above is right."""


class Finding(NamedTuple):
    """A phrase that should be another one."""

    line: int
    pattern: str
    text: str


def python_prose(source: str) -> Iterator[tuple[int, str]]:
    """Comments, docstrings and strings of several words, line by line."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], re.sub(r"`[^`]*`", "", token.string)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
            if len(lines) == 1:  # only the string, without the code around it
                lines = [lines[0].encode()[node.col_offset : node.end_col_offset].decode()]
            for number, line in enumerate(lines, node.lineno):
                yield number, re.sub(r"\{[^{}]*\}|`[^`]*`", "", line)


def markdown_prose(source: str) -> Iterator[tuple[int, str]]:
    """Every line of a page, without inline code."""
    for number, line in enumerate(source.splitlines(), 1):
        yield number, re.sub(r"`[^`]*`", "`", line)


def findings(path: str, source: str) -> list[Finding]:
    r"""The phrases of one file that `PATTERNS` names, at most one for a line and pattern.

    >>> findings("a.py", "# Nobody is told.\nplace = 1\n")[0].pattern
    'nobody, somebody, whoever (passive)'
    """
    if not ANY.search(source):
        return []
    prose = markdown_prose(source) if path.endswith(".md") else python_prose(source)
    found = {
        Finding(number, name, line.strip())
        for number, line in prose
        for name, pattern in COMPILED.items()
        if pattern.search(ALLOWED.sub("", line))
    }
    return sorted(found)


def files(root: Path) -> Iterator[str]:
    """Paths of the files that are read, relative to the root."""
    for folder in FOLDERS:
        top = root / folder
        for file in sorted(top.glob("*" if folder == "." else "**/*")):
            path = file.relative_to(root).as_posix()
            if file.suffix in SUFFIXES and not path.startswith(SKIPPED):
                yield path


def main() -> int:
    """Prints the findings; the exit code says if any is in a clean folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--all", action="store_true", help="cover every folder")
    parser.add_argument("--count", action="store_true", help="print counts by pattern and folder")
    parser.add_argument("paths", nargs="*", help="files or folders, instead of the clean ones")
    arguments = parser.parse_args()
    chosen = tuple(arguments.paths) or (FOLDERS[:-1] if arguments.all else CLEAN)
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    failed = False
    for path in files(ROOT):
        is_chosen = path.startswith(chosen) or (arguments.all and "/" not in path)
        if not (is_chosen or arguments.count):
            continue
        found = findings(path, (ROOT / path).read_text())
        counts.update((path.split("/")[0] if "/" in path else ".", f.pattern) for f in found)
        if is_chosen and not arguments.count:
            failed |= bool(found)
            for number, name, text in found:
                print(f"{path}:{number}: {name}: {text}")
    if arguments.count:
        print(f"{'':40}" + "".join(f"{folder[:12]:>13}" for folder in FOLDERS))
        for name in PATTERNS:
            print(f"{name:40}" + "".join(f"{counts[folder, name]:13}" for folder in FOLDERS))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
