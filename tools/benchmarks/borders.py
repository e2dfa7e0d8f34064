"""`borders`: attention inside documents against plain causal attention, in an LLM and alone.

A pass is forward and backward of one micro-batch; the pieces and their buckets are made inside it,
as in a run. Documents follow each other and are cut at the end of a row. Attention alone is also
measured with a mask [B, 1, S, S]. With the same borders a step that weighs documents, by the LLM's
features, is compared with one that weighs rows. Memory is the peak of a process of its own above
what it has before its first pass.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.memory import PEAK_COLUMNS, peak_bytes, peak_of_child, peak_row, used_bytes
from benchmarks.settings import Settings
from benchmarks.subject import LLM, Subject, build_subject, opened
from benchmarks.table import heading, markdown, ratio_table
from benchmarks.timing import alternate, timed
from megatron_dwm.config import UserError
from megatron_dwm.model.layers.local import packed_pieces
from megatron_dwm.model.layers.pieces import pieces_of

PLAIN = "plain causal attention"
AGAIN = "plain causal attention, again (noise)"
SHORT = "documents of 30 to 200 tokens"
LONG = "documents of 400 tokens on average"
ONE = "one border in the micro-batch"
BORDERS = (SHORT, LONG, ONE)
ALONE = "attention alone: "
MASK = f"{SHORT}, by a mask"
STEP = f"a step, {SHORT}: "
ROWS, DOCUMENTS = STEP + "a weight for each row", STEP + "a weight for each document"
TARGETS = {**dict.fromkeys(BORDERS, "at most 1.050"), DOCUMENTS: "at most 1.020"}
_SEED = 0
_REPETITIONS = 2

Pass = Callable[[], None]


def measure_borders(settings: Settings, *, memory_repeats: int) -> None:
    """Print the tables."""
    # Memory first: its processes have the machine's memory to themselves.
    memory = _memory_table(settings, memory_repeats)
    with opened(settings) as runtime:
        subject = build_subject(settings, runtime)
        passes = passes_of(subject)
        times_s = alternate(
            [timed(name, call, runtime) for name, call in passes.items()],
            repeats=settings.repeats,
            warm_up=settings.warm_up,
            shown=True,
        )
        compared = [(name, _base(name), _target(name)) for name in passes]
        print(heading(settings, runtime, subject.num_parameters))
        for table in (ratio_table("one pass", times_s, compared), memory):
            print("\n" + table, flush=True)


def _base(name: str) -> str:
    if name.startswith(STEP):
        return ROWS
    return ALONE + PLAIN if name.startswith(ALONE) else PLAIN


def _target(name: str) -> str:
    return TARGETS.get(name.removeprefix(ALONE), "")


def passes_of(subject: Subject) -> dict[str, Pass]:
    """Returns everything that is measured, by name."""
    if subject.learner.llm.layer_kind == "transformer_engine":
        raise UserError("borders: measures Megatron-Core's own layers; use --precision fp32")
    borders = _borders(subject)
    parts = _parts(subject)
    llm = {name: partial(_llm_pass, subject, found) for name, found in borders.items()}
    alone = {
        ALONE + name: partial(_attention_pass, subject, parts, found)
        for name, found in borders.items()
    }
    short_BS = borders[SHORT]
    assert short_BS is not None
    masked = {ALONE + MASK: partial(_masked_pass, parts, short_BS)}
    return {**llm, **alone, **masked, **_steps(subject, short_BS)}


def _steps(subject: Subject, borders_BS: Tensor) -> dict[str, Pass]:
    """Returns steps with weights from the LLM's features, of rows and of documents."""
    rows = replace(subject.train, borders_BS=borders_BS)
    count = int((borders_BS[:, -1] + 1).sum())
    documents = replace(
        rows,
        units_BS=borders_BS,
        document_ids_U=torch.arange(count, device=subject.runtime.device),
        domains=("random",) * count,
    )
    subjects = {ROWS: replace(subject, train=rows), DOCUMENTS: replace(subject, train=documents)}
    return {name: partial(of.step, LLM) for name, of in subjects.items()}


