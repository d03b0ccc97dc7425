"""`python -m fastvim_jax`: the `fastvim` command."""

from __future__ import annotations

import sys

from fastvim_jax.cli.main import main

# Worker processes import this module again.
if __name__ == "__main__":
    sys.exit(main())
