"""What the ranks of the tests of methods run: weights that fall, a loaded state, raw alignments."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_dwm.config import ParallelConfig, PolicyConfig, WeightingConfig
from megatron_dwm.runtime import Runtime, bring_up
from megatron_dwm.weighting.domain_mean import DomainMean
from megatron_dwm.weighting.dwm import Dwm
from megatron_dwm.weighting.model import build_weighting_model
from tests.weighting.workers import SAMPLES, SHAPE, alignment, batch, dwm, learn, weigh

DOMAINS = ("a", "b", "b", "c") * 3
LEARNING_RATE = 0.25


def up_and_down(size: int, updates: int) -> list[float]:
    """Weights of the first of `size` samples: after updates for it, and after twice as many
    against it.
    """
    with bring_up(ParallelConfig(), seed=0) as runtime:
        config = WeightingConfig(learning_rate=3e-3, min_effective_sample_size=0.6)
        method = dwm(build_weighting_model(SHAPE, seed=3), config, runtime, size)
        rows = batch(runtime, 1).rows(0, size)
        alignment_n = torch.zeros(size)
        found = []
        for value, count in ((1.0, updates), (-1.0, 2 * updates)):
            alignment_n[0] = value
            for _ in range(count):
                learn(method, rows, alignment_n)
            found.append(float(weigh(method, rows)[0]))
        return found


def step_after_taking_up(before: dict[str, Any], now: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """phi after one update with the weighting keys `now`, from a state that the keys `before` left:
    ours, and AdamW's equations from the moments of that state, in double precision.
    """
    with bring_up(ParallelConfig(), seed=0) as runtime:
        first = _policy(runtime, WeightingConfig(**before), seed=3)
        for number in range(2):
            _update(first, runtime, number, signal_to_noise=None if number else 0.25)
        state = copy.deepcopy(first.state_dict())
        config = WeightingConfig(**now)
        method = _policy(runtime, config, seed=4)
        method.load_state_dict(copy.deepcopy(state))
        _update(method, runtime, 2)
        parameters = list(method.trainer.model.parameters())
        rate = config.learning_rate * (0.25 / 1.25 if config.damp_by_noise else 1.0)
        saved = zip(
            first.trainer.model.parameters(), state["optimizer"]["state"].values(), strict=True
        )
        expected = [
            _adamw(value.detach().double(), moments, ours.grad.double(), rate, config.weight_decay)
            for (value, moments), ours in zip(saved, parameters, strict=True)
        ]
        return torch.cat([p.detach().flatten() for p in parameters]), torch.cat(expected)


def _policy(runtime: Runtime, config: WeightingConfig, seed: int) -> Dwm:
    return dwm(build_weighting_model(SHAPE, seed), config, runtime)


def _update(
    method: Dwm, runtime: Runtime, number: int, signal_to_noise: float | None = None
) -> None:
    rows = batch(runtime, number)
    learn(method, rows, alignment(rows.tokens_BS), signal_to_noise=signal_to_noise)


def _adamw(
    value: Tensor, state: dict[str, Tensor], gradient: Tensor, rate: float, decay: float
) -> Tensor:
    """The third step."""
    first = 0.9 * state["exp_avg"].double() + 0.1 * gradient
    second = 0.95 * state["exp_avg_sq"].double() + 0.05 * gradient.square()
    direction = first / (1 - 0.9**3) / ((second / (1 - 0.95**3)).sqrt() + 1e-8)
    return (value * (1 - rate * decay) - rate * direction).flatten()


def domain_weights(standardize: bool) -> tuple[Tensor, Tensor]:
    """domain_mean's weights of the global batch after two updates: ours, and by hand."""
    with bring_up(ParallelConfig(), seed=0) as runtime:
        temperature = 0.05 if standardize else 1e-6
        method = DomainMean(
            PolicyConfig(domain_decay=0.9, domain_temperature=temperature),
            WeightingConfig(standardize=standardize, group="global", min_effective_sample_size=0.0),
            runtime,
            micro_batch_size=3,
        )
        share = SAMPLES // runtime.data_size
        domains = DOMAINS[runtime.data_rank * share :][:share]
        for number in range(2):
            rows = replace(batch(runtime, number), domains=domains)
            learn(method, rows, alignment(rows.tokens_BS), LEARNING_RATE)
        first = runtime.data_rank * share
        by_hand = _domain_weights_by_hand(runtime, standardize, temperature)
        return weigh(method, rows), by_hand[first : first + share]


def _domain_weights_by_hand(runtime: Runtime, standardize: bool, temperature: float) -> Tensor:
    means: dict[str, float] = defaultdict(float)
    weights = [1.0] * SAMPLES
    for number in range(2):
        s = alignment(batch(runtime, number, whole=True).tokens_BS).double().tolist()
        middle = sum(w * v for w, v in zip(weights, s, strict=True)) / SAMPLES
        unit = float(torch.tensor(s).std(correction=0)) if standardize else 1 / LEARNING_RATE
        for domain in set(DOMAINS):
            mine = [v for v, name in zip(s, DOMAINS, strict=True) if name == domain]
            advantage = (sum(mine) / len(mine) - middle) / unit
            means[domain] = 0.9 * means[domain] + 0.1 * advantage
        logits = torch.tensor([means[name] / temperature for name in DOMAINS])
        weights = (torch.softmax(logits, 0) * SAMPLES).tolist()
    return torch.tensor(weights)
