"""A missing extra is an error that names it."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("module", "absent", "extra"),
    [
        ("functional_ckpt.interop.accelerate", "accelerate", "functional-ckpt[transformers]"),
        ("functional_ckpt.interop.lightning", "lightning", "functional-ckpt[lightning]"),
        ("functional_ckpt.interop.ray", "ray", "functional-ckpt[ray]"),
        ("functional_ckpt.interop.trainer", "transformers", "functional-ckpt[transformers]"),
    ],
)
def test_a_missing_trainer_is_an_error_that_names_the_extra(
    module: str, absent: str, extra: str
) -> None:
    code = f"import sys; sys.modules[{absent!r}] = None; import {module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: {module} needs {absent}: pip install")
    assert extra in last
