"""The one exception that means "the user can mend this"."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in a config, a file or a launch, told in words the user can act on.

    Raised with the same message on every rank (checks that see only one rank's data are
    reduced first), so that all ranks leave together. The program prints the message once, on
    rank 0 and without a traceback, and every rank exits with code 2.
    """
