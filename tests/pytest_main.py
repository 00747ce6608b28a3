"""The main of every Bazel test: pytest on the files named, with the project's configuration."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest


def _is_outside(entry: str, runfiles: Path) -> bool:
    """True for a checkout that is not among this target's declared files.

    An editable install puts one on the path; its `functional_ckpt/__init__.py` would win over the
    namespace of this target's, and an undeclared import would be found after all.
    """
    return (Path(entry) / "functional_ckpt").is_dir() and not Path(entry).is_relative_to(runfiles)


def main(arguments: list[str]) -> int:
    # Run by hand, there are no runfiles to keep to, and the checkout itself is tested.
    if (runfiles := os.environ.get("TEST_SRCDIR")) is not None:
        sys.path[:] = [entry for entry in sys.path if not _is_outside(entry, Path(runfiles))]
    if (scratch := os.environ.get("TEST_TMPDIR")) is not None:
        os.environ["HYPOTHESIS_STORAGE_DIRECTORY"] = f"{scratch}/hypothesis"
        arguments = [f"--basetemp={scratch}/pytest", *arguments]
    code = pytest.main(
        ["--rootdir=.", "-c", "pyproject.toml", "-p", "no:cacheprovider", *arguments]
    )
    # All tests of a module are skipped where its optional package is absent: that is no failure.
    return 0 if code == pytest.ExitCode.NO_TESTS_COLLECTED else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
