"""Texts that a trained model writes after prompts.

    python tools/generate.py RUN --prompt TEXT [--stream] [section.field=value ...]

--help tells everything.
"""

from __future__ import annotations

import signal
import sys

from uoe_parallel.inference.generate_program import main

if __name__ == "__main__":
    # By raising, so that ranks are ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
