"""Tokenizers from Hugging Face `tokenizer.json` files. Only this file imports tokenizers.

Ids are those of `transformers` with one intended difference: the spelling of a special token in a
document is text, as with `split_special_tokens=True`, so that no document can end itself.

By default Megatron-LM d98e8a6 takes `transformers`' ids with the special tokens that the file's
post-processor puts around a text (Llama 3's beginning), and 0.16.1 takes them without. Here
`around` has these tokens, apart from the text's ids.

The end of a document is the `eos_token` of the `tokenizer_config.json` beside the file; without
one, a special token with a usual name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from megatron_dwm.config.errors import UserError
from megatron_dwm.tokenizer.files import read_tokenizer_file
from megatron_dwm.tokenizer.interface import Piece, PieceRole, SpecialTokens

FILE_NAME = "tokenizer.json"
_PROBES = ("a", "two words", "\n", "1 2")
_CONFIG_NAME = "tokenizer_config.json"
_USUAL_ENDS = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<eos>", "<|im_end|>")
_USUAL_BEGINNINGS = ("<s>", "<|begin_of_text|>", "<bos>")


class HuggingFaceTokenizer:
    """A tokenizer read from a `tokenizer.json` or its directory (see `Tokenizer`)."""

    kind = "HuggingFaceTokenizer"

    def __init__(self, path: Path, *, include_special_tokens: bool = False) -> None:
        self.model_path = path / FILE_NAME if path.is_dir() else path
        content = read_tokenizer_file(self.model_path)
        self._load_vocabulary(content, file=content)
        self._name_ends(_named_tokens(self.model_path.with_name(_CONFIG_NAME)))
        if include_special_tokens:
            self.around = _special_tokens(self._tokenizer, self.model_path)

    def _load_vocabulary(self, content: bytes, *, file: bytes) -> None:
        """Load the vocabulary of a tokenizer.json, made from a file with these bytes."""
        self.content, self.file = content, file
        self.sha256 = hashlib.sha256(file).hexdigest()
        self.around = SpecialTokens()
        self._tokenizer: tokenizers.Tokenizer = _load(content, self.model_path)
        self._unknown = _unknown_token(content)
        self._controls = self._control_ids()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        # Megatron-LM counts the entries. Ids may have holes, and every id has to be below the size.
        self.vocab_size: int = max(len(vocabulary), 1 + max(vocabulary.values(), default=-1))

    def _name_ends(self, named: dict[str, str]) -> None:
        """Set the ids of a document's end and beginning from the names of the tokens."""
        end = self._named_id(named.get("eos_token"), _USUAL_ENDS)
        if end is None:
            raise UserError(
                f"{self.model_path}: the token that ends a document is not known; put a "
                f'{_CONFIG_NAME} with "eos_token" beside it'
            )
        self.eod_id: int = end
        self.bos_id = self._named_id(named.get("bos_token"), _USUAL_BEGINNINGS)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text` without beginning or end.

        Raises `ValueError` for an unpaired surrogate.
        """
        text.encode("utf-8")
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; control tokens have none."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def pieces(self) -> list[Piece]:
        """Returns the whole vocabulary in the order of the ids; ids without an entry are unused."""
        pieces = [Piece(text="", score=0.0, role="unused")] * self.vocab_size
        for text, i in self._tokenizer.get_vocab(with_added_tokens=True).items():
            pieces[i] = Piece(text=text, score=0.0, role=self._role(text))
        return pieces

    def _role(self, text: str) -> PieceRole:
        if text == self._unknown:
            return "unknown"
        return "control" if text in self._controls else "normal"

    def control_ids(self) -> dict[str, int]:
        """Returns spelling and id of every special token except the unknown one."""
        return dict(self._controls)

    def _control_ids(self) -> dict[str, int]:
        added = self._tokenizer.get_added_tokens_decoder()
        special = {token.content: i for i, token in added.items() if token.special}
        return {text: i for text, i in special.items() if text != self._unknown}

    def _named_id(self, named: str | None, usual: Sequence[str]) -> int | None:
        if named is not None:
            token_id = self._tokenizer.token_to_id(named)
            if token_id is None:
                raise UserError(
                    f"{self.model_path.with_name(_CONFIG_NAME)}: {named!r} is no token of the "
                    f"vocabulary in {self.model_path.name}; name one that it has"
                )
            return token_id
        return next((self._controls[text] for text in usual if text in self._controls), None)


def _load(content: bytes, path: Path) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception:  # the binding raises bare Exception
        raise UserError(
            f"{path}: not a Hugging Face tokenizer (expected a tokenizer.json or a directory "
            "with one)"
        ) from None
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _special_tokens(tokenizer: tokenizers.Tokenizer, path: Path) -> SpecialTokens:
    """Returns the special tokens that the file's post-processor puts around a text.

    Raises `UserError` if they depend on the text.
    """
    found = set()
    for text in _PROBES:
        plain = tokenizer.encode(text, add_special_tokens=False).ids
        whole = tokenizer.encode(text, add_special_tokens=True)
        first = (*whole.special_tokens_mask, 0).index(0)
        last = first + len(plain)
        if whole.ids[first:last] != plain:
            first = -1  # the tokens do not surround the text
        found.add((first, tuple(whole.ids[:first]), tuple(whole.ids[last:])))
    if len(found) > 1 or -1 in {first for first, *_ in found}:
        raise UserError(
            f"{path}: its special tokens are not before and after the text; pass "
            "--tokenizer-hf-no-include-special-tokens to leave them out"
        )
    [(_, before, after)] = found
    return SpecialTokens(before=before, after=after)


def _unknown_token(content: bytes) -> str | None:
    """Returns the spelling of the unknown token; Unigram models name it by its id."""
    model = json.loads(content).get("model", {})
    if model.get("type") == "Unigram" and model.get("unk_id") is not None:
        return model["vocab"][model["unk_id"]][0]
    return model.get("unk_token")


def _named_tokens(path: Path) -> dict[str, str]:
    """Returns `eos_token` and `bos_token` of a `tokenizer_config.json`, those that it names."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise UserError(f"{path}: not a JSON file") from None
    found = {}
    for name in ("eos_token", "bos_token"):
        token = config.get(name) if isinstance(config, dict) else None
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[name] = token
    return found
