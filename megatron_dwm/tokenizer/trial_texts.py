"""Texts on which a fast engine has to give the reference's ids before it is used.

They are awkward text, the spelling of every control token, pieces of the vocabulary, and every
added token in every context that its flags concern (single_word, lstrip, rstrip, normalized). A
tokenizer finds added tokens in a text first, by rules of their own, so each one has to be tried.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

from megatron_dwm.tokenizer.interface import Tokenizer

AWKWARD_TEXTS = (
    "",
    " ",
    "  ",
    " leading",
    "trailing  ",
    "double  spaces   and    more",
    "a" + " " * 70 + "b",
    "\ttab\t\ttabs\t \t",
    "line\nline\n\nline\r\n \n",
    "\u2581 the sign of a space \u2581\u2581",
    "<0x41> <0x0A> <pad> <unk>",
    "0123456789 3.14159 1,000,000 \u0663\u0664 \u2167",
    "na\u00efve caf\u00e9 cafe\u0301 \u00a0\u2009\u3000 \ufb01 \u2460 \uff21",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b\u3061\u306f \uc548\ub155",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd \u0928\u092e\u0938\u094d\u0924\u0947",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1ec\U0001f1e7 \u2764\ufe0f",
    "\x00\x01\x1f\x7f\x85\u2028\u200b\ufeff\ufffd\U0010ffff",
    "aaaaaaaaaaa ababababa ------- ======= ........ ((((()))))",
    "I'll we've DON'T it's O'Neill \u2019s isn\u2019t",
    "def f(x):\n    return x ** 2  # \u2202f/\u2202x\n\n\n",
    'https://example.org/a?b=c&d=%20#e  <div class="x">&nbsp;</div>',
)
_PIECES_TRIED = 1024
# (before, after) an added token: nothing, spaces, parts of words, other characters.
_CONTEXTS = (
    *(("", ""), ("a", "b"), ("a", ""), ("", "b"), ("1", "1"), ("_", "_"), ("\u00e9", "\u00e9")),
    *((" ", " "), ("  ", "  "), ("a ", " b"), ("a  ", "  b"), (" ", ""), ("", " ")),
    *(("a\n", "\nb"), ("\t", "\t"), ("(", ")"), ("a ", "."), (" a", "b "), ("\u4f60", "\u4f60")),
)


def trial_texts(tokenizer: Tokenizer, added_tokens: Sequence[str]) -> list[str]:
    """Returns the texts for `tokenizer`, whose definition adds these tokens to the vocabulary."""
    texts = list(AWKWARD_TEXTS)
    for spelling in tokenizer.control_ids():
        texts += [spelling, f"a{spelling}b", f" {spelling} ", f"{spelling}{spelling}\n"]
    texts += _texts_of_added(added_tokens)
    pieces = [piece.text.replace("\u2581", " ") for piece in tokenizer.pieces()]
    chosen = pieces[:: max(1, len(pieces) // _PIECES_TRIED)]
    return texts + chosen + [f"x{piece}x  {piece}" for piece in chosen]


def _texts_of_added(added_tokens: Sequence[str]) -> Iterator[str]:
    for token, following in zip(added_tokens, [*added_tokens[1:], *added_tokens[:1]], strict=True):
        yield from (f"{before}{token}{after}" for before, after in _CONTEXTS)
        yield from (
            f"{token}{token}",
            f"{token} {token}",
            f"a{token}{token}b",
            f"{token}{token[:1]}",
        )
        yield from (f"{token}{following}", f"{token[:-1]} {token[-1:]}", f"{token[:1]}{token}")
        # Texts that a normalizer may turn into the token, or the token into them.
        for other in {token.lower(), token.upper(), token.title()} - {token}:
            yield from (other, f" {other} ", f"a{other}b")
        for form in ("NFC", "NFD", "NFKC", "NFKD"):
            other = unicodedata.normalize(form, token)
            if other != token:
                yield from (other, f" {other} ", f"a{other}b")
