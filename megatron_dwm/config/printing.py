"""Text that comes from data, as a terminal may be shown it.

Names of domains, metadata, file names and what a library says of a file are other people's text: an
escape sequence or a line break in them would move the cursor, recolour the terminal or look like a
line of ours. Whatever prints them spells such characters out.
"""

from __future__ import annotations

import unicodedata

# Controls (line breaks, tabs and escapes among them), invisible marks that turn the direction of
# writing, halves of surrogate pairs, and separators of lines and paragraphs.
_NOT_SHOWN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def printable(text: object, *, keep: str = "") -> str:
    """`str(text)` on one line that a terminal shows as it is: `\\x1b` instead of an escape.

    keep: characters that are let through all the same.
    """
    return "".join(_spelled(character, keep) for character in str(text))


def _spelled(character: str, keep: str) -> str:
    if character in keep or unicodedata.category(character) not in _NOT_SHOWN:
        return character
    return character.encode("unicode_escape").decode("ascii")
