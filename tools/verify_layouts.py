"""Show that parallel layouts train the same model, each against one rank.

    python tools/verify_layouts.py --config FILE --ranks N [--layouts ...] [--steps 3] [--shrink]

--help tells everything; README.md has an example.
"""

from __future__ import annotations

import signal
import sys

from uoe_parallel.verification.program import main

if __name__ == "__main__":
    # By raising, so that ranks are ended and temporary folders removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
