"""The sections of the method: its target, its policy, its weighting model and its updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron_dwm.config.bounds import (
    COUNT,
    COUNT_OR_ZERO,
    DECAY,
    FACTOR,
    FRACTION,
    FRACTION_ABOVE_ZERO,
    INNER_WIDTH,
    LAYERS,
    POOL,
    POWER,
    RATE,
    ROWS,
    TEMPERATURE,
    TOKENS,
    WHOLE_FRACTION,
    WIDTH,
)
from megatron_dwm.config.key import PLUGIN, SET, SEVERAL, Condition, key

_STAGED = {"weighting.mode": ("staged",)}
_ONLINE = {"weighting.mode": ("online",)}
_AHEAD = {"weighting.update_on": ("ahead",)}
_GLOBAL = {"weighting.group": ("global",)}
_GLOBAL_LLM = {"weighting.encoder": ("llm",), **_GLOBAL}
_ALONE = {**_GLOBAL_LLM, "weighting.across_samples": (False,)}
_GLOBAL_RULE = {**_GLOBAL, "policy.name": ("similarity", "loss_reweighting")}
_GLOBAL_PLUGIN: Condition = {**_GLOBAL, "policy.name": PLUGIN}
_NOT_LOADED = {"weighting.load": (None,)}
_LEARNED = {"weighting.frozen": (False,)}
_NOISE_KNOWN = {"bilevel.estimator": ("tangent_probe", "finite_difference")}


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """The target: the text whose loss the weights should lower."""

    path: str | None = key(None, part="target")
    """JSON Lines file with a `text` in every line (policy dwm needs it)"""
    loss_on: Literal["all", "last_word"] = key("all", part="target")
    """tokens that count in the validation loss: all, or those of a passage's last word"""
    batch_size: int | None = key(None, ROWS, part="passages")
    """passages in one validation batch; none appears twice in a batch, so at most the number of
    rows in the file (with loss_on all a row has data.sequence_length tokens); empty means
    training.global_batch_size, and a quarter of it with weighting.update_on ahead"""


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The method that decides the weights, and options of single methods."""

    name: str = "uniform"
    """the method"""
    options: dict[str, Any] = key({}, only={"policy.name": PLUGIN})
    """options of a method of your own, which declares them: --policy.options.NAME VALUE, or in a
    file {NAME: VALUE, ...}"""
    domain_decay: float = key(0.9, FRACTION, part="domain_mean")
    """fraction of a domain's running mean that an update keeps (domain_mean)"""
    domain_temperature: float = key(0.5, TEMPERATURE, part="domain_mean")
    """temperature of the softmax over the domains' means (domain_mean); the means are near 1 in
    size, or without weighting.standardize thousandths (nats of validation loss)"""
    loss_decay: float = key(0.9, FRACTION, part="losses")
    """fraction of the running moments of the losses that a step keeps (loss_reweighting)"""
    loss_temperature: float = key(1.0, TEMPERATURE, part="losses")
    """temperature of the softmax over the losses, in standard deviations from their mean
    (loss_reweighting)"""
    similarity_temperature: float = key(0.1, TEMPERATURE, part="similarity")
    """temperature of the softmax over the cosines, which are between -1 and 1 (similarity)"""
    similarity_layer: int = key(1, LAYERS, part="similarity")
    """layer of the LLM, counted from 1, whose pooled output is compared in addition to the last
    one's (similarity)"""
    alignment_choice: Literal["softmax", "greedy"] = key("softmax", part="gradient_alignment")
    """softmax: weights follow the alignments; greedy: policy.keep_ratio of the units of a group
    have equal weights and the others none, chosen one by one by alignment less overlap with those
    already chosen, as in GREATS (gradient_alignment)"""
    alignment_temperature: float = key(
        1.0, TEMPERATURE, part="gradient_alignment", only={"policy.alignment_choice": ("softmax",)}
    )
    """temperature of the softmax over the alignments, in standard deviations from their mean
    (gradient_alignment)"""
    alignment_decay: float = key(
        0.0,
        FRACTION,
        part="gradient_alignment",
        only={"policy.alignment_choice": ("softmax",)},
    )
    """fraction of the alignments' running moments that a batch keeps: weights follow alignments in
    units of their deviation over the batches so far, so that a batch, or group, whose alignments
    hardly differ has nearly uniform weights; 0 takes each group's own deviation
    (gradient_alignment)"""
    alignment_warmup: int = key(50, COUNT, part="aligned_steps")
    """LLM steps with uniform weights (opus: random choices) at first, in which Adam's moments
    settle (gradient_alignment, opus)"""
    alignment_interval: int = key(1, COUNT, part="aligned_steps")
    """steps from one computation of alignments, and of weights or a choice from them, to the next;
    the others have uniform weights, or a random choice (gradient_alignment, opus)"""
    redundancy: float = key(1.0, FACTOR, part="redundancy")
    """how much the overlap with chosen units counts against a unit: factor of eta^2 times the inner
    product of both units' steps, beside eta times the alignment; 0 switches it off
    (gradient_alignment, opus)"""
    overlap_unit: Literal["loss", "deviation"] = key(
        "loss", part="redundancy", only={"policy.redundancy": SET}
    )
    """unit of overlaps: loss: as above and as published, whose size beside the alignments grows
    with the model and the learning rate; deviation: repeating a chosen unit costs
    policy.redundancy standard deviations of the alignments (gradient_alignment, opus)"""
    sketch_size: int = key(8192, COUNT_OR_ZERO, part="redundancy", only={"policy.redundancy": SET})
    """numbers of the sketch of a unit's step, from which overlaps are computed: their error is
    1.1 % of the steps' sizes at 8192, and falls with the square root; 0 is exact and takes one for
    every parameter of the model (gradient_alignment, opus)"""
    selection_temperature: float = key(0.9, FACTOR, part="sampling")
    """temperature at which candidates are drawn one by one, in standard deviations of the pool's
    alignments; 0 always takes the best, a high one draws at random (opus)"""
    jacobian: Literal["frozen", "exact"] = key("frozen", part="sampling")
    """frozen: score candidates with Adam's moments and at the parameters that stand; exact: through
    the virtual step along the pool's gradient, a training pass of the pool more (opus)"""
    score_tokens: int | None = key(None, TOKENS, part="sampling")
    """score candidates by their first tokens, this many, at most data.sequence_length; empty means
    all (opus)"""
    reference: str | None = key(None, part="reference", only={"policy.reference_losses": (None,)})
    """the reference model (excess_loss): a Hugging Face directory, or a checkpoint of ours or of
    Megatron-LM's, with the LLM's vocabulary"""
    reference_losses: str | None = key(None, part="reference")
    """instead of a model, NAME of files with its loss of every token, PREFIX.NAME.losses beside
    each prefix of data.train (excess_loss); needs data.mask_documents true and data.border_loss
    false"""
    offload_reference: bool = key(
        False, part="second_llm", only={"policy.reference_losses": (None,)}
    )
    """keep the reference, and its optimizer if it learns, in host memory between its uses: less GPU
    memory in the LLM's passes, for copies over the bus in every step (excess_loss, blade)"""
    sync_interval_steps: int = key(1000, COUNT, part="dynamic_reference")
    """LLM steps between two synchronizations of the reference with the LLM (blade)"""
    sync_first_step: int = key(1000, COUNT, part="dynamic_reference")
    """LLM steps with uniform weights before the first synchronization (blade)"""
    reference_steps: int = key(300, COUNT, part="dynamic_reference")
    """steps of the reference on its own objective after every synchronization (blade)"""
    reference_learning_rate: float = key(1e-4, RATE, part="dynamic_reference")
    """learning rate of those steps, constant (blade)"""
    penalty: float = key(1.0, FACTOR, part="dynamic_reference")
    """weight of the training loss in the reference's objective, that of the validation loss is 1
    (blade)"""
    keep_ratio: float = key(0.6, FRACTION_ABOVE_ZERO, part="selection")
    """fraction of the units that carry loss, at least one in a group (excess_loss, blade;
    gradient_alignment with alignment_choice greedy)"""
    keep_scope: Literal["group", "sequence"] = key(
        "group", part="selection", only={"weighting.unit": ("token",)}
    )
    """where the fraction is kept: in a weighting group, or in every sample (excess_loss, blade)"""
    column: str | None = key(None, part="values")
    """column of the metadata (PREFIX.meta.parquet) with every document's weight, 0 or more (fixed);
    a sample weighs the mean over its tokens"""
    domain_weights: dict[str, float] = key({}, FACTOR, part="values")
    """instead of a column, NAME=WEIGHT NAME=WEIGHT ... (in a file, {NAME: WEIGHT, ...}) for domains
    of data.domain_key; a domain without a name here weighs 1 (fixed)"""
    difficulty: str = key("tokens", part="pacing")
    """column of the metadata (PREFIX.meta.parquet) with every document's difficulty, or tokens, the
    length of the document (curriculum); a sample's is the mean over its tokens"""
    pacing_start: float = key(0.01, WHOLE_FRACTION, part="pacing")
    """fraction of the corpus, its easiest, that carries weight in the first step (curriculum)"""
    pacing_power: float = key(2.0, POWER, part="pacing")
    """how that fraction grows to 1 (curriculum): raised to this power, it grows linearly; so 1 is a
    line, and 2 a square root, which grows fast at first"""
    pacing_steps: float = key(0.5, FRACTION_ABOVE_ZERO, part="pacing")
    """fraction of training.steps after which the whole corpus carries weight (curriculum)"""
    mix_fraction: float = key(0.1, FRACTION, part="mixing")
    """fraction of every batch that consists of target passages, rounded to whole samples
    (validation_mixing)"""


