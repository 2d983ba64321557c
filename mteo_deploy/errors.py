"""Errors a user can act on. Each message says what was expected, what was found, and the way out.

The command line prints the message on one line and exits with ``exit_code``.
"""

from __future__ import annotations


class MteoError(Exception):
    """Base of every error this package raises on bad input or a bad environment (exit code 2)."""

    exit_code = 2


class InputError(MteoError):
    """An argument or an input file is not what the verb takes."""


class BundleError(MteoError):
    """A bundle or a built engine is missing, altered, truncated, stale or of another schema."""


class MissingPackageError(MteoError):
    """A package of an extra is not installed; the message names the command that installs it."""


class EngineError(MteoError):
    """An engine refused to build, open or run, or is on another device than asked for."""
