"""Show where the time of a run's communication goes.

    torchrun --standalone --nproc-per-node 2 tools/profile_comm.py --config FILE [--steps 10]

--help tells everything; docs/profiling.md explains the results.
"""

from __future__ import annotations

import sys

from uoe_parallel.profiling.program import main

if __name__ == "__main__":
    sys.exit(main())
