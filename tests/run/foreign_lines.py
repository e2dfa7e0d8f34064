"""Lines that no run writes into its metrics.jsonl."""

from __future__ import annotations

FOREIGN = {
    "list": b"[1,2]",
    "null": b"null",
    "number": b"3",
    "object": b'{"a": 1}',
    "half a record": b'{"step": 1, "phase": "train", "lo',
    "no count": b'{"step": "one", "phase": "train"}',
    "no number": b'{"step": null, "phase": "train"}',
    "no update": b'{"step": 1, "update": [], "phase": "weighting"}',
    "no phase": b'{"step": 1, "phase": ["train"]}',
    "not UTF-8": b'{"step": 1, "phase": "tr\xff\xfein"}',
    "zeros": bytes(40),
    "deep": b"[" * 100_000,
    "separators": '{"step": 1,\u2028"phase": 2}'.encode(),
}
