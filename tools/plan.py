"""Say what a run will take, before it runs, and find its layout.

    python tools/plan.py --config FILE [--world N] [--gpu NAME] [--search]

--help tells everything.
"""

from __future__ import annotations

import signal
import sys

from uoe_parallel.planning.program import main

if __name__ == "__main__":
    # By raising, so that ranks are ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