@dataclass(frozen=True, kw_only=True)
class WeightingConfig:
    """The weighting model, when it is updated, and how weights follow from scores."""

    encoder: Literal["own", "llm"] = key("own", part="weighting_model")
    """own: the weighting model has a small Llama that reads the tokens, and works with any LLM;
    llm: it reads the LLM's hidden states of a sample, which costs almost nothing"""
    early_layer: int = key(1, LAYERS, part="weighting_model", only={"weighting.encoder": ("llm",)})
    """layer of the LLM, counted from 1, whose pooled output is read in addition to the last
    one's"""
    mode: Literal["staged", "online"] = key("staged", part="updates")
    """staged: updates at stage boundaries with the LLM frozen; online: updates every few steps"""
    stages: int = key(5, COUNT, part="updates", only=_STAGED)
    """stages of equal length"""
    updates_per_stage: int = key(30, COUNT, part="updates", only=_STAGED)
    """weighting updates at each stage boundary"""
    interval_steps: int = key(10, COUNT, part="updates", only=_ONLINE)
    """LLM steps between two weighting updates"""
    warmup_steps: int = key(50, COUNT_OR_ZERO, part="updates", only=_ONLINE)
    """LLM steps with uniform weights before the first update; at least 2 unless update_on is fresh,
    because the first update happens inside the last of them"""
    update_on: Literal["fresh", "training", "ahead"] | None = key(None, part="alignments")
    """fresh: an update reads its own batch and costs three plain steps; training (mode online): it
    uses the batch, gradient and weights of the current LLM step and costs two; ahead (mode online):
    the direction is computed before that step's gradient, at the parameters and moments that stand,
    and the step's own pass is probed: it costs validation.batch_size / training.global_batch_size
    plus about a third of weighting.probe_fraction; empty means ahead in mode online (with
    bilevel.estimator tangent_probe), else fresh"""
    probe_fraction: float | None = key(None, FRACTION_ABOVE_ZERO, part="alignments", only=_AHEAD)
    """fraction of a step's micro-batches, from the first, whose alignments an update computes; the
    weighting model learns from these; empty means half of them, rounded up; which samples they are
    depends on training.micro_batch_size and on the number of replicas"""
    direction_precision: Literal["fp32", "bf16"] | None = key(None, part="alignments", only=_AHEAD)
    """of the direction's own buffer, which takes 4 or 2 bytes a parameter during an update, twice
    that when noise is measured; empty means fp32 with model.precision fp32, else bf16, to which
    products round it anyway"""
    freeze_after: float = key(1.0, FRACTION_ABOVE_ZERO, part="updates")
    """fraction of training.steps after which the weighting model is no longer updated"""
    damp_by_noise: bool = key(False, part="alignments")
    """multiply the learning rate of updates by the measured reliability of the alignments"""
    load: str | None = key(None, part="weighting_model")
    """directory of a weighting model (weighting/stage_K of a run) to start from; its sizes replace
    hidden_size to ffn_hidden_size, and across_samples; with encoder own, data.tokenizer must be the
    tokenizer it was trained with; the run itself, or its folder weighting, names the models of all
    its N stages, which a frozen model takes in turn, each for one Nth of this run"""
    frozen: bool = key(False, part="weighting_model")
    """use the loaded weighting model without updating it"""
    pool_batches: int = key(1, POOL, part="pool")
    """global batches that a step reads, of which it trains on one: samples that the method chooses
    among all of them; so the run reads this many times as many samples; 1 trains on all"""
    kept_weights: Literal["equal", "learned"] = key(
        "equal", part="weighting_model", only={"weighting.pool_batches": SEVERAL}
    )
    """weights of the samples that a weighting model keeps of a pool: all 1, so that it only selects
    (its logits already decided, and nothing is weighed twice), or its weights in the new batch"""
    hidden_size: int = key(32, WIDTH, part="weighting_model", only=_NOT_LOADED)
    """width of the weighting model"""
    num_layers: int = key(
        1, LAYERS, part="weighting_model", only={**_NOT_LOADED, "weighting.encoder": ("own",)}
    )
    """transformer layers of the weighting model's token encoder"""
    num_attention_heads: int = key(4, WIDTH, part="weighting_model", only=_NOT_LOADED)
    """attention heads of the weighting model, in its encoder (own) and across samples"""
    ffn_hidden_size: int = key(64, INNER_WIDTH, part="weighting_model", only=_NOT_LOADED)
    """inner width of the SwiGLU blocks in its encoder (own) and across samples"""
    unit: Literal["sample", "document", "token"] = "sample"
    """what gets a weight: a sample, which is a row of data.sequence_length tokens, each piece of a
    document in it, or each token (policies excess_loss and blade)"""
    unit_share: Literal["tokens", "equal"] = key("tokens", only={"weighting.unit": ("document",)})
    """how much a unit counts in the training loss, besides its weight: in proportion to its tokens,
    so that equal weights are plain training, or all units the same"""
    group: Literal["micro_batch", "global"] = key("micro_batch", part="groups")
    """samples that are normalized together: those of a micro-batch, or of the global batch"""
    across_samples: bool | None = key(None, part="weighting_model", only=_NOT_LOADED)
    """the weighting model compares the samples of a group by attention; false: it looks at each
    alone, with encoder llm beside running statistics of losses and features; empty means true with
    encoder own, false with encoder llm"""
    normalizer: Literal["deferred", "first"] = key(
        "deferred",
        part="normalizer",
        only=(_ALONE, {**_GLOBAL_LLM, "weighting.load": SET}, _GLOBAL_RULE, _GLOBAL_PLUGIN),
    )
    """when weights over the global batch that look at each sample alone (dwm with across_samples
    false, similarity, loss_reweighting) are divided by their mean; deferred: after the pass, with
    the temperature of the step before, whatever the micro-batches are; no batch is read twice but
    the first one of similarity, loss_reweighting and a loaded model; first: before it, so a batch
    of several micro-batches is read once more, which costs a forward pass, as it always does with
    across_samples true"""
    learning_rate: float = key(1e-3, RATE, part="weighting_model", only=_LEARNED)
    """learning rate of the weighting model (AdamW)"""
    weight_decay: float = key(0.0, DECAY, part="weighting_model", only=_LEARNED)
    """decoupled weight decay of the weighting model"""
    clip_grad: float = key(1.0, FACTOR, part="weighting_model", only=_LEARNED)
    """largest gradient norm of the weighting model; 0 switches clipping off"""
    standardize: bool = key(True, part="alignments")
    """standardize the alignments of a weighting group before an update; false keeps them in nats of
    validation loss, whose size changes during training (with update_on ahead they leave out the
    factor by which the step's gradient is clipped)"""
    min_effective_sample_size: float = key(0.5, FRACTION, part="softmax")
    """smallest effective sample size of a group, as a fraction of its samples, enforced by a
    temperature (with weighting.normalizer deferred by that of the step before); must be above
    1 / samples, since it is never smaller; 0 switches it off"""
    warn_effective_sample_size: float = key(0.1, FRACTION, part="groups")
    """warn once if the effective sample size of a batch's weights, as a fraction of the batch,
    falls below this"""
    uniform_floor: float = key(0.0, FRACTION, part="softmax")
    """fraction of every weight that is uniform"""

    @property
    def attends_across_samples(self) -> bool:
        """True if the weighting model has attention across samples (`across_samples`)."""
        return self.encoder == "own" if self.across_samples is None else self.across_samples


@dataclass(frozen=True, kw_only=True)
class BilevelConfig:
    """How the hypergradient is computed (METHOD.md, section 2)."""

    estimator: Literal["tangent_probe", "finite_difference", "unroll"] = key(
        "tangent_probe", part="hypergradients"
    )
    """tangent_probe works under every layout; the other two are slow and for comparison"""
    inner_optimizer: Literal["adam", "sgd"] = key("adam", part="hypergradients")
    """the virtual step: the step of the LLM's optimizer (adam), or plain gradient descent (sgd)"""
    noise_interval_updates: int = key(10, COUNT_OR_ZERO, part="hypergradients", only=_NOISE_KNOWN)
    """weighting updates between measurements of the alignments' signal-to-noise ratio; one costs an
    extra pass and needs two passages and three samples that are probed; 0 never measures"""
    min_signal_to_noise: float = key(
        0.1,
        FACTOR,
        part="hypergradients",
        only={**_NOISE_KNOWN, "bilevel.noise_interval_updates": SET},
    )
    """warn once if the measured signal-to-noise ratio stays below this"""
