"""A plan in words and columns for a terminal; a table's unit is that of its largest value."""

from __future__ import annotations

from megatron_dwm.config import TrainingConfig
from megatron_dwm.data.document_counts import WHOLE_ROWS
from megatron_dwm.planning.plan import RESERVE, Plan, advice, has_reference

_GB = 1e9
_BYTES = {"GB": _GB, "MB": 1e6, "kB": 1e3}
_OPERATIONS = {"TFLOP": 1e12, "GFLOP": 1e9, "MFLOP": 1e6}
_SECONDS = {"h": 3600.0, "min": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6}
# Parameters and Adam's moments; beside bf16 parameters there is an fp32 copy.
_CHECKPOINT_BYTES = {"fp32": 12, "bf16": 14, "fp8": 14}
_PARTS = {
    "weights": "weights",
    "gradients": "gradient buffers",
    "optimizer": "optimizer state",
    "fp8_copies": "FP8 copies of weights",
    "weighting_model": "weighting model, its optimizer",
    "reference": "reference model",
    "reference_on_host": "reference model, in host memory",
    "reference_in_use": "reference model at work",
    "activations": "activations",
    "working": "backward pass at work",
    "virtual_step": "virtual step's copies, or directions",
    "sketches": "sketches of gradients (update)",
    "weighting_activations": "weighting model's activations",
    "step": "peak of a step",
    "update": "peak with weighting updates",
}
_FLOPS = {
    "llm": "LLM forward and backward",
    "recompute": "recomputation",
    "weighing": "weighting model on steps' batches",
    "reference": "reference model on steps' batches",
    "reading": "reading the batch first",
    "pool_passes": "passes over the pools",
    "pool_scores": "scores of the pools",
    "updates": "updates: passes of the LLM",
    "noise": "updates: signal-to-noise",
    "learning": "updates: weighting model",
}


def plan_text(plan: Plan) -> str:
    """Returns the whole plan as text."""
    blocks = [_heading(plan), _memory(plan), _flops(plan), _traffic(plan), _time(plan)]
    return "\n\n".join([*blocks, _verdict(plan)])


def plan_line(plan: Plan) -> str:
    """Returns GPU hours, memory of the fullest rank and disk space of the checkpoints, one line."""
    hours = _gpu_hours(plan)
    fits = "fits" if plan.fits else "DOES NOT FIT"
    checkpoint = plan.shape.num_parameters() * _CHECKPOINT_BYTES[plan.config.model.precision]
    kept = _kept_checkpoints(plan.config.training)
    return (
        f"{plan.gpus} x {plan.gpu.name}: {hours} GPU hours; {_size(plan.needed_bytes)} a GPU of "
        f"{_size(plan.usable_bytes)}: {fits}; disk: {kept} checkpoints of {_size(checkpoint)}"
    )


