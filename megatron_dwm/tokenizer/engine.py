"""Many texts to ids at once, as fast as can be with the ids of the reference.

gigatoken encodes BPE vocabularies some twenty times faster than sentencepiece on a core. It is used
only where it gives the reference's ids, which is tried on the texts of trial_texts.py; where it
does not, the reference itself does the work and the choice says why. This is the only file that
imports gigatoken.

gigatoken reads the spelling of a special token ("</s>") in a document as that token. So its
vocabulary is loaded without special tokens: then their spelling is text like any other.

Cost of choosing: about half a second for 32,000 pieces, most of it the reading of their merges; it
is remembered (engine_memory.py), and costs some milliseconds then.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_dwm.config.errors import UserError
from megatron_dwm.tokenizer.engine_memory import Verdict, recall, remember
from megatron_dwm.tokenizer.interface import JSON_KINDS, Tokenizer
from megatron_dwm.tokenizer.trial_texts import trial_texts


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


def remembered_engine(tokenizer: Tokenizer) -> EngineChoice:
    """`choose_engine`, with the trial only where this user has none of this tokenizer yet."""
    verdict = recall(tokenizer)
    if verdict is None:
        verdict = _try(tokenizer)
        remember(tokenizer, verdict)
    return _choice(tokenizer, verdict)


def choose_engine(tokenizer: Tokenizer) -> EngineChoice:
    """gigatoken if it gives the ids of `tokenizer`, else `tokenizer` itself with a warning.

    Raises `UserError` for a tokenizer that turns the spelling of one of its control tokens in a
    text into that token: any document could then end itself.
    """
    return _choice(tokenizer, _try(tokenizer))


def _choice(tokenizer: Tokenizer, verdict: Verdict) -> EngineChoice:
    if verdict.why_not is not None:
        return _fallback(tokenizer, verdict.why_not)
    definition = verdict.definition
    return EngineChoice(name="gigatoken", warning=None, build=lambda: GigatokenEngine(definition))


def _try(tokenizer: Tokenizer) -> Verdict:
    """Encode the trial's texts with both; `UserError` as `choose_engine`."""
    failure: BaseException | None = None
    definition = _Definition(text="", added_tokens=())
    # Any way in which an optional accelerator fails means: do without it, and say so.
    try:
        definition = without_special_tokens(tokenizer)
    except BaseException as error:
        failure = error
    texts = trial_texts(tokenizer, definition.added_tokens)
    expected = [tokenizer.encode(text) for text in texts]
    _refuse_injection(tokenizer, texts, expected)
    try:
        if failure is not None:
            raise failure
        found = GigatokenEngine(definition.text).encode_texts(texts)
    except BaseException as error:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        return Verdict(why_not=" ".join(str(error).split())[:160], definition="")
    for text, ids, theirs in zip(texts, expected, _rows(found), strict=True):
        if ids != theirs:
            return Verdict(why_not=f"it gives other ids for {text[:40]!r}", definition="")
    return Verdict(why_not=None, definition=definition.text)


@dataclass(frozen=True, kw_only=True)
class _Definition:
    """A vocabulary as gigatoken reads it."""

    text: str
    added_tokens: tuple[str, ...]
    """of the tokenizer, the special ones among them, which `text` leaves out"""


def without_special_tokens(tokenizer: Tokenizer) -> _Definition:
    """The vocabulary as gigatoken reads it, in which no text is special."""
    if tokenizer.kind in JSON_KINDS:
        definition = json.loads(tokenizer.content)
    else:
        # Not a public name of gigatoken: held by its exact version in setup.py.
        from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

        definition = json.loads(sentencepiece_to_tokenizer_json(tokenizer.content))
    added = definition.get("added_tokens") or []
    definition["added_tokens"] = [token for token in added if not token["special"]]
    definition["post_processor"] = None  # adds beginnings of sequence
    definition["truncation"] = definition["padding"] = None
    return _Definition(
        text=json.dumps(definition), added_tokens=tuple(token["content"] for token in added)
    )


def _fallback(tokenizer: Tokenizer, why: str) -> EngineChoice:
    name = "tokenizers" if tokenizer.kind in JSON_KINDS else "sentencepiece"
    return EngineChoice(
        name=name,
        warning=f"{tokenizer.model_path}: gigatoken cannot be used with this tokenizer ({why}); "
        f"{name} does the work, with the same ids but several times slower",
        build=lambda: ReferenceEngine(tokenizer),
    )


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
