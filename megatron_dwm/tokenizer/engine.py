"""Encodes many texts at once, as fast as possible with the same ids as the reference tokenizer.

gigatoken encodes BPE vocabularies some twenty times faster than sentencepiece on one core. It is
used only if it gives the reference's ids on the texts of trial_texts.py. Otherwise the reference
encodes, and the choice says why. Only this file imports gigatoken.

gigatoken reads the spelling of a special token ("</s>") in a document as that token. So it loads
the vocabulary without special tokens; then their spelling is text like any other.

Cost of choosing: about half a second for 32,000 pieces, mostly for reading their merges. The result
is remembered (engine_memory.py), and then costs some milliseconds.
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
        """Returns the ids of `texts`, none of which has an unpaired surrogate."""
        ...


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """The engine that encodes, and a warning if it is not the fast one."""

    name: str
    warning: str | None
    """one line for the user if the reference has to encode"""
    build: Callable[[], Engine]
    """makes a new engine; each thread has its own, so that caches do not wait for each other"""


class ReferenceEngine:
    """Encodes with the reference, one text at a time. Both libraries release Python's lock, so
    threads run in parallel.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        """Returns the ids of `texts`."""
        rows = [np.array(self._tokenizer.encode(text), dtype=np.int64) for text in texts]
        ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
        return EncodedTexts(ids=np.concatenate(rows or [np.zeros(0, np.int64)]), ends=ends)


class GigatokenEngine:
    """Encodes with gigatoken on the calling thread."""

    def __init__(self, definition: str) -> None:
        import gigatoken

        self._tokenizer = gigatoken.Tokenizer.from_json(definition)

    def encode_texts(self, texts: Sequence[str]) -> EncodedTexts:
        """Returns the ids of `texts`."""
        if not texts:
            return EncodedTexts(ids=np.zeros(0, np.uint32), ends=np.zeros(0, np.int64))
        layout = self._tokenizer.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets.data)
        assert offsets[0] == 0
        return EncodedTexts(ids=np.asarray(layout.content.data), ends=offsets[1:])


def remembered_engine(tokenizer: Tokenizer) -> EngineChoice:
    """`choose_engine`, which skips the trial if its result for this tokenizer is remembered."""
    verdict = recall(tokenizer)
    if verdict is None:
        verdict = _try(tokenizer)
        remember(tokenizer, verdict)
    return _choice(tokenizer, verdict)


def choose_engine(tokenizer: Tokenizer) -> EngineChoice:
    """Choose gigatoken if it gives the ids of `tokenizer`, else `tokenizer` itself with a warning.

    Raises `UserError` for a tokenizer that reads the spelling of a control token in a text as that
    token: any document could then end itself.
    """
    return _choice(tokenizer, _try(tokenizer))


def _choice(tokenizer: Tokenizer, verdict: Verdict) -> EngineChoice:
    if verdict.why_not is not None:
        return _fallback(tokenizer, verdict.why_not)
    definition = verdict.definition
    return EngineChoice(name="gigatoken", warning=None, build=lambda: GigatokenEngine(definition))


def _try(tokenizer: Tokenizer) -> Verdict:
    """Compare both on the trial's texts. Raises `UserError` as `choose_engine` does."""
    failure: BaseException | None = None
    definition = _Definition(text="", added_tokens=())
    # Whatever error an optional accelerator raises, encode without it and warn.
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
    """A vocabulary in gigatoken's format."""

    text: str
    added_tokens: tuple[str, ...]
    """the tokenizer's added tokens, with the special ones, which `text` leaves out"""


def without_special_tokens(tokenizer: Tokenizer) -> _Definition:
    """Returns the vocabulary in gigatoken's format, without special tokens."""
    if tokenizer.kind in JSON_KINDS:
        definition = json.loads(tokenizer.content)
    else:
        # Not a public name of gigatoken; pyproject.toml pins the exact version.
        from gigatoken._load.sentencepiece import sentencepiece_to_tokenizer_json

        definition = json.loads(sentencepiece_to_tokenizer_json(tokenizer.content))
    added = definition.get("added_tokens") or []
    definition["added_tokens"] = [token for token in added if not token["special"]]
    definition["post_processor"] = None  # it adds beginnings of sequence
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
