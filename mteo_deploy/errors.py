"""Errors a user can act on. Each message says what was expected, what was found, and the way out.

The command line prints the message on one line and exits with ``exit_code``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


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


@contextmanager
def border(what: str, way_out: str, error: type[MteoError] = InputError) -> Iterator[None]:
    """A call into another library: whatever exception it ends in becomes one line. Our own errors pass.

    Args:
        what: what was expected or being done, the beginning of the line: ``expected weights as safetensors in DIR``.
        way_out: its end, what mends it: the command or argument.
        error: the error's type.

    Raises:
        MteoError: of type ``error``, which names the other library's exception and the first line of its message.
    """
    try:
        yield
    except MteoError:
        raise
    except BaseException as cause:
        if not isinstance(cause, Exception) and type(cause).__name__ != "PanicException":  # of libraries written in Rust
            raise
        reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), "no message")
        raise error(f"{what}; {type(cause).__name__}: {reason}; {way_out}") from cause
