"""Which keys a resumed run may change, without a run."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dwm.config import Config, PolicyConfig, UserError, WeightingConfig
from megatron_dwm.run.changes import refuse_changes, without_effect


@pytest.mark.parametrize(
    ("group", "policy", "refused"),
    [("micro_batch", "dwm", True), ("global", "dwm", False), ("micro_batch", "uniform", False)],
)
@pytest.mark.parametrize("frozen", [False, True])
def test_the_group_of_weights_may_not_change(
    group: str, policy: str, refused: bool, frozen: bool
) -> None:
    """A micro-batch is what learned weights are normalized over, where weighting.group says so."""
    weighting = WeightingConfig(group=group, frozen=frozen)
    old = Config(policy=PolicyConfig(name=policy), weighting=weighting)
    new = replace(old, training=replace(old.training, micro_batch_size=2))
    with pytest.raises(UserError, match="micro_batch_size") if refused else nullcontext():
        refuse_changes(old, new, Path("run"))


def test_a_loaded_model_that_is_not_read_does_not_matter(tmp_path: Path) -> None:
    """A shared configuration names the models of several stages; its baseline reads none."""
    for stage in (1, 2):
        (tmp_path / "weighting" / f"stage_{stage}").mkdir(parents=True)
    load = WeightingConfig(load=str(tmp_path))
    old = Config(policy=PolicyConfig(name="uniform"), weighting=load)
    assert without_effect(old, replace(old, training=replace(old.training, steps=7))) == []


def test_a_rate_may_change_and_a_decay_when_it_is_allowed() -> None:
    """The rate because what stops a run over its weights advises a smaller one."""
    old = Config(policy=PolicyConfig(name="dwm"))
    slower = replace(old, weighting=WeightingConfig(learning_rate=1e-5))
    refuse_changes(old, slower, Path("run"))
    decaying = replace(old, weighting=WeightingConfig(weight_decay=0.1))
    with pytest.raises(UserError, match="allow_changed weighting.weight_decay"):
        refuse_changes(old, decaying, Path("run"))
    allowed = replace(old.run, allow_changed=["weighting.weight_decay"])
    refuse_changes(old, replace(decaying, run=allowed), Path("run"))


def test_attention_does_not_change_unseen_with_the_unit() -> None:
    """An empty data.mask_documents is compared by what it means."""
    old = Config()
    new = replace(old, weighting=WeightingConfig(unit="document"))
    with pytest.raises(UserError, match=r"^weighting.unit: .*also changed: data.mask_documents"):
        refuse_changes(old, new, Path("run"))
    new = replace(new, run=replace(old.run, allow_changed=["weighting.unit"]))
    with pytest.raises(UserError, match=r"^data.mask_documents: .* has False, now True"):
        refuse_changes(old, new, Path("run"))
    refuse_changes(old, replace(new, data=replace(old.data, mask_documents=False)), Path("run"))
    spelled_out = replace(new, data=replace(old.data, mask_documents=True))
    refuse_changes(new, spelled_out, Path("run"))
