"""How a run ends early: exit codes, and the exceptions behind them."""

from __future__ import annotations

USER_ERROR_EXIT_CODE = 2
"""Starting again does not help."""
HANG_EXIT_CODE = 3


class UserError(Exception):
    """A mistake in a config, a file or a launch, told in words the user can act on.

    Raised with the same message on every rank (checks that see only one rank's data are
    reduced first), so that all ranks leave together. The program prints the message once, on
    rank 0 and without a traceback, and every rank exits with code 2.
    """


class Interrupted(Exception):
    """A signal asked the run to leave, and it did between two steps. Raised on every rank, of which
    one or more got the signal; the program exits with 128 + `signal`, which launchers take for a
    failure that starting again mends."""

    def __init__(self, signal: int) -> None:
        super().__init__(signal)
        self.signal = signal
