"""The key that is proposed for one that does not exist."""

from __future__ import annotations

import pytest

from megatron_dwm.config.names import known_keys, nearest_key

MEANT = {
    # initials
    "weighting.lr": "weighting.learning_rate",
    "training.lr": "training.learning_rate",
    "training.wd": "training.weight_decay",
    "training.gbs": "training.global_batch_size",
    "training.mbs": "training.micro_batch_size",
    "validation.bs": "validation.batch_size",
    "parallel.tp": "parallel.tensor",
    "parallel.pp": "parallel.pipeline",
    "parallel.sp": "parallel.sequence",
    # whole words
    "training.batch_size": "training.global_batch_size",
    "training.max_steps": "training.steps",
    "training.beta1": "training.adam_beta1",
    "model.layers": "model.num_layers",
    "model.heads": "model.num_attention_heads",
    "parallel.tensor_parallel": "parallel.tensor",
    "weighting.warmup": "weighting.warmup_steps",
    # beginnings of words
    "data.seq_len": "data.sequence_length",
    "training.warm_frac": "training.warmup_fraction",
    # spelling
    "training.stps": "training.steps",
    "training.learning_rte": "training.learning_rate",
    "weighting.standardise": "weighting.standardize",
    "parallel.sharded_optimiser": "parallel.sharded_optimizer",
    "trainig.steps": "training.steps",
    "run.sead": "run.seed",
    # the name of another section's key, or no section that there is
    "model.sequence_length": "data.sequence_length",
    "optimizer.learning_rate": "training.learning_rate",
    "lr": "training.learning_rate",
    "steps": "training.steps",
}


@pytest.mark.parametrize(("typed", "meant"), MEANT.items())
def test_the_nearest_key_is_what_was_meant(typed: str, meant: str) -> None:
    assert nearest_key(typed) == meant


@pytest.mark.parametrize("key", known_keys())
def test_a_known_key_is_its_own_nearest(key: str) -> None:
    assert nearest_key(key) == key
    assert nearest_key(f"{key}x").split(".")[0] == key.split(".")[0]
