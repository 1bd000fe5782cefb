"""Make a corpus to train on out of JSONL, text, Parquet or Hugging Face datasets.

    python tools/preprocess_data.py SOURCE... --output PREFIX [--tokenizer FILE] [--workers N]

--help tells everything; docs/data.md explains it.
"""

from __future__ import annotations

import signal
import sys

from uoe_parallel.preprocessing.program import main

if __name__ == "__main__":
    # By raising, so that workers are ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
