"""Time this project's layers beside dense ones and those of other libraries.

    python tools/bench_layers.py [--only feed_forward] [--ranks 1 2] [--rounds 15]

--help tells everything.
"""

from __future__ import annotations

import signal
import sys

from uoe_parallel.benchmark.program import main

if __name__ == "__main__":
    # By raising, so that ranks are ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
