"""The interface of methods outside the package stays as it is while its version does."""

from __future__ import annotations

import dataclasses
import inspect
import re

from megatron_dwm import plugin
from tests.launch import REPOSITORY

# What version 1 has: arguments of what a method overrides or calls, and fields of its records. An
# addition with a default may be written into this table. A change or a removal raises
# CONTRACT_VERSION in weighting/method.py, and gets a line under "Versions" in docs/plugins.md.
METHOD = {
    "after_step": "self, batch, losses_n, counters",
    "after_weighing": "self, batch, relative_n",
    "before_step": "self, counters",
    "build": "context",
    "costs": "config, llm, workload",
    "depends_on": "config",
    "document_values": "config",
    "files": "self",
    "first_weighed_step": "config",
    "load_state_dict": "self, state",
    "model_shape": "config, llm",
    "needs": "self, counters",
    "own_options": "config",
    "own_update": "self, llm, batch, passages, counters",
    "parts": "config",
    "pool_batches": "config",
    "problems": "config, num_layers, world_size",
    "read_target": "self, passages, outputs",
    "reference_losses": "self, batch",
    "remarks": "config, llm, tokenizer",
    "schedule": "config",
    "state_dict": "self",
    "step_statistics": "self",
    "token_losses": "config",
    "training_source": "config, corpus, target",
    "update": "self, batch, outputs, alignments",
    "weighs": "self, counters",
    "weights": "self, batch, outputs, counters",
}
VALUES = {"aligns_first", "contract_version", "gentler", "learns_from_alignments", "options"}
VALUES |= {"own_updates", "sketch_size", "units", "update_needs"}
RECORDS = {
    "Alignments": "values_n learning_rate known_n signal_to_noise",
    "BuildContext": "config llm tokenizer target reference reference_optimizer reference_offload "
    "values",
    "Costs": "llm_step weighing extra_forward first_forward pool_passes pool_scores first_pool "
    "pool_interval update_passes learning noise noise_interval reference",
    "ForwardOutputs": "losses_n features reference_losses_n alignment_n overlap_nK",
    "Needs": "losses early_layer whole_batch on_every_rank relative",
    "OwnUpdate": "losses_n weights_n val_loss grad_norm",
    "Schedule": "steps update_steps updates_each borders in_step fresh ahead",
    "WeightingUpdate": "weights_n grad_norm cosine",
    "Workload": "replicas passages documents reference",
}
EXPORTED = 52


def _public(kind: type) -> dict[str, object]:
    found = {name: getattr(kind, name) for each in kind.__mro__[:-2] for name in vars(each)}
    return {name: value for name, value in found.items() if not name.startswith("_")}


def test_methods_take_the_same_arguments() -> None:
    assert plugin.CONTRACT_VERSION == 1
    members = _public(plugin.Method)
    functions = {
        name: ", ".join(inspect.signature(value).parameters)
        for name, value in members.items()
        if inspect.isroutine(value)
    }
    assert functions == METHOD
    assert members.keys() - functions.keys() == VALUES


def test_the_document_names_all_of_them() -> None:
    text = (REPOSITORY / "docs" / "plugins.md").read_text(encoding="utf-8")
    assert [name for name in _public(plugin.Method) if not re.search(rf"\b{name}\b", text)] == []


def test_records_have_the_same_fields() -> None:
    for name, expected in RECORDS.items():
        fields = dataclasses.fields(getattr(plugin, name))
        assert [field.name for field in fields] == expected.split(), name


def test_everything_that_is_exported_is_there_and_documented() -> None:
    assert len(plugin.__all__) == EXPORTED == len(set(plugin.__all__))
    for name in plugin.__all__:
        value = getattr(plugin, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), name
