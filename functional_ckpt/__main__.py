"""`python -m functional_ckpt` is `fckpt`."""

from __future__ import annotations

import sys

from functional_ckpt.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
