"""Text from data, made safe to print on a terminal.

Names of domains, metadata, file names and messages of libraries are other people's text. An escape
sequence or a line break in them could move the cursor, change colors or look like our own output.
Code that prints them escapes such characters.
"""

from __future__ import annotations

import unicodedata

# Controls (including line breaks, tabs and escapes), invisible characters that change the direction
# of writing, halves of surrogate pairs, and separators of lines and paragraphs.
_NOT_SHOWN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def printable(text: object, *, keep: str = "") -> str:
    """Returns `str(text)` on one line, with `\\x1b` instead of an escape character.

    keep: characters that are not escaped.

    >>> print(printable("name\\x1b[31m\\n"))
    name\\x1b[31m\\n
    """
    return "".join(_spelled(character, keep) for character in str(text))


def _spelled(character: str, keep: str) -> str:
    if character in keep or unicodedata.category(character) not in _NOT_SHOWN:
        return character
    return character.encode("unicode_escape").decode("ascii")
