"""The registry of methods: the values of `policy.name`, what each method does, and its class.

A new method of the package is a file in weighting/ and an entry here. The entry names the class
without importing it, so that `--help` does not wait for torch; weighting/registry.py imports it.
A method outside the package is named by its path instead, `package.module:Class` (plugins.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megatron_dwm.config.plugins import import_plugin, is_plugin


@dataclass(frozen=True)
class Registered:
    """A method.

    does: in a few words what it does, for `--help`. path: `module:Class`.
    learns_from_alignments: `weighting.update_on` applies to it.
    """

    does: str
    path: str
    learns_from_alignments: bool = False


_WEIGHTING = "megatron_dwm.weighting"

_METHODS: dict[str, Registered] = {
    "uniform": Registered("weighs all samples the same", f"{_WEIGHTING}.uniform:Uniform"),
    "dwm": Registered(
        "learns the weights (DWM)", f"{_WEIGHTING}.dwm:Dwm", learns_from_alignments=True
    ),
    "domain_mean": Registered(
        "weighs by a running mean of alignments for every domain, without a model",
        f"{_WEIGHTING}.domain_mean:DomainMean",
        learns_from_alignments=True,
    ),
    "loss_reweighting": Registered(
        "weighs harder samples more, by their losses",
        f"{_WEIGHTING}.loss_reweighting:LossReweighting",
    ),
    "similarity": Registered(
        "weighs by the cosine of a sample's hidden states and the target's (ADAPT)",
        f"{_WEIGHTING}.similarity:Similarity",
    ),
    "gradient_alignment": Registered(
        "weighs by the alignments of the batch itself, at the cost of three more steps each",
        f"{_WEIGHTING}.gradient_alignment:GradientAlignment",
    ),
    "opus": Registered(
        "draws every batch from a pool of candidates by their alignments less overlap (OPUS)",
        f"{_WEIGHTING}.opus:Opus",
    ),
    "excess_loss": Registered(
        "keeps what a static reference model predicts better (RHO-LOSS; Rho-1 with unit token)",
        f"{_WEIGHTING}.excess_loss:ExcessLoss",
    ),
    "blade": Registered(
        "keeps what a reference that follows the LLM and learns from the target predicts better",
        f"{_WEIGHTING}.blade:Blade",
    ),
    "fixed": Registered(
        "weighs by a column of the metadata, or by domain", f"{_WEIGHTING}.fixed:Fixed"
    ),
    "curriculum": Registered(
        "begins with the easiest units, by a column or by length, and ends with all of them",
        f"{_WEIGHTING}.curriculum:Curriculum",
    ),
    "validation_mixing": Registered(
        "puts target passages into the training batch, all weights equal",
        f"{_WEIGHTING}.validation_mixing:ValidationMixing",
    ),
}


METHODS: Mapping[str, Registered] = MappingProxyType(_METHODS)
"""the built-in methods by name; nobody else can put a class under one of their names, so that
config.yaml always says what was trained"""


def methods_help() -> str:
    """Returns every method's name and what it does, for `--help`."""
    built_in = "; ".join(f"{name}: {method.does}" for name, method in METHODS.items())
    return f"{built_in}; package.module:Class: a method of your own (docs/plugins.md)"


def name_problems(name: str) -> Iterator[str]:
    """Yields a line if `name` is neither a built-in method nor of the form of a path."""
    if name in METHODS or is_plugin(name):
        top = name.partition(":")[0]
        if name not in METHODS and top in METHODS:
            yield (
                f"policy.name {name}: {top} is the name of a built-in method; call the module "
                "otherwise"
            )
        return
    yield (
        f"policy.name: expected one of {list(METHODS)}, or package.module:Class for a method of "
        f"your own (docs/plugins.md). Got value: {name!r}"
    )


def learns_from_alignments(name: str) -> bool:
    """True if `weighting.update_on` applies to the method `name`."""
    if name in METHODS:
        return METHODS[name].learns_from_alignments
    # Not every class is a method; weighting/plugin_checks.py says so in one line.
    return getattr(import_plugin(name), "learns_from_alignments", False)
