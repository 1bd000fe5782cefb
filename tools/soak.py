"""Hurt a real job at random, and see that nothing is lost.

    python tools/soak.py [--seconds 300] [--seed 1] [--ranks 2] [--config FILE] [--json FILE]

--help tells everything; docs/reliability.md explains the results.
"""

from __future__ import annotations

import sys

from uoe_parallel.soak.program import main

if __name__ == "__main__":
    sys.exit(main())
