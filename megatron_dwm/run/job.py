"""The components of a run, built from its configuration."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_dwm.checkpoint.kept_files import kept_files
from megatron_dwm.checkpoint.load import load_checkpoint
from megatron_dwm.checkpoint.names import CONFIG_FILE, SHAPE_FILE
from megatron_dwm.checkpoint.parts import Parts
from megatron_dwm.checkpoint.state import NOT_EVALUATED, TrainState
from megatron_dwm.config import Config
from megatron_dwm.config.load import config_text
from megatron_dwm.data import CorpusSource, Feed, Share, TrainingData
from megatron_dwm.data.document_counts import document_counts
from megatron_dwm.data.pieces import document_rules
from megatron_dwm.data.shares import ReadSteps
from megatron_dwm.model.offload import Offload
from megatron_dwm.run.inputs import RunInputs
from megatron_dwm.run.reads import training_reads, update_reads
from megatron_dwm.run.reference import Reference, build_reference
from megatron_dwm.runtime import Runtime
from megatron_dwm.training import Learner, build_learner
from megatron_dwm.training.evaluation import HeldOut
from megatron_dwm.training.optimizer import begin_at
from megatron_dwm.weighting import BuildContext, Method, method_class
from megatron_dwm.weighting.costs import Costs, Workload
from megatron_dwm.weighting.schedule import Schedule

INDEX_CACHE = "index_cache"
"""folder of a run for its sample indices, unless data.cache_dir is set"""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The components that the loop uses, and the counters of the run."""

    learner: Learner
    method: Method
    schedule: Schedule
    feed: Feed
    held_out: HeldOut | None
    costs: Costs
    state: TrainState
    reference: Reference | None = None

    @property
    def stage(self) -> int:
        """Number of the stage of the last step, or of the last update inside a weighting phase."""
        step, inside = self.state.step, self.state.stage_updates > 0
        return self.schedule.stage(step if inside else max(step - 1, 0))


def build_job(config: Config, runtime: Runtime, inputs: RunInputs, updates_made: int = 0) -> Job:
    """Build every component; a collective call. Raises UserError for data that cannot be used.

    updates_made: number of updates that the run goes on from.
    """
    learner = build_learner(
        inputs.shape,
        config.model,
        config.parallel,
        config.training,
        runtime,
        sequence_length=config.data.sequence_length,
        seed=config.run.seed,
    )
    method = method_class(config)
    reference = build_reference(config, inputs.reference, runtime)
    context = BuildContext(
        config=config,
        llm=learner.llm,
        tokenizer=inputs.tokenizer,
        target=inputs.target,
        reference=None if reference is None else reference.llm,
        reference_optimizer=None if reference is None else reference.optimizer,
        reference_offload=Offload() if reference is None else reference.offload,
        values=inputs.values,
    )
    feed = build_feed(config, learner, inputs, updates_made)
    workload = Workload(
        replicas=runtime.data_size,
        passages=None if inputs.target is None else feed.passages,
        documents=document_counts(config),
        reference=inputs.reference,
    )
    costs = method.costs(config, inputs.shape, workload)
    evaluated_step = NOT_EVALUATED if config.evaluation.at_start else 0
    return Job(
        learner=learner,
        method=method.build(context),
        schedule=method.schedule(config),
        feed=feed,
        held_out=inputs.held_out,
        costs=costs,
        state=TrainState(evaluated_step=evaluated_step, costs=asdict(costs)),
        reference=reference,
    )


def parts_of(config: Config, job: Job, inputs: RunInputs, newest: Path | None) -> Parts:
    """Returns what checkpoints of the job hold. newest: the one that it goes on from."""
    files: dict[str, bytes] = {}
    if job.learner.runtime.is_main:
        files = {
            CONFIG_FILE: config_text(config).encode(),
            SHAPE_FILE: json.dumps(inputs.shape.record()).encode(),
            **kept_files(config, inputs.tokenizer, newest),
        }
    return Parts(
        llm=job.learner.llm,
        optimizer=job.learner.optimizer,
        method_name=config.policy.name,
        method=job.method,
        state=job.state,
        reference=None if job.reference is None else job.reference.saved,
        files=files,
    )


def load_job(job: Job, parts: Parts, directory: Path) -> None:
    """Put the job into the state that a checkpoint holds, the learning rate included (collective).

    parts: the job's own.
    """
    load_checkpoint(parts, directory)
    begin_at(job.learner.scheduler, job.state.step + 1)
    _go_on_counting(job.state, job.costs)


def _go_on_counting(state: TrainState, costs: Costs) -> None:
    """Keep the FLOPs that the run has spent so far, if from here on it counts by other costs."""
    now = asdict(costs)
    if state.costs is not None and state.costs != now and state.costs.keys() == now.keys():
        pairs = zip(Costs(**state.costs).totals(state), costs.totals(state), strict=True)
        more = [before - after for before, after in pairs]
        state.flops_offset = [a + b for a, b in zip(state.flops_offset, more, strict=True)]
    state.costs = now


def build_feed(config: Config, learner: Learner, inputs: RunInputs, updates_made: int = 0) -> Feed:
    """Build the batches that the steps and updates of the run read; a collective call.

    updates_made: as in `build_job`. An allowed change may leave more updates to come than the new
    schedule has after as many.
    """
    method, size = method_class(config), config.training.global_batch_size
    updates = None
    if (reads := update_reads(config)) is not None:
        # The same documents in another order, so that weighting updates never change what the LLM
        # reads.
        data = _corpus(config, inputs, reads, "weighting", more=updates_made * size)
        updates = CorpusSource(data, size, "update")
    pools = method.pool_batches(config)
    corpus = CorpusSource(_corpus(config, inputs, training_reads(config), "training"), size * pools)
    runtime = learner.runtime
    return Feed(
        method.training_source(config, corpus, inputs.target),
        Share(
            replicas=runtime.data_size,
            replica=runtime.data_rank,
            micro_batch_size=learner.micro_batch_size,
            micro_batches_multiple=learner.llm.micro_batches_multiple,
        ),
        steps=config.training.steps,
        device=runtime.device,
        pool_batches=pools,
        updates=updates,
        target=inputs.target,
        passages=config.passages,
    )


def _corpus(
    config: Config, inputs: RunInputs, reads: ReadSteps, purpose: str, more: int = 0
) -> TrainingData:
    """more: number of samples that may be read after those of `reads`."""
    return TrainingData(
        config.data,
        eod_id=inputs.tokenizer.eod_id,
        seed=config.run.seed,
        num_samples=reads.num_samples + more,
        cache_dir=Path(config.run.dir) / INDEX_CACHE,
        purpose=purpose,
        read_at=reads,
        rules=document_rules(config),
        values=inputs.values,
        token_losses=inputs.token_losses,
    )
