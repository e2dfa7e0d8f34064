"""The one registry of methods: what `policy.name` may be, what each does, and where it is built.

A new method is a file in weighting/ and a line here. The class is named and not imported, so that
`--help` is answered before torch is loaded; weighting/registry.py imports it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Registered:
    """A method. does: what it does, in a few words for `--help`. path: `module:Class`."""

    does: str
    path: str


_WEIGHTING = "megatron_dwm.weighting"

METHODS: dict[str, Registered] = {
    "uniform": Registered("weighs all samples the same", f"{_WEIGHTING}.uniform:Uniform"),
    "dwm": Registered("learns the weights (DWM)", f"{_WEIGHTING}.dwm:Dwm"),
    "domain_mean": Registered(
        "weighs by a running mean of alignments for every domain, without a model",
        f"{_WEIGHTING}.domain_mean:DomainMean",
    ),
    "loss_reweighting": Registered(
        "weighs harder samples more, by their losses",
        f"{_WEIGHTING}.loss_reweighting:LossReweighting",
    ),
    "validation_mixing": Registered(
        "puts target passages into the training batch, all weights equal",
        f"{_WEIGHTING}.validation_mixing:ValidationMixing",
    ),
}


def methods_help() -> str:
    """Every name with what it does, for `--help`."""
    return "; ".join(f"{name}: {method.does}" for name, method in METHODS.items())
