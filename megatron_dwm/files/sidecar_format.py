"""`P.meta.parquet`, the sidecar of an indexed dataset: one row a document, in the `.idx`'s order.

Columns: `source_file` (string, as on the command line), `record` (int64, 0-based position in that
file: the line index for JSON Lines), `tokens` (int64, the end of document included; 0 for an empty
document, which has a row here and a border in the `.idx` but no sequence), then one column for each
metadata key under its dotted name. So row `d` is document `d`, and where no text is a list of
sequences, sequence `i` of the `.idx` is the `i`-th row with `tokens > 0`.

The schema's own metadata has the facts: which tokenizer made the ids, which id ends a document and
which special tokens are around a text. Training and merging compare them.

Row groups have 65,536 rows whatever the chunks and interruptions were, so the file's bytes depend
on its content only. Memory is one row group.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

_OWN_TYPES = {"source_file": pa.string(), "record": pa.int64(), "tokens": pa.int64()}
OWN_COLUMNS = tuple(_OWN_TYPES)
ROWS_IN_GROUP = 1 << 16

Facts = Mapping[str, str]
TOKENIZER_KIND = "tokenizer_kind"
TOKENIZER_SHA256 = "tokenizer_sha256"
VOCAB_SIZE = "vocab_size"
APPEND_EOD = "append_eod"
EOD_ID = "eod_id"
TOKENS_BEFORE = "special_tokens_before"
TOKENS_AFTER = "special_tokens_after"
INPUTS_OF_SHARDS = "inputs_of_shards_sha256"
"""of a shard: the list of all inputs that was cut; shards of other lists do not go together"""
_OLDER = {TOKENS_BEFORE: "", TOKENS_AFTER: ""}
"""older versions put no special tokens around a text and did not say so"""


def sidecar_schema(metadata: Iterable[tuple[str, pa.DataType]], facts: Facts) -> pa.Schema:
    """The schema of a sidecar with these columns after its own, and these facts."""
    return pa.schema([*_OWN_TYPES.items(), *metadata], metadata=dict(facts))


def facts_in(schema: pa.Schema) -> dict[str, str]:
    """The facts that a sidecar's schema records, by name; what is not UTF-8 is spelled out."""
    metadata: dict[bytes, bytes] = schema.metadata or {}
    return {_text(name): _text(value) for name, value in metadata.items()}


def read_facts(path: Path) -> dict[str, str]:
    """The facts that a sidecar records, by name. Raises OSError, or ValueError if it is none."""
    return facts_in(pq.read_schema(path))


def spell_ids(ids: Iterable[int]) -> str:
    """The ids of special tokens as a fact has them."""
    return " ".join(map(str, ids))


def special_tokens(facts: Facts) -> tuple[str, str]:
    """Ids before and after a text, spelled; empty where there are none."""
    return facts.get(TOKENS_BEFORE, ""), facts.get(TOKENS_AFTER, "")


def lacks_end(facts: Facts) -> bool:
    """True if neither the facts nor the tokenizer's file say which id ends a document."""
    return facts.get(TOKENIZER_KIND) == "HuggingFaceTokenizer" and EOD_ID not in facts


def _of_ids(facts: Facts) -> dict[str, str]:
    """The facts about ids, which are all but the one about shards."""
    return {name: value for name, value in facts.items() if name != INPUTS_OF_SHARDS}


def facts_that_differ(first: Facts, second: Facts) -> list[str]:
    """Names of the facts about ids in which two sidecars differ.

    An end-of-document id that an older version did not record may be any.
    """
    pair = (first, second)
    before, after = ({**_OLDER, **facts} if facts else facts for facts in map(_of_ids, pair))
    names = sorted({*before, *after})
    differing = [name for name in names if before.get(name) != after.get(name)]
    both_have_end = EOD_ID in before and EOD_ID in after
    return [n for n in differing if n != EOD_ID or both_have_end or not (before and after)]


def write_row_groups(path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
    """Write `tables`, rows in order, in row groups of equal size."""
    with pq.ParquetWriter(path, schema) as writer:
        held: list[pa.Table] = []
        num_held = 0
        for table in tables:
            held.append(table)
            num_held += table.num_rows
            while num_held >= ROWS_IN_GROUP:
                joined = pa.concat_tables(held)
                writer.write_table(joined.slice(0, ROWS_IN_GROUP).combine_chunks())
                held = [joined.slice(ROWS_IN_GROUP)]
                num_held -= ROWS_IN_GROUP
        if num_held:
            writer.write_table(pa.concat_tables(held).combine_chunks())


def _text(content: bytes) -> str:
    return content.decode("utf-8", "backslashreplace")
