"""The export's README.md: origin of the model, its training data and its last metrics.

Everything is read from the checkpoint and, in one pass, from metrics.jsonl of its run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_dwm.config.architectures import Architecture, architecture_with
from megatron_dwm.config.huggingface import CONFIG_NAME, architecture_of, read_json_object
from megatron_dwm.config.printing import printable
from megatron_dwm.convert.checkpoint_reader import SavedLLM

_STEP = "step_"
_PHASES = ("train", "weighting", "evaluation")
_HEADER = """---
library_name: transformers
pipeline_tag: text-generation
tags: [{model_type}, megatron_dwm]
---
"""


def model_card(
    saved: SavedLLM,
    *,
    dtype: str,
    context_tokens: int,
    changes: Sequence[str],
    logits_deviation: float | None,
) -> str:
    """Returns the text of the model card.

    Args:
        saved: the checkpoint.
        dtype: data type of the parameters.
        context_tokens: the longest sequence, as config.json says.
        changes: what differs from the original model's files, one line each.
        logits_deviation: what the gate measured; None if it was skipped.
    """
    architecture = _architecture(saved)
    about = _about(saved, architecture, dtype, context_tokens)
    header = _HEADER.format(model_type=architecture.model_type)
    parts = [header, f"# {_title(saved)}\n", about, _check(logits_deviation)]
    if saved.huggingface_directory is not None:
        parts.append(_origin(saved, changes))
    if saved.was_trained_here:
        parts += [_training(saved.config), _metrics(saved)]
    config = yaml.safe_dump(saved.config, sort_keys=False, allow_unicode=True)
    parts.append(f"## The run's whole configuration\n\n```yaml\n{config}```\n")
    return "\n".join(part for part in parts if part)


def _title(saved: SavedLLM) -> str:
    directory = saved.directory.resolve()
    if directory.parent.name == "checkpoints":
        return f"{directory.parent.parent.name}, {directory.name.replace('_', ' ')}"
    return directory.name


def _origin(saved: SavedLLM, changes: Sequence[str]) -> str:
    """Returns the section that says what is unchanged, and what changed."""
    weights = ["the weights were trained here"] if saved.was_trained_here else []
    lines = "\n".join(f"* {change}" for change in [*weights, *changes]) or "* nothing"
    return (
        "## From a Hugging Face model\n\nConfiguration, generation settings, tokenizer, chat "
        f"template and license are the original files. What changed:\n\n{lines}\n"
    )


def _architecture(saved: SavedLLM) -> Architecture:
    """Returns the class of the exported model: the original one, or the one with our layers."""
    original = saved.huggingface_directory
    if original is not None:
        path = original / CONFIG_NAME
        return architecture_of(read_json_object(path), path)
    shape = saved.shape
    return architecture_with(qk_layernorm=shape.qk_layernorm, add_qkv_bias=shape.add_qkv_bias)


def _about(saved: SavedLLM, architecture: Architecture, dtype: str, context_tokens: int) -> str:
    shape = saved.shape
    rows = {
        "architecture": architecture.class_name,
        "parameters": f"{shape.num_parameters():,} ({dtype})",
        "layers, width, heads, key-value heads": (
            f"{shape.num_layers}, {shape.hidden_size}, {shape.num_attention_heads}, "
            f"{shape.num_query_groups}"
        ),
        "vocabulary": f"{shape.vocab_size:,} (no padding)",
        "context": f"{context_tokens:,} tokens",
        "converted from": f"`{saved.origin or saved.directory}`",
    }
    return _table(rows)


def _check(deviation: float | None) -> str:
    if deviation is None:
        return (
            "**The comparison of logits was skipped (`--skip-check`).** Nothing shows that this "
            "model computes what the trained model did.\n"
        )
    return (
        "Before this directory was written, the logits of this model (transformers) and of the "
        "checkpoint (Megatron-Core) were compared on real text: the largest difference was "
        f"{deviation:.1e} of the largest logit.\n"
    )


def _training(config: dict[str, Any]) -> str:
    """Returns the main settings of the training; the whole configuration follows in the card."""
    of = {section: config.get(section) or {} for section in ("training", "data", "policy", "run")}
    batch = of["training"].get("global_batch_size")
    rows = {
        "training data": ", ".join(f"`{entry}`" for entry in of["data"].get("train") or ()),
        "policy (how samples are weighted)": of["policy"].get("name"),
        "target text": (config.get("validation") or {}).get("path"),
        "start": (config.get("model") or {}).get("init_from") or "random parameters",
        "steps planned": of["training"].get("steps"),
        "samples a step x tokens a sample": f"{batch} x {of['data'].get('sequence_length')}",
        "peak learning rate": of["training"].get("learning_rate"),
        "seed": of["run"].get("seed"),
    }
    return "## Training\n\n" + _table({key: value for key, value in rows.items() if value})


def _metrics(saved: SavedLLM) -> str:
    """Returns the last metrics of every phase up to the checkpoint's step."""
    path = saved.directory.resolve().parent.parent / "metrics.jsonl"
    step = saved.directory.resolve().name.removeprefix(_STEP)
    if not path.is_file() or not step.isdigit():
        return ""
    last = _last_lines(path, int(step))
    tables = [f"### {phase}\n\n" + _table(_flat(last[phase])) for phase in _PHASES if phase in last]
    return "\n".join([f"## Metrics at step {int(step)}\n", *tables]) if tables else ""


def _last_lines(path: Path, step: int) -> dict[str, dict[str, Any]]:
    last: dict[str, dict[str, Any]] = {}
    with path.open("rb") as lines:
        for line in lines:
            try:
                values = json.loads(line.decode())
            except (ValueError, RecursionError):  # a run that is still writing
                continue
            is_record = isinstance(values, dict) and type(values.get("step")) is int
            if is_record and values["step"] <= step:
                last[str(values.get("phase"))] = values
    return last


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{key}: {name}": inner for name, inner in value.items()}
        elif key not in ("phase", "stage"):
            flat[key] = value
    return {key: f"{v:.4g}" if isinstance(v, float) else v for key, v in flat.items()}


def _table(rows: dict[str, Any]) -> str:
    lines = [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items()]
    return "\n".join(["| | |", "| --- | --- |", *lines]) + "\n"


def _cell(value: Any) -> str:
    """Returns a key or value, which may come from data, without what would end a cell or row."""
    return printable(value).replace("|", "/")