def _kept_checkpoints(training: TrainingConfig) -> int:
    """Returns the number of checkpoints of steps that a finished run has."""
    interval, steps = training.checkpoint_interval_steps, training.steps
    written = -(-steps // interval) if interval else 1
    if not training.keep_last:
        return written
    every = steps // training.keep_every if training.keep_every else 0
    return min(written, training.keep_last + every)


def _heading(plan: Plan) -> str:
    config, parallel = plan.config, plan.config.parallel
    replicas = config.data_parallel_size(plan.gpus)
    context = f"context {parallel.context} x " if parallel.context > 1 else ""
    return (
        f"{plan.shape.num_parameters():,} parameters, {config.model.precision}, vocabulary "
        f"{plan.shape.vocab_size:,}\n"
        f"{plan.gpus} x {plan.gpu.name}: tensor {parallel.tensor} x {context}pipeline "
        f"{parallel.pipeline} x data {replicas}; {config.num_microbatches(plan.gpus)} "
        f"micro-batches of {config.training.micro_batch_size} x {config.data.sequence_length:,} "
        f"tokens a step and replica; {plan.tokens_a_step:,} tokens a step\n"
        f"policy {config.policy.name}, {plan.cost.num_updates:,} weighting updates in "
        f"{config.training.steps:,} steps{_documents(plan)}{_reference(plan)}"
    )


def _reference(plan: Plan) -> str:
    """Returns a line about a reference model whose size is not known, or nothing."""
    if plan.reference is not None or not has_reference(plan.config):
        return ""
    name = plan.config.policy.reference
    return f"\npolicy.reference {name} is no Hugging Face model: counted as large as the LLM"


def _documents(plan: Plan) -> str:
    """Returns a line about documents inside samples, or nothing if they do not matter."""
    found = plan.documents
    if found is None:
        return "\ndata.train cannot be read: every sample counts as one document"
    if found == WHOLE_ROWS:
        return ""
    lines = []
    if found.units_per_row != 1.0:
        lines.append(f"{found.units_per_row:,.1f} units a sample")
    if found.attended_tokens is not None:
        lines.append(f"attention as in samples of {found.attended_tokens:,.0f} tokens")
    return "\n" + ", ".join(lines)


def _memory(plan: Plan) -> str:
    """Returns a column for the first, the fullest and the last stage."""
    shown = sorted({0, plan.fullest, len(plan.stages) - 1})
    unit, size = _unit(_BYTES, max(plan.stages[stage].update for stage in shown))
    rows = [[f"{unit} a rank", *(f"stage {stage}" for stage in shown)]]
    for key, label in _PARTS.items():
        values = [plan.stages[stage].rows()[key] for stage in shown]
        if any(values):
            rows.append([label, *(f"{value / size:.2f}" for value in values)])
    return _columns(rows)


def _flops(plan: Plan) -> str:
    cost = plan.cost
    whole = cost.llm + cost.recompute + cost.weighting
    unit, size = _unit(_OPERATIONS, whole)
    rows = [["FLOPs a step", unit, "%"]]
    for key, label in _FLOPS.items():
        value = getattr(cost, key)
        if value:
            rows.append([label, f"{value / size:,.1f}", f"{100 * value / whole:.2f}"])
    return _columns(rows)


def _traffic(plan: Plan) -> str:
    used = [line for line in plan.traffic if line.step or line.update]
    if not used:
        return "No messages: one process."
    unit, size = _unit(_BYTES, max(max(line.step_wire, line.update_wire) for line in used))
    head = [f"{unit} a rank on the link", "ranks"]
    rows = [[*head, "a step", "by a ring", "messages", "an update", "by a ring", "messages"]]
    for line in used:
        cells = []
        for sent, wire, messages in (
            (line.step, line.step_wire, line.step_messages),
            (line.update, line.update_wire, line.update_messages),
        ):
            cells += [f"{sent / size:,.1f}", f"{wire / size:,.1f}", f"{messages:,.0f}"]
        rows.append([line.link, str(line.ranks), *cells])
    return _columns(rows)


def _time(plan: Plan) -> str:
    step_s, steps = plan.step_s, plan.config.training.steps
    rate = plan.tokens_a_step / step_s / plan.gpus
    lines = [
        f"Weighting costs {100 * plan.cost.share:.2f} % more FLOPs and {100 * plan.time_share:.2f} "
        "% more time than plain training.",
        f"At {100 * plan.mfu:.0f} % of the peak: {_duration(step_s)} a step, {rate:,.0f} tokens "
        f"a second and GPU, {_duration(step_s * steps)} for {steps:,} steps "
        f"({_gpu_hours(plan)} GPU hours).",
    ]
    if plan.bubble:
        lines.append(f"Pipeline bubble: {100 * plan.bubble:.1f} % of a step's work.")
    return "\n".join(lines)


def _gpu_hours(plan: Plan) -> str:
    hours = plan.step_s * plan.config.training.steps * plan.gpus / 3600
    return f"{hours:,.1f}" if hours >= 0.1 else "below 0.1"


def _verdict(plan: Plan) -> str:
    unit, size = _unit(_BYTES, plan.needed_bytes)
    sizes = (
        f"{plan.needed_bytes / size:.1f} {unit} needed on stage {plan.fullest}, "
        f"{plan.usable_bytes / _GB:.1f} of {plan.gpu.memory_bytes / _GB:.0f} GB usable "
        f"({100 * RESERVE:.0f} % kept back)"
    )
    if plan.fits:
        return f"fits: {sizes}"
    return "\n".join([f"does not fit: {sizes}", *(f"  try {what}" for what in advice(plan))])


def _unit(units: dict[str, float], largest: float) -> tuple[str, float]:
    """Returns the largest unit that is at most `largest`, else the smallest, with its size."""
    fitting = (pair for pair in units.items() if largest >= pair[1])
    return next(fitting, list(units.items())[-1])


def _size(size_bytes: float) -> str:
    unit, size = _unit(_BYTES, size_bytes)
    return f"{size_bytes / size:,.1f} {unit}"


def _duration(seconds: float) -> str:
    unit, size = _unit(_SECONDS, seconds)
    return f"{seconds / size:,.1f} {unit}"


def _columns(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        first = row[0].ljust(widths[0])
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([first, *rest]).rstrip())
    return "\n".join(lines)
