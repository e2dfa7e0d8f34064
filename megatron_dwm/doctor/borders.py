"""Does attention stop at the borders of documents on this machine?

Another text in the first document of a window must not change the loss of the second one by a bit.
A kernel that ignores borders without an error (it has happened) is found here. The layers are those
of the run. A run in FP8 is checked in bf16, because FP8's scales depend on the whole tensor.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_dwm.config import Config
from megatron_dwm.config.schema_llm import Precision
from megatron_dwm.data import Batch
from megatron_dwm.model import LLM, build_llm, forward_only, resolve_shape
from megatron_dwm.model.passes.objective import unit
from megatron_dwm.runtime import Runtime
from megatron_dwm.testing import random_batch


def borders_finding(config: Config, runtime: Runtime) -> tuple[bool, str]:
    """Returns whether attention stops at borders, and a line that says so (collective).

    config: the run's, with batches that its schedule allows.
    """
    llm = _llm(config, runtime)
    batch = _two_documents(config, llm)
    first = batch.borders_BS == 0
    other = replace(batch, tokens_BS=(batch.tokens_BS + first) % llm.shape.vocab_size)
    size = config.training.micro_batch_size
    before_n, after_n = (_losses(llm, text, size) for text in (batch, other))
    moved = before_n != after_n
    # Units alternate: the first document of a row, then the second.
    reached = torch.stack([moved[1::2].any(), ~moved[0::2].any()]).int()
    dist.all_reduce(reached, op=dist.ReduceOp.MAX)
    leaks, ignores = (bool(found) for found in reached)
    where = f"{llm.layer_kind} layers, {llm.transformer.params_dtype}".replace("torch.", "")
    if ignores:
        return False, f"a document's own tokens do NOT change its loss ({where})"
    verdict = "CHANGE" if leaks else "do not change"
    return not leaks, f"a document's tokens {verdict} the loss of the next one ({where})"


def _llm(config: Config, runtime: Runtime) -> LLM:
    precision: Precision = "fp32" if config.model.precision == "fp32" else "bf16"
    model = replace(
        config.model, precision=precision, fp8_emulation=False, fp8_first_last_bf16=False
    )
    return build_llm(
        resolve_shape(model),
        model,
        config.parallel,
        runtime,
        sequence_length=config.data.sequence_length,
        seed=config.run.seed,
    )


def _two_documents(config: Config, llm: LLM) -> Batch:
    """Returns rows of two documents each, which are units."""
    length = config.data.sequence_length
    batch = random_batch(
        0,
        llm.runtime,
        rows=config.training.global_batch_size,
        sequence_length=length,
        vocab_size=llm.shape.vocab_size,
    )
    numbers_S = (torch.arange(length, device=llm.runtime.device) >= length // 2).long()
    numbers_BS = numbers_S.expand(batch.size, -1)
    return replace(
        batch,
        borders_BS=numbers_BS,
        units_BS=numbers_BS,
        document_ids_U=batch.document_ids_U.repeat_interleave(2),
        domains=tuple(name for name in batch.domains for _ in range(2)),
    )


def _losses(llm: LLM, batch: Batch, micro_batch_size: int) -> Tensor:
    return forward_only(llm, unit(batch, micro_batch_size)).unit_losses_n
