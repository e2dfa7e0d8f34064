"""Reads and trains SentencePiece models. Only this file imports sentencepiece.

Both tokenizer types of Megatron-LM that read a SentencePiece model give the same ids in
Megatron-Core 0.16 (`megatron/core/tokenizers/text/utils/build_tokenizer.py`): the model's ids, no
beginning of sequence, and the model's end of sequence as end of document. (`Llama2Tokenizer` of
Megatron-LM before its tokenizers moved to Megatron-Core put a beginning of sequence before every
document; data of that time has ids that differ by that one token.)

Training is BPE with the settings of Llama 2's model. Cost: some seconds for 10 MB of text on one
core, and memory for all distinct words.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from megatron_dwm.config.errors import UserError
from megatron_dwm.config.outputs import new_outputs
from megatron_dwm.files.command_names import name_of_command
from megatron_dwm.tokenizer.files import read_tokenizer_file
from megatron_dwm.tokenizer.interface import Piece, PieceRole, SpecialTokens

# SentencePiece silently skips longer sentences, so this is larger than any line.
_MAX_LINE_BYTES = 1 << 30
_ONLY_ERRORS = 2


class SentencePieceTokenizer:
    """A tokenizer read from a SentencePiece model file (see `Tokenizer`)."""

    def __init__(self, kind: str, model_path: Path) -> None:
        content = read_tokenizer_file(model_path)
        self.kind = kind
        self.model_path = model_path
        self.content = self.file = content
        self.sha256 = hashlib.sha256(content).hexdigest()
        self._processor = _load(content, model_path)
        self.vocab_size: int = self._processor.get_piece_size()
        self.eod_id: int = self._processor.eos_id()
        self.bos_id = None if self._processor.bos_id() < 0 else self._processor.bos_id()
        self.around = SpecialTokens()
        if self.eod_id < 0:
            raise UserError(
                f"{model_path}: this tokenizer has no end-of-sequence piece (</s>), which marks "
                "the end of a document; train or choose one that has it"
            )

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text` without beginning or end.

        Raises `ValueError` for an unpaired surrogate.
        """
        try:
            return self._processor.encode(text)
        except RuntimeError as error:  # the binding's error for a str that UTF-8 cannot encode
            text.encode("utf-8")
            raise AssertionError("sentencepiece refused text that is valid UTF-8") from error

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of `ids`; control tokens have none."""
        return self._processor.decode([int(i) for i in ids])

    def pieces(self) -> list[Piece]:
        """Returns the whole vocabulary in the order of the ids."""
        return [self._piece(i) for i in range(self.vocab_size)]

    def control_ids(self) -> dict[str, int]:
        """Returns spelling and id of every control piece."""
        model = self._processor
        return {model.id_to_piece(i): i for i in range(self.vocab_size) if model.is_control(i)}

    def _piece(self, piece_id: int) -> Piece:
        model = self._processor
        text, score = model.id_to_piece(piece_id), model.get_score(piece_id)
        return Piece(text=text, score=score, role=self._role(piece_id))

    def _role(self, piece_id: int) -> PieceRole:
        model = self._processor
        if model.is_unknown(piece_id):
            return "unknown"
        if model.is_control(piece_id):
            return "control"
        if model.is_byte(piece_id):
            return "byte"
        return "unused" if model.is_unused(piece_id) else "normal"


def train_sentencepiece(
    texts: Iterable[str],
    *,
    vocab_size: int,
    output: str | Path,
    character_coverage: float = 0.99995,
    on_text_read: Callable[[], None] = lambda: None,
) -> None:
    """Train a BPE model on `texts` (any number of documents) and write it to file `output`.

    Layout and settings are Llama 2's: unk 0, bos 1, eos 2, no padding, bytes at 3..258, digits
    split, a space added before the text, no normalization, runs of spaces kept and allowed as
    pieces. The same texts give the same file. Documents are split into lines first, so that no
    piece spans two lines and a line break stays one byte piece, as in Llama 2's vocabulary.
    Characters beyond `character_coverage` of the text become bytes; `on_text_read` is called
    between reading and learning. Raises `UserError` if the vocabulary does not fit the texts, or if
    `output` exists or cannot be written.
    """
    output = Path(output)
    with new_outputs([output]) as partials:
        lines = _Lines(texts, on_text_read)
        partials[output].write_bytes(_train(lines, vocab_size, character_coverage))


class _Lines:
    """Iterates over lines, and keeps an exception, because SentencePiece turns it into a string."""

    def __init__(self, texts: Iterable[str], on_end: Callable[[], None]) -> None:
        self._texts = texts
        self._on_end = on_end
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[str]:
        try:
            for text in self._texts:
                yield from (line for line in text.split("\n") if line)
            self._on_end()
        except BaseException as error:
            self.error = error
            raise


def _train(lines: _Lines, vocab_size: int, character_coverage: float) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            byte_fallback=True,
            split_digits=True,
            add_dummy_prefix=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            character_coverage=character_coverage,
            max_sentence_length=_MAX_LINE_BYTES,
            num_threads=1,
            minloglevel=_ONLY_ERRORS,
        )
    except RuntimeError as error:
        if lines.error is not None:
            raise lines.error from None
        raise UserError(_explain(str(error), vocab_size)) from error
    return model.getvalue()


def _explain(message: str, vocab_size: int) -> str:
    """Returns SentencePiece's error as one line that says what to do."""
    too_large = re.search(r"too high.*?<= (\d+)", message, re.DOTALL)
    too_small = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if too_large:
        return (
            f"--vocab-size {vocab_size} is more than these texts give; "
            f"take at most {too_large[1]}, or more text"
        )
    if too_small:
        return (
            f"--vocab-size {vocab_size} does not hold the bytes and characters of these texts; "
            f"take at least {too_small[1]}"
        )
    if "sentences_.empty()" in message:
        return "there is no text to train a tokenizer on; every document is empty"
    return "SentencePiece could not train: " + " ".join(message.split())


def _load(content: bytes, path: Path) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(content)
    except RuntimeError:
        raise UserError(
            f"{path}: not a SentencePiece model (expected the .model file that SentencePiece "
            f"or {name_of_command('tokenizer')} wrote)"
        ) from None
    return processor
