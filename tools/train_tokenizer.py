"""Learn a byte-level BPE from text, for data.tokenizer.

    python tools/train_tokenizer.py SOURCE... --out FILE.json [--vocab-size 32768]

--help tells everything; docs/data.md shows the way from text to training.
"""

from __future__ import annotations

import sys

from uoe_parallel.preprocessing.tokenizer_program import main

if __name__ == "__main__":
    sys.exit(main())
