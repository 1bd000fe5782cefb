"""`python -m uoe_parallel.doctor`"""

from __future__ import annotations

import sys
import warnings

# Said at import by Megatron of packages that are optional, which the tables list anyhow.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")

from uoe_parallel.doctor.program import main  # noqa: E402

sys.exit(main())
