"""How charts look."""

from __future__ import annotations

from typing import Any

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "figure.titlesize": 13,
    "figure.dpi": 120,
    "savefig.dpi": 120,
    "legend.frameon": False,
}
"""For `matplotlib.rc_context`."""
