"""Does it help? Compare Union-of-Experts models with their dense twin and a mixture of experts.

    python tools/compare_quality.py --config configs/compare/FILE.yaml [--seeds 3]
        [--budget flops|tokens|time] [--jobs 2]

--help tells everything; docs/quality.md explains the results.
"""

from __future__ import annotations

import sys

from uoe_parallel.comparison.program import main

if __name__ == "__main__":
    sys.exit(main())
