"""Slice dense Hugging Face checkpoints into experts, and bring checkpoints back.

    python tools/convert_checkpoint.py import SOURCE RUN_DIR [section.field=value ...]
    python tools/convert_checkpoint.py merge RUN OUT
    python tools/convert_checkpoint.py export RUN OUT

COMMAND --help tells everything; docs/conversion.md explains it.
"""

from __future__ import annotations

import sys

from uoe_parallel.conversion.program import main

if __name__ == "__main__":
    sys.exit(main())
