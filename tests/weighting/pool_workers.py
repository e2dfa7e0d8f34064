"""What the ranks of the tests of pools run, and the logits of a pool by hand."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from megatron_dwm.checkpoint.state import TrainState
from megatron_dwm.config import Config, ParallelConfig, RunError
from megatron_dwm.config.load import load_config
from megatron_dwm.data import Batch, TrainingData
from megatron_dwm.model import LLM, ForwardOutputs
from megatron_dwm.run.inputs import open_model_and_tokenizer
from megatron_dwm.runtime import bring_up
from megatron_dwm.testing import random_batch, tiny_learner
from megatron_dwm.training.pool import choose_rows
from megatron_dwm.weighting import ChoosesFromPool, Counters
from megatron_dwm.weighting.model import WeightingModel, load_weighting_model, read_weighting_shape

CANDIDATES, KEPT = 12, 4


class _ByScores(ChoosesFromPool):
    """Scores are rows of a table, and those with the smallest sum are chosen."""

    def __init__(self, table: Tensor) -> None:
        self.table = table
        self.seen: list[tuple[int, int, int]] = []

    def weights(self, batch: Batch, outputs: ForwardOutputs | None, counters: Counters) -> Tensor:
        return torch.ones(batch.size)

    def pool_scores(
        self, llm: LLM, pool: Batch, passages: Batch | None, counters: Counters
    ) -> Tensor:
        return self.table[pool.sample_ids_B]

    def choose(self, scores: Tensor, count: int, step: int) -> Tensor:
        self.seen.append((*scores.shape, step))
        return scores.sum(dim=1).argsort(stable=True)[:count]


def chosen(bad: list[int], differ: bool = False, tensor: int = 1, pipeline: int = 1) -> list[int]:
    """The rows that this rank goes on with. bad: candidates with a score that is not finite.

    differ: the ranks compute other scores.
    """
    with bring_up(ParallelConfig(tensor=tensor, pipeline=pipeline), seed=1) as runtime:
        generator = torch.Generator().manual_seed(runtime.rank if differ else 0)
        table = torch.rand(CANDIDATES, 3, generator=generator)
        table[bad, 1] = float("nan")
        pool = random_batch(0, runtime, rows=CANDIDATES)
        method = _ByScores(table)
        state = TrainState(step=7)
        try:
            rows = choose_rows(tiny_learner(runtime), method, pool, None, state, count=KEPT)
        except RunError as error:
            assert "step 8: fewer than 4 of the 12 candidates" in str(error)
            return []
        expected = [(CANDIDATES - len(bad), 3, 7)] if runtime.is_main else []
        assert method.seen == expected, "vectors of all replicas, only finite ones, on one rank"
        if not differ:
            sums = table.sum(dim=1).nan_to_num(nan=torch.inf)
            assert rows == sorted(sums.argsort()[:KEPT].tolist())
        return rows


def pool_logits(
    run_dir: str,
    step: int,
    exported: str | None = None,
    model: str | None = None,
    samples: list[int] | None = None,
) -> dict[str, Tensor]:
    """Numbers and logits of the candidates of a step (from 0) of a run, in double precision.

    The logits of a group of candidates come from the frozen model of the run, which reads the
    tokens, or transformers' hidden states of the exported LLM.

    model: directory of the frozen model; None for weighting.load.
    samples: numbers of other samples, such as those of a batch; None for the candidates.
    """
    config = load_config(["--config", f"{run_dir}/config.yaml"])
    directory = Path(model or str(config.weighting.load))
    frozen = load_weighting_model(directory, read_weighting_shape(directory)).double()
    size = config.weighting.pool_batches * config.training.global_batch_size
    numbers = samples or list(range(step * size, (step + 1) * size))
    batch = _read(config, numbers)
    is_global = config.weighting.group == "global"
    training = config.training
    size = training.global_batch_size if is_global else training.micro_batch_size
    with torch.no_grad():
        rows = batch.tokens_BS if exported is None else _features(exported, batch, config)
        logits = [_logits(frozen, group) for group in rows.split(size)]
    return {"numbers": torch.tensor(numbers), "logits": torch.cat(logits)}


def _logits(model: WeightingModel, group: Tensor) -> Tensor:
    """Returns the logits of one group of rows of tokens, or of features and losses."""
    if model.shape.encoder == "own":
        return model.logits(torch.cat([model.encoder(row[None]) for row in group])[None])[0]
    return model.logits(model.encoder(group[None]))[0]


def _read(config: Config, numbers: list[int]) -> Batch:
    tokenizer, _ = open_model_and_tokenizer(config)
    with bring_up(ParallelConfig(), seed=0):
        data = TrainingData(
            config.data,
            eod_id=tokenizer.eod_id,
            seed=config.run.seed,
            num_samples=max(numbers) + 1,
            cache_dir=Path(config.run.dir) / "by_hand",
        )
        return data.batch(numbers)


def _features(exported: str, batch: Batch, config: Config) -> Tensor:
    llm = LlamaForCausalLM.from_pretrained(exported, dtype=torch.float64).eval()
    rows = []
    for tokens, labels in zip(batch.tokens_BS, batch.labels_BS, strict=True):
        found = llm(tokens[None], output_hidden_states=True)
        layers = (-1, config.weighting.early_layer)
        means = [found.hidden_states[number][0].mean(dim=0) for number in layers]
        rows.append(torch.cat([*means, F.cross_entropy(found.logits[0], labels)[None]]))
    return torch.stack(rows)


def largest(scores: Tensor, count: int) -> Tensor:
    """The rows that a method without a choice of its own keeps."""
    return ChoosesFromPool.choose(_ByScores(scores), scores, count, 0)
