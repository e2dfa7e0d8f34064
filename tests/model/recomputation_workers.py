"""What the ranks of tests/model/test_recomputation.py run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core import tensor_parallel
from torch import Tensor

from megatron_dwm.model import forward_only
from megatron_dwm.model.passes.objective import unit
from megatron_dwm.model.passes.predictions import forward_logits
from tests.tiny import MICRO_BATCH, tiny


def checkpointed_layers(**layout: Any) -> tuple[int, int, int, bool]:
    """Calls of Megatron-Core's checkpoint: with gradients, without, for logits; the mode after."""
    with tiny(recompute="full", **layout) as subject:
        llm, batch, calls = subject.llm, subject.batch(5), []
        upstream = tensor_parallel.checkpoint

        def counted(*arguments: Any) -> Any:
            calls.append(None)
            return upstream(*arguments)

        def passes(run: Callable[[], object]) -> int:
            before = len(calls)
            run()
            return len(calls) - before

        def keep(_: Tensor, logits: Tensor) -> Tensor:
            return logits

        tensor_parallel.checkpoint = counted
        try:
            with_gradients = passes(lambda: subject.gradient(5))
            without = passes(lambda: forward_only(llm, unit(batch, MICRO_BATCH)))
            parts = [batch.rows(0, MICRO_BATCH), batch.rows(MICRO_BATCH, 2 * MICRO_BATCH)]
            logits = passes(lambda: forward_logits(llm, parts, keep))
        finally:
            tensor_parallel.checkpoint = upstream
        modes = [inner.training for module in llm.modules for inner in module.modules()]
        return with_gradients, without, logits, all(modes)
