"""OPUS: draws every batch from a pool of candidates (Wang et al., ICML 2026, arXiv 2602.05400).

    s_i = <z, grad l_i>,  z = J^T grad L_val                   alignment of candidate i
    v_i = s_i - redundancy * eta * sum over the chosen j of <J grad l_i, J grad l_j>
    the next one is i with probability proportional to exp(v_i / (temperature * deviation of s))

until there are as many as samples in a global batch; these weigh the same. Overlaps come from
sketches of J grad l_i, the only part of a candidate's gradient that is kept. J is the optimizer's
Jacobian: with the moments that stand (`policy.jacobian frozen`, the paper's form), or that of the
virtual step along the pool's gradient (exact). METHOD.md, section 5, says what is the paper's, what
its code's, and what ours.

Everything a step draws follows from the run's seed and the step, so there is no state. Cost of a
scored step, with a pool of m batches of which the fraction f of the tokens is read: m f training
passes, a third more for sketches, one more for an exact Jacobian, and a training pass of the
passages.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from megatron_dwm.config import Config
from megatron_dwm.config.key import Part
from megatron_dwm.config.validate import length_problems
from megatron_dwm.data import Batch
from megatron_dwm.model import LLM, ForwardOutputs, LlamaShape
from megatron_dwm.model.flops import FORWARD_BACKWARD, llm_forward_flops
from megatron_dwm.weighting.costs import Costs, Workload, plain_costs
from megatron_dwm.weighting.greedy import in_deviations, overlaps
from megatron_dwm.weighting.method import BuildContext, Counters
from megatron_dwm.weighting.pool import ChoosesFromPool, PoolAlignments
from megatron_dwm.weighting.rules import target_problems


class Opus(ChoosesFromPool):
    """Batches drawn by alignment and overlap; all weights are 1."""

    units: ClassVar[frozenset[str]] = frozenset({"sample"})
    reads_passages: ClassVar[bool] = True

    @classmethod
    def parts(cls, config: Config) -> frozenset[Part]:
        """Returns the parts: a target, pools and how they are scored and drawn from."""
        target = {"target", "passages"}
        return frozenset({*target, "pool", "sampling", "redundancy", "aligned_steps"})

    @classmethod
    def problems(cls, config: Config, num_layers: int, world_size: int) -> Iterator[str]:
        """Check the rules of the target and of the pool."""
        yield from target_problems(config)
        if config.weighting.pool_batches == 1:
            yield (
                "weighting.pool_batches 1: policy opus draws a batch from several; set 2 or more"
            )
        tokens, length = config.policy.score_tokens, config.data.sequence_length
        if tokens is None:
            return
        if tokens > length:
            yield (
                f"policy.score_tokens {tokens}: expected at most data.sequence_length, which is "
                f"{length}"
            )
        yield from length_problems(config, "policy.score_tokens", tokens)

    @classmethod
    def costs(cls, config: Config, llm: LlamaShape, workload: Workload) -> Costs:
        """Returns plain costs, and those of the passes that score a pool."""
        costs, policy = plain_costs(config, llm, workload), config.policy
        length, reach = config.data.sequence_length, workload.documents.attended_tokens
        tokens = policy.score_tokens or length
        rows = config.weighting.pool_batches * config.training.global_batch_size
        pool = llm_forward_flops(llm, rows, tokens, None if reach is None else min(reach, tokens))
        passages = config.passages if workload.passages is None else workload.passages
        validation = llm_forward_flops(llm, passages, length, reach)
        passes = FORWARD_BACKWARD * (1 + (policy.jacobian == "exact"))
        return replace(
            costs,
            pool_passes=(passes + (policy.redundancy > 0.0)) * pool + FORWARD_BACKWARD * validation,
            first_pool=policy.alignment_warmup,
            pool_interval=policy.alignment_interval,
        )

    @classmethod
    def build(cls, context: BuildContext) -> Opus:
        """Build the method, which has no state."""
        return cls(context.config)

    def __init__(self, config: Config) -> None:
        self.config, self.seed = config.policy, config.run.seed

    def pool_alignments(self, counters: Counters) -> PoolAlignments | None:
        """Returns how to align the next pool; None in a step that draws at random."""
        policy, step = self.config, counters.step - self.config.alignment_warmup
        if step < 0 or step % policy.alignment_interval:
            return None
        return PoolAlignments(
            jacobian=policy.jacobian,
            sketch_size=policy.sketch_size if policy.redundancy > 0.0 else None,
            tokens=policy.score_tokens,
        )

    def pool_scores(
        self, llm: LLM, pool: Batch, passages: Batch | None, counters: Counters
    ) -> Tensor:
        """Returns equal scores, float32 [n, 1]: every candidate may be drawn."""
        return torch.zeros(pool.size, 1, device=pool.tokens_BS.device)

    def choose(self, scores: Tensor, count: int, step: int) -> Tensor:
        """Returns int64 [count], the rows drawn; scores are as `pool_alignments` says."""
        generator = torch.Generator().manual_seed(_seed(self.seed, step))
        alignment_P, overlap_PP = scores[:, 0], overlaps(scores[:, 1:])
        if self.config.overlap_unit == "deviation":
            everything_P = torch.ones_like(alignment_P, dtype=torch.bool)
            overlap_PP = in_deviations(overlap_PP, alignment_P, everything_P)
        return draw(
            alignment_P.double().cpu(),
            self.config.redundancy * overlap_PP.double().cpu(),
            count,
            temperature=self.config.selection_temperature,
            generator=generator,
        )

    def weights(self, batch: Batch, outputs: ForwardOutputs | None, counters: Counters) -> Tensor:
        """Returns ones, float32 [n]."""
        return torch.ones(batch.units.count, device=batch.tokens_BS.device)


def draw(
    alignment_P: Tensor,
    overlap_PP: Tensor,
    count: int,
    *,
    temperature: float,
    generator: torch.Generator,
) -> Tensor:
    """Returns int64 [count], candidates in the order in which they are drawn, none twice.

    Each has the probability of the softmax of (alignment - overlaps with those drawn before), over
    temperature and the deviation of the alignments. At temperature 0, or if all alignments are
    equal, the first of the best values is taken, or all values are as likely.
    """
    deviation = float(alignment_P.std(correction=0))
    scale = temperature * deviation
    value_P, drawn = alignment_P.clone(), []
    for _ in range(count):
        if temperature == 0.0:
            noisy_P = value_P
        else:
            # The largest of logits with Gumbel noise is a draw from their softmax.
            uniform_P = torch.rand(len(value_P), generator=generator, dtype=torch.float64)
            gumbel_P = -(-uniform_P.clamp(min=1e-300).log()).log()
            logits_P = value_P / scale if scale > 0.0 else torch.zeros_like(value_P)
            noisy_P = torch.where(value_P == -torch.inf, value_P, logits_P + gumbel_P)
        number = int((noisy_P == noisy_P.max()).nonzero()[0])
        drawn.append(number)
        value_P = value_P - overlap_PP[number]
        value_P[number] = -torch.inf
    return torch.tensor(drawn)


def _seed(seed: int, step: int) -> int:
    """Returns a generator's seed that differs between steps, and between runs of other seeds."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 1) % 2**63
