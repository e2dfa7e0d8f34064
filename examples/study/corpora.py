"""Makes a corpus of the study from its training text."""

from __future__ import annotations

from pathlib import Path

from examples.study.commands import run_tool
from examples.study.spec import NATURAL, PACKED

PREFIX = "corpus_text_document"
JUNK_FRACTION = 0.5
"""of the bytes"""


def write_corpus(corpus: str, seed: int, text: Path, tokenizer: Path, folder: Path) -> None:
    """Write the indexed files of a corpus as `folder`/PREFIX.

    `natural` has the text alone; `junk` as many bytes of junk (three kinds, of which no method
    knows); `packed` the same in short documents.
    """
    if corpus != NATURAL:
        mixed = folder / "mixed.jsonl"
        run_tool("add_junk", input=text, output=mixed, fraction=JUNK_FRACTION, seed=seed)
        text = mixed
    if corpus == PACKED:
        short, cut = folder / "short.jsonl", "../examples/cut_documents"
        run_tool(cut, input=text, output=short, tokenizer=tokenizer, seed=seed)
        text = short
    run_tool(
        "preprocess_data",
        *("--append-eod", "--metadata-keys", "domain"),
        input=text,
        output_prefix=folder / PREFIX.removesuffix("_text_document"),
        tokenizer_type="SentencePieceTokenizer",
        tokenizer_model=tokenizer,
    )
    for left in folder.glob("*.jsonl"):
        left.unlink()
