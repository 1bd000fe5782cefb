"""How well a trained model predicts texts.

    python tools/evaluate.py RUN TEXT... [--window N] [--stride N] [section.field=value ...]

--help tells everything.
"""

from __future__ import annotations

import signal
import sys

from uoe_parallel.inference.evaluate_program import main

if __name__ == "__main__":
    # By raising, so that ranks are ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
