"""Many texts to ids at once, as fast as can be with the ids of the reference.

gigatoken encodes BPE vocabularies some twenty times faster than sentencepiece on a core. It is used
only where it gives the reference's ids, which is tried once, on awkward text, on the spelling of
every control token and on pieces of the vocabulary; where it does not, the reference itself does
the work and the choice says why. gigatoken is the only import of it in the package.

gigatoken reads the spelling of a special token ("</s>") in a document as that token. So its
vocabulary is loaded without special tokens: then their spelling is text like any other.

Cost of choosing: about half a second for 32,000 pieces, most of it gigatoken's loading.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_dwm.config.errors import UserError
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


@dataclass(frozen=True, kw_only=True)
class EncodedTexts:
    """Ids of several texts one after the other; those of text i are `ids[ends[i-1]:ends[i]]`."""

    ids: np.ndarray
    """unsigned or signed integers [total]"""
    ends: np.ndarray
    """int64 [texts]: where each text ends"""


class Engine(Protocol):
    """Encodes texts; used by one thread at a time."""

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        """Ids of `texts`, none of which holds an unpaired surrogate."""


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """The engine that encodes, and why if it is not the fast one."""

    name: str
    warning: str | None
    """one line for the user where the reference has to do the work"""
    build: Callable[[], Engine]
    """a new engine: each thread has its own, so that their caches do not wait for each other"""


class ReferenceEngine:
    """The reference, text after text. Threads run in parallel: both libraries free the lock."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        """Ids of `texts`."""
        rows = [np.array(self._tokenizer.encode(text), dtype=np.int64) for text in texts]
        ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
        return EncodedTexts(ids=np.concatenate(rows or [np.zeros(0, np.int64)]), ends=ends)


class GigatokenEngine:
    """gigatoken on the calling thread."""

    def __init__(self, definition: str) -> None:
        import gigatoken

        self._tokenizer = gigatoken.Tokenizer.from_json(definition)

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        """Ids of `texts`."""
        if not texts:
            return EncodedTexts(ids=np.zeros(0, np.uint32), ends=np.zeros(0, np.int64))
        layout = self._tokenizer.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        assert offsets[0] == 0
        return EncodedTexts(ids=np.asarray(layout.content.data), ends=offsets[1:])


def choose_engine(tokenizer: Tokenizer) -> EngineChoice:
    """gigatoken if it gives the ids of `tokenizer`, else `tokenizer` itself with a warning.

    Raises `UserError` for a tokenizer that turns the spelling of one of its control tokens in a
    text into that token: any document could then end itself.
    """
    texts = _trial_texts(tokenizer)
    expected = [tokenizer.encode(text) for text in texts]
    _refuse_injection(tokenizer, texts, expected)
    try:
        definition = without_special_tokens(tokenizer)
        found = GigatokenEngine(definition).encode_texts(texts)
    # Any way in which an optional accelerator fails means: do without it, and say so.
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        return _fallback(tokenizer, " ".join(str(error).split())[:160])
    for text, ids, theirs in zip(texts, expected, _rows(found), strict=True):
        if ids != theirs:
            return _fallback(tokenizer, f"it gives other ids for {text[:40]!r}")
    return EngineChoice(name="gigatoken", warning=None, build=lambda: GigatokenEngine(definition))


def without_special_tokens(tokenizer: Tokenizer) -> str:
    """The vocabulary as gigatoken reads it, in which no text is special."""
    if tokenizer.kind == "HuggingFaceTokenizer":
        definition = json.loads(tokenizer.content)
    else:
        # Not a public name of gigatoken: held by its exact version in setup.py.
        from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

        definition = json.loads(sentencepiece_to_tokenizer_json(tokenizer.content))
    added = definition.get("added_tokens") or []
    definition["added_tokens"] = [token for token in added if not token["special"]]
    definition["post_processor"] = None  # adds beginnings of sequence
    definition["truncation"] = definition["padding"] = None
    return json.dumps(definition)


def _fallback(tokenizer: Tokenizer, why: str) -> EngineChoice:
    name = "tokenizers" if tokenizer.kind == "HuggingFaceTokenizer" else "sentencepiece"
    return EngineChoice(
        name=name,
        warning=f"{tokenizer.model_path}: gigatoken cannot be used with this tokenizer ({why}); "
        f"{name} does the work, with the same ids but several times slower",
        build=lambda: ReferenceEngine(tokenizer),
    )


def _trial_texts(tokenizer: Tokenizer) -> list[str]:
    texts = list(AWKWARD_TEXTS)
    for spelling in tokenizer.control_ids():
        texts += [spelling, f"a{spelling}b", f" {spelling} ", f"{spelling}{spelling}\n"]
    pieces = [piece.text.replace("\u2581", " ") for piece in tokenizer.pieces()]
    chosen = pieces[:: max(1, len(pieces) // _PIECES_TRIED)]
    return texts + chosen + [f"x{piece}x  {piece}" for piece in chosen]


def _refuse_injection(
    tokenizer: Tokenizer, texts: Sequence[str], expected: Sequence[list[int]]
) -> None:
    controls = {*tokenizer.control_ids().values(), tokenizer.eod_id}
    for text, ids in zip(texts, expected, strict=True):
        if controls & set(ids):
            raise UserError(
                f"{tokenizer.model_path}: the text {text[:40]!r} becomes a control token, so a "
                "document could end itself; use a tokenizer that keeps control tokens apart"
            )


def _rows(encoded: EncodedTexts) -> list[list[int]]:
    return [row.tolist() for row in np.split(encoded.ids, encoded.ends[:-1])]
