"""Losses, learning rate and gradient norm over the run."""

from __future__ import annotations

from megatron_dwm.report.content import Column, Content
from megatron_dwm.report.curves import Value, key, within
from megatron_dwm.report.over_steps import about_bands, by_panel, over_steps, present
from megatron_dwm.report.runs import RunSet, held_out_domains

LOSS = Column(name="loss", title="loss", unit="nats per token")


def losses(runs: RunSet) -> Content:
    """Returns the section with the training loss, held-out losses and the optimizer's numbers."""
    domains = sorted(held_out_domains(runs.runs), key=lambda name: name != runs.target)
    panels: dict[str, tuple[str, Value]] = {"training": ("train", key("loss"))}
    for name in domains:
        mark = ", the target" if name == runs.target != "target" else ""
        panels[f"held out: {name}{mark}"] = ("evaluation", within("domain_loss", name))
    figures = [
        by_panel(
            runs,
            panels,
            id="loss",
            title="Losses",
            caption="Training loss (not weighted) and the loss of every held-out domain.",
            y=LOSS,
            panel=Column(name="text", title="text"),
        ),
        *_others(runs),
    ]
    notes = []
    if not domains:
        notes.append(
            "No held-out losses: set evaluation.path to a file of held-out text to see them."
        )
    return Content(
        id="losses",
        title="Losses",
        lead=about_bands(runs),
        figures=present(figures),
        notes=notes,
    )


def _others(runs: RunSet) -> list:
    return [
        over_steps(
            runs,
            id="held_out_loss",
            title="Mean held-out loss",
            caption="Mean over the domains, each counted once.",
            y=LOSS,
            phase="evaluation",
            value=key("loss"),
        ),
        over_steps(
            runs,
            id="validation_loss",
            title="Validation loss",
            caption="Loss of the target's passages after the virtual step of each update.",
            y=LOSS,
            phase="weighting",
            value=key("val_loss"),
        ),
        over_steps(
            runs,
            id="learning_rate",
            title="Learning rate",
            caption="The LLM's learning rate.",
            y=Column(name="lr", title="learning rate"),
            phase="train",
            value=key("lr"),
        ),
        over_steps(
            runs,
            id="gradient_norm",
            title="Gradient norm",
            caption="Norm of the LLM's weighted gradient before it is clipped.",
            y=Column(name="norm", title="gradient norm"),
            phase="train",
            value=key("grad_norm"),
        ),
    ]
