"""Make the ListOps task of the Long Range Arena, for model.task = classification.

    python tools/make_listops.py --output FOLDER [--max-length 2000] [--train 96000] [--seed 1234]

--help tells everything; docs/data.md says what is written.
"""

from __future__ import annotations

import sys
import warnings

if __name__ == "__main__":
    # Megatron announces at import which optional GPU packages it lacks; none is needed here.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")

    from uoe_parallel.preprocessing.listops_program import main

    sys.exit(main())
