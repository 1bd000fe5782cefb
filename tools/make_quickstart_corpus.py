"""Make the quickstart's corpus: the source of this Python's standard library, byte by byte.

    python tools/make_quickstart_corpus.py FOLDER

Writes FOLDER/{train,validation,test}.{bin,idx} and FOLDER/corpus.json. A folder that already
holds this corpus is reused.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

from uoe_parallel.data.corpus import build_stdlib_corpus
from uoe_parallel.errors import UserError


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Build a byte-level corpus from the source of this Python's standard library."
    )
    parser.add_argument("folder", type=Path, help="where the corpus goes, or is found")
    folder: Path = parser.parse_args().folder
    # Megatron announces at import which optional GPU packages it lacks; none is needed here.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
    try:
        print(build_stdlib_corpus(folder).describe())
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
