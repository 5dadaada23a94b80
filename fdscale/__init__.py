"""fdscale: feature distillation at scale (arXiv 2205.14141)."""

from __future__ import annotations

__version__ = "0.1.0"


class UserError(ValueError):
    """Something the person running fdscale can put right: the CLI prints it as one line and exits with code 2.

    The message says what was wrong, where, what was expected and what to do next.
    """

    exit_code = 2
