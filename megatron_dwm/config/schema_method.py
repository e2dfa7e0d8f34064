"""The sections of the method: its target, its policy, its weighting model and its updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from megatron_dwm.config.bounds import (
    COUNT,
    COUNT_OR_ZERO,
    DECAY,
    FACTOR,
    FRACTION,
    FRACTION_ABOVE_ZERO,
    INNER_WIDTH,
    LAYERS,
    RATE,
    ROWS,
    TEMPERATURE,
    WIDTH,
)
from megatron_dwm.config.key import SET, key
from megatron_dwm.config.methods import METHODS

PolicyName: TypeAlias = Literal[tuple(METHODS)]  # type: ignore[valid-type]

_STAGED = {"weighting.mode": ("staged",)}
_ONLINE = {"weighting.mode": ("online",)}
_NOT_LOADED = {"weighting.load": (None,)}
_LEARNED = {"weighting.frozen": (False,)}
_NOISE_KNOWN = {"bilevel.estimator": ("tangent_probe", "finite_difference")}


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """The target: the text whose loss the weighting model lowers."""

    path: str | None = key(None, part="target")
    """JSON Lines file with a `text` in every line (required by policy dwm)"""
    loss_on: Literal["all", "last_word"] = key("all", part="target")
    """tokens that carry the validation loss"""
    batch_size: int | None = key(None, ROWS, part="updates")
    """passages in one validation batch, none of them twice, so at most the file's rows (with
    loss_on all a row is data.sequence_length tokens); empty takes training.global_batch_size"""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Who decides what a sample weighs."""

    name: PolicyName = "uniform"
    """the method"""
    domain_decay: float = key(0.9, FRACTION, part="domain_mean")
    """part of a domain's running mean that an update keeps (domain_mean)"""
    domain_temperature: float = key(0.5, TEMPERATURE, part="domain_mean")
    """divides the domains' means before the softmax (domain_mean); the means are of size 1, without
    weighting.standardize nats of validation loss, some thousandths"""
    loss_decay: float = key(0.9, FRACTION, part="losses")
    """part of the running moments of the losses that a step keeps (loss_reweighting)"""
    loss_temperature: float = key(1.0, TEMPERATURE, part="losses")
    """divides the losses, in standard deviations from their mean, before the softmax
    (loss_reweighting)"""
    mix_fraction: float = key(0.1, FRACTION, part="mixing")
    """part of every batch that is target passages, rounded to whole samples (validation_mixing)"""


@dataclass(frozen=True, kw_only=True)
class WeightingConfig:
    """The weighting model and when it learns (policies dwm and domain_mean)."""

    encoder: Literal["own", "llm"] = key("own", part="weighting_model")
    """own: a small Llama of its own reads the tokens, and can be used with another LLM; llm: it
    reads what the LLM's forward pass makes of a sample, which costs next to nothing"""
    early_layer: int = key(1, LAYERS, part="weighting_model", only={"weighting.encoder": ("llm",)})
    """the LLM's layer, from 1, whose pooled output is read beside the final one"""
    mode: Literal["staged", "online"] = key("staged", part="updates")
    """staged updates at stage boundaries with the LLM frozen; online updates every few steps"""
    stages: int = key(5, COUNT, part="updates", only=_STAGED)
    """stages of equal length"""
    updates_per_stage: int = key(30, COUNT, part="updates", only=_STAGED)
    """weighting updates at each stage boundary"""
    interval_steps: int = key(10, COUNT, part="updates", only=_ONLINE)
    """LLM steps between two weighting updates"""
    warmup_steps: int = key(50, COUNT_OR_ZERO, part="updates", only=_ONLINE)
    """LLM steps with uniform weights before the first update; update_on training, whose first
    update comes inside the last of them, needs 2 or more"""
    update_on: Literal["fresh", "training"] = key("fresh", part="updates")
    """fresh: an update draws a batch of its own and costs three plain steps; training (online): it
    uses the batch, gradient and weights of the LLM step under way and costs two"""
    freeze_after: float = key(1.0, FRACTION_ABOVE_ZERO, part="updates")
    """fraction of training.steps after which the weighting model is no longer updated"""
    damp_by_noise: bool = key(False, part="updates")
    """shorten the updates by the measured reliability of the alignments"""
    load: str | None = key(None, part="weighting_model")
    """directory of a weighting model (weighting/stage_K of a run) to start from; its sizes replace
    the four below (policy dwm); with encoder own, data.tokenizer must be the one it was trained
    with"""
    frozen: bool = key(False, part="weighting_model")
    """apply the loaded weighting model without updating it"""
    hidden_size: int = key(32, WIDTH, part="weighting_model", only=_NOT_LOADED)
    """width of the weighting model"""
    num_layers: int = key(
        1, LAYERS, part="weighting_model", only={**_NOT_LOADED, "weighting.encoder": ("own",)}
    )
    """transformer layers of its token encoder"""
    num_attention_heads: int = key(4, WIDTH, part="weighting_model", only=_NOT_LOADED)
    """heads of its encoder and of its attention across samples"""
    ffn_hidden_size: int = key(64, INNER_WIDTH, part="weighting_model", only=_NOT_LOADED)
    """inner width of its SwiGLU blocks"""
    group: Literal["micro_batch", "global"] = key("micro_batch", part="groups")
    """samples that share a softmax: those of a micro-batch, or of the global batch"""
    learning_rate: float = key(1e-3, RATE, part="weighting_model", only=_LEARNED)
    """learning rate of AdamW on the weighting model"""
    weight_decay: float = key(0.0, DECAY, part="weighting_model", only=_LEARNED)
    """decoupled weight decay of the weighting model"""
    clip_grad: float = key(1.0, FACTOR, part="weighting_model", only=_LEARNED)
    """largest gradient norm of the weighting model; 0 switches clipping off"""
    standardize: bool = key(True, part="alignments")
    """standardise the alignments inside the weighting group before they drive an update; false
    takes them in nats of validation loss, whose size drifts during training"""
    min_effective_sample_size: float = key(0.5, FRACTION, part="groups")
    """smallest effective sample size of a group, as a fraction of it, held by a temperature; above
    1 / the group's samples, which it never falls below; 0 switches it off"""
    warn_effective_sample_size: float = key(0.1, FRACTION, part="groups")
    """warn once when the effective sample size of a batch's weights, as a fraction of the batch,
    falls below this"""
    uniform_floor: float = key(0.0, FRACTION, part="groups")
    """part of every weight that stays uniform"""


@dataclass(frozen=True, kw_only=True)
class BilevelConfig:
    """How the hypergradient is computed (METHOD.md, section 2)."""

    estimator: Literal["tangent_probe", "finite_difference", "unroll"] = key(
        "tangent_probe", part="updates"
    )
    """tangent_probe works under every layout; the other two are slow cross-checks"""
    inner_optimizer: Literal["adam", "sgd"] = key("adam", part="updates")
    """the virtual step: the step that training would take (adam), or plain gradient descent"""
    noise_interval_updates: int = key(10, COUNT_OR_ZERO, part="updates", only=_NOISE_KNOWN)
    """weighting updates between measurements of the alignments' signal-to-noise, each of which
    costs one more pass and needs two passages and three samples; 0 never measures"""
    min_signal_to_noise: float = key(
        0.1, FACTOR, part="updates", only={**_NOISE_KNOWN, "bilevel.noise_interval_updates": SET}
    )
    """warn once when the measured signal-to-noise stays below this"""
