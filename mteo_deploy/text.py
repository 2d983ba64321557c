"""Text that comes from outside: read whatever an editor left, and shown so that it cannot act on what shows it.

A bundle's manifest, an engine's record or a checkpoint is written by somebody else. A name in one may hold an escape sequence
that renames a terminal's window, markup that ends a table in an error, or characters that XML forbids.
"""

from __future__ import annotations

import html
import re
import shlex
import unicodedata
from pathlib import Path

from mteo_deploy.errors import InputError

LIMIT = 1 << 28
"""Bytes of a text file: more is not one that a person or a tool of this kind wrote."""

_ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters other than tab and line feed
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # which turn the direction of the text around them
    "\u2028\u2029\ufff9-\ufffb\ufeff\ufffe\uffff"  # line separators, annotations, no characters
    "\ud800-\udfff]"  # halves of a pair: no UTF-8 has them
)


def shown(text: object) -> str:
    """Text as a terminal, XML or a page may show it: each character that would act, and not be seen, as its escape.

    Tabs and line feeds stay.
    """
    return _ACTING.sub(_escape, str(text))


def _escape(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def in_html(text: object) -> str:
    """:func:`shown`, in a page: nothing of it is markup."""
    return html.escape(shown(text))


def one_line(text: object) -> str:
    """:func:`shown` on one line, spaces and line ends folded."""
    return shown(" ".join(str(text).split()))


def command(*words: object) -> str:
    """A command to be pasted into a shell: words quoted where they need it."""
    return shlex.join(map(str, words))


def read_text(path: Path, what: str, way_out: str = "check the path and the file") -> str:
    """A UTF-8 text file, with or without a byte order mark; its line ends as ``\\n``.

    Args:
        what: it should be, for the error: ``a TOML file of budgets``.

    Raises:
        InputError: for no file, one that is too large or no regular file, or other bytes than UTF-8.
    """
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"expected {what} at {path}; found no regular file; {way_out}")
        if (size := path.stat().st_size) > LIMIT:
            raise InputError(f"expected {what} at {path}; found {size} bytes, more than {LIMIT}; {way_out}")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"expected {what} in UTF-8 at {path}; {error}; {way_out}") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise InputError(f"expected {what} at {path}; {getattr(error, 'strerror', None) or error}; {way_out}") from None


def text_lines(text: str) -> list[str]:
    """The lines that are not empty, without space around them; only line ends divide them, which U+2028 is not."""
    return [line.strip() for line in re.split(r"\r\n|\r|\n", text) if line.strip()]


def check_prompt(text: object) -> str:
    """A prompt, as tokenizers can take it.

    Raises:
        InputError: for what is no text, or holds half a surrogate pair: bytes of a shell that are no UTF-8, JSON's ``\\ud800``.
    """
    if not isinstance(text, str):
        raise InputError(f"expected prompts as text; found {type(text).__name__}")
    if half := next((c for c in text if unicodedata.category(c) == "Cs"), None):
        raise InputError(
            f"expected prompts of whole characters; found {one_line(text)!r} with half a surrogate pair (U+{ord(half):04X}); "
            "write it in UTF-8"
        )
    return text
