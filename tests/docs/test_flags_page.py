"""docs/flags.md lists every flag of `fc.flags.define`."""

from __future__ import annotations

import re
from pathlib import Path

from absl import flags as absl_flags

import functional_ckpt as fc

PAGE = (Path(__file__).parents[2] / "docs" / "flags.md").read_text(encoding="utf-8")


def test_page_lists_every_flag_and_no_other() -> None:
    values = absl_flags.FlagValues()
    fc.flags.define(flag_values=values)
    listed = re.findall(r"^\| `--(\w+)`", PAGE, flags=re.MULTILINE)
    assert sorted(listed) == sorted(name for name in values if name.startswith("ckpt_"))