def _borders(subject: Subject) -> dict[str, Tensor | None]:
    """Returns the number of each token's piece in its row, [B, S]; None: no borders."""
    rows, length = subject.train.tokens_BS.shape
    draw = random.Random(_SEED)
    one_border_BS = torch.zeros(rows, length, dtype=torch.int64)
    one_border_BS[0, length // 2 :] = 1
    found = {
        SHORT: _packed(rows, length, lambda: draw.randint(30, 200)),
        LONG: _packed(rows, length, lambda: 1 + int(draw.expovariate(1 / 400))),
        ONE: one_border_BS,
    }
    device = subject.runtime.device
    return {PLAIN: None, AGAIN: None, **{name: given.to(device) for name, given in found.items()}}


def _packed(rows: int, length: int, draw: Callable[[], int]) -> Tensor:
    """Returns the borders [B, S] of a stream of documents."""
    lengths: list[int] = []
    while sum(lengths) < rows * length:
        lengths.append(draw())
    number_T = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    number_BS = number_T[: rows * length].view(rows, length)
    return number_BS - number_BS[:, :1]


def _llm_pass(subject: Subject, borders_BS: Tensor | None) -> None:
    chunk, batch = subject.learner.llm.chunks[0], subject.train
    chunk.zero_grad_buffer()
    losses_BS = chunk(
        batch.tokens_BS,
        batch.position_ids_BS,
        None,
        labels=batch.labels_BS,
        packed_seq_params=None if borders_BS is None else packed_pieces(pieces_of(borders_BS)),
    )
    losses_BS.mean().backward()


def _parts(subject: Subject) -> list[Tensor]:
    """Returns query, key, value [S, B, heads, d] and the gradient of the output, all random."""
    shape = subject.learner.llm.shape
    rows, length = subject.train.tokens_BS.shape
    heads = [shape.num_attention_heads, *[shape.num_query_groups] * 2, shape.num_attention_heads]
    options = {
        "dtype": subject.learner.llm.transformer.params_dtype,
        "device": subject.runtime.device,
    }
    return [
        torch.randn(length, rows, number, shape.head_size, **options).requires_grad_()
        for number in heads
    ]


def _attention_pass(subject: Subject, parts: list[Tensor], borders_BS: Tensor | None) -> None:
    *inputs, gradient = parts
    attention = subject.learner.llm.modules[0].decoder.layers[0].self_attention.core_attention
    packed = None if borders_BS is None else packed_pieces(pieces_of(borders_BS))
    out_SBC = attention(*inputs, None, packed_seq_params=packed)
    torch.autograd.grad(out_SBC, inputs, gradient.detach().flatten(2))


def _masked_pass(parts: list[Tensor], borders_BS: Tensor) -> None:
    *inputs, gradient = parts
    seen_B1SS = (borders_BS[:, None, :, None] == borders_BS[:, None, None, :]).tril()
    query, key, value = (part.permute(1, 2, 0, 3) for part in inputs)
    grouped = query.shape[1] != key.shape[1]
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=seen_B1SS, enable_gqa=grouped)
    torch.autograd.grad(out.permute(2, 0, 1, 3), inputs, gradient.detach())


def _memory_table(settings: Settings, repeats: int) -> str:
    if repeats == 0:
        return "Peak memory: not measured (--memory-repeats 0)."
    kinds = [*(PLAIN, *BORDERS), *(ALONE + name for name in (PLAIN, *BORDERS, MASK))]
    peaks: dict[str, list[int]] = {kind: [] for kind in kinds}
    for number in range(repeats):
        for kind in kinds:
            print(f"memory {number + 1}/{repeats}: {kind}", file=sys.stderr, flush=True)
            peaks[kind].append(peak_of_child("benchmarks.borders", kind, settings))
    rows = [peak_row(kind, peaks[kind], _base(kind), peaks[_base(kind)], "") for kind in kinds]
    return markdown(PEAK_COLUMNS, rows)


def _measure(kind: str, settings: Settings) -> int:
    """Returns the peak bytes of passes above what the process has before them."""
    with opened(settings) as runtime:
        call = passes_of(build_subject(settings, runtime))[kind]
        before = used_bytes(runtime.device)
        for _ in range(_REPETITIONS):
            call()
        return peak_bytes(runtime.device) - before


if __name__ == "__main__":
    print(_measure(sys.argv[1], Settings(**json.loads(sys.argv[2]))))
