#!/usr/bin/env python3
"""Refuse tracked files that do not belong in the repository: pickles, builds, large blobs.

Run ``python scripts/tracked.py``; it exits 1 after printing one line per file.
"""

from __future__ import annotations

import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

MAX_BYTES = 512 * 1024
LARGE_ALLOWED = ("tests/golden/*",)
# Foreign files, which tests read without running pickled code.
FOREIGN_ALLOWED = ("tests/interop/data/*",)
FORBIDDEN = {
    "*.pt": "a pickle",
    "*.pth": "a pickle",
    "*.pkl": "a pickle",
    "*.pickle": "a pickle",
    "*.pyc": "compiled Python",
    "*.so": "a binary",
    "*.whl": "a build",
    "*.ipynb": "a notebook: make it a script in examples/",
    "*.orig": "left by a merge",
    "*.rej": "left by a merge",
    ".venv/*": "an environment",
    "site/*": "a build",
    "tests/*__init__.py": "a package: test files have unique names instead",
    "WORKSPACE*": "a Bazel stand-in: MODULE.bazel is the only one",
}


def problem(path: str, size_bytes: int) -> str | None:
    """Why a tracked file may not be there, or None if it may.

    >>> problem("examples/weights.pt", 10)
    'is a pickle'
    >>> problem("functional_ckpt/errors.py", 10)
    """
    for pattern, reason in FORBIDDEN.items():
        is_foreign = any(fnmatchcase(path, each) for each in FOREIGN_ALLOWED)
        if fnmatchcase(path, pattern) and not is_foreign:
            return f"is {reason}"
    if size_bytes > MAX_BYTES and not any(fnmatchcase(path, p) for p in LARGE_ALLOWED):
        return f"has {size_bytes:,} bytes, more than {MAX_BYTES:,}"
    return None


def main() -> int:
    """Prints every file that git tracks and should not; the exit code says if any."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        print("tracked files: not a git checkout, skipped")
        return 0
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=root, check=True, capture_output=True, text=True
    )
    paths = [path for path in listing.stdout.split("\0") if path and (root / path).exists()]
    problems = [
        f"{path}: {reason}"
        for path in paths
        if (reason := problem(path, (root / path).lstat().st_size)) is not None
    ]
    print("\n".join([*problems, f"tracked files: {len(paths)}, {len(problems)} problems"]))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
