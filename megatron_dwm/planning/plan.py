"""A plan: memory, FLOPs, messages and time of a run that has not been started."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_dwm.config import Config, UserError
from megatron_dwm.config.validate import layout_of, validate_config
from megatron_dwm.data.document_counts import WHOLE_ROWS, DocumentCounts, document_counts
from megatron_dwm.model import LlamaShape, resolve_shape
from megatron_dwm.model.on_disk.huggingface_files import is_huggingface, open_huggingface
from megatron_dwm.model.shape import heads_of
from megatron_dwm.planning.cost import Cost, cost_of
from megatron_dwm.planning.hardware import Gpu
from megatron_dwm.planning.memory import Memory, stage_memory
from megatron_dwm.planning.traffic import Traffic, traffic_of
from megatron_dwm.weighting import check_method, method_class
from megatron_dwm.weighting.costs import Workload

# Fraction of a GPU's memory for the CUDA context, buffers of NCCL and cuBLAS, and fragmentation. It
# is a guess that was not measured.
RESERVE = 0.08
# From about this length on, a sample's activations are worth splitting over processes.
_LONG_TOKENS = 8192


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run on `gpus` GPUs needs.

    mfu: fraction of the peak FLOPs that the run reaches.
    documents: what the data says about documents inside samples; None if it is not there yet, and
        samples count as one document each.
    reference: shape of `policy.reference`; None if there is none, or it cannot be read and counts
        as large as the LLM.
    stages: memory of one rank of every pipeline stage.
    bubble: time that the first pipeline stage waits, as a fraction of its work, (p - 1) / (v m); a
        measured utilization includes it.
    """

    config: Config
    shape: LlamaShape
    gpu: Gpu
    gpus: int
    mfu: float
    documents: DocumentCounts | None
    reference: LlamaShape | None
    stages: list[Memory]
    cost: Cost
    traffic: list[Traffic]
    bubble: float

    @property
    def fullest(self) -> int:
        """Number of the stage that needs the most memory."""
        return max(range(len(self.stages)), key=lambda stage: self.stages[stage].update)

    @property
    def needed_bytes(self) -> float:
        """Peak bytes of the fullest rank."""
        return self.stages[self.fullest].update

    @property
    def usable_bytes(self) -> float:
        """Bytes of one GPU's memory that a run may use, after the reserve."""
        return (1.0 - RESERVE) * self.gpu.memory_bytes

    @property
    def fits(self) -> bool:
        """True if the fullest rank fits in usable memory."""
        return self.needed_bytes <= self.usable_bytes

    @property
    def step_s(self) -> float:
        """Mean seconds of a step, weighting updates included."""
        return self.cost.step_s(self.gpu, self.gpus, self.config.model.precision, self.mfu)

    @property
    def tokens_a_step(self) -> int:
        """Tokens in a global batch."""
        return self.config.training.global_batch_size * self.config.data.sequence_length

    @property
    def time_share(self) -> float:
        """Time of weighting as a fraction of the plain run's."""
        return self.cost.time_share(self.gpu, self.config.model.precision)

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as numbers: bytes, FLOPs, seconds and fractions."""
        return {
            "gpu": self.gpu.name,
            "gpus": self.gpus,
            "parameters": self.shape.num_parameters(),
            "fits": self.fits,
            "needed_bytes": self.needed_bytes,
            "usable_bytes": self.usable_bytes,
            "fullest_stage": self.fullest,
            "memory_bytes": [stage.rows() for stage in self.stages],
            "flops": asdict(self.cost),
            "weighting_share_flops": self.cost.share,
            "weighting_share_time": self.time_share,
            "traffic_bytes": [asdict(line) for line in self.traffic],
            "documents": None if self.documents is None else asdict(self.documents),
            "mfu": self.mfu,
            "bubble": self.bubble,
            "step_s": self.step_s,
            "run_s": self.step_s * self.config.training.steps,
            "tokens_per_s_per_gpu": self.tokens_a_step / self.step_s / self.gpus,
            "advice": advice(self),
        }


def make_plan(config: Config, gpu: Gpu, *, gpus: int, mfu: float) -> Plan:
    """Returns the plan of a run on `gpus` GPUs. mfu: fraction of the peak that is reached.

    Of the run's files only the sizes of Hugging Face models and of a weighting model to start from
    are read, and, if documents inside samples matter, the index of the training data.

    Raises UserError if pretrain would refuse the run for a reason other than its files.

    >>> from megatron_dwm.config.load import load_config
    >>> from megatron_dwm.planning import GPUS
    >>> words = ["--model.preset", "llama-1.3b", "--training.micro_batch_size", "4"]
    >>> words += ["--data.train", "my_text_document", "--data.tokenizer", "my.model"]
    >>> plan = make_plan(load_config(words), GPUS["h100-80gb"], gpus=8, mfu=0.4)
    >>> plan.shape.num_layers, plan.fits
    (24, True)
    """
    if config.model.fp8_emulation:
        raise UserError("model.fp8_emulation: a plan is of a GPU's own layers; leave it out")
    shape = _shape(config)
    _require_whole_replicas(config, gpus)
    validate_config(config, heads_of(shape), gpus)
    check_method(config, shape.num_layers, gpus)
    gpu.require(config.model)
    weighting = method_class(config).model_shape(config, shape)
    pipeline = config.parallel.pipeline
    schedule = config.num_microbatches(gpus) * config.parallel.virtual_stages
    documents = _documents(config)
    workload = Workload(
        replicas=config.data_parallel_size(gpus),
        documents=documents or WHOLE_ROWS,
        reference=_reference(config),
    )
    return Plan(
        config=config,
        shape=shape,
        gpu=gpu,
        gpus=gpus,
        mfu=mfu,
        documents=documents,
        reference=workload.reference,
        stages=[
            stage_memory(
                config,
                shape,
                weighting,
                workload.reference,
                world_size=gpus,
                stage=stage,
                on_gpu=True,
            )
            for stage in range(pipeline)
        ],
        cost=cost_of(config, shape, workload),
        traffic=traffic_of(config, shape, weighting, gpus, on_gpu=True),
        bubble=(pipeline - 1) / schedule,
    )


def has_reference(config: Config) -> bool:
    """True if a reference model runs beside the LLM and does not change."""
    is_stored = config.policy.reference_losses is not None  # its losses are read from files
    return "reference" in method_class(config).parts(config) and not is_stored


def _reference(config: Config) -> LlamaShape | None:
    name = config.policy.reference
    if not has_reference(config) or name is None or not is_huggingface(Path(name)):
        return None
    return open_huggingface(Path(name)).shape


def _documents(config: Config) -> DocumentCounts | None:
    try:
        return document_counts(config)
    except UserError:  # a plan comes before the data
        return None


def advice(plan: Plan) -> list[str]:
    """Returns what to change in a run that does not fit, the largest part first; else nothing."""
    if plan.fits:
        return []
    config, worst = plan.config, plan.stages[plan.fullest]
    found: list[tuple[float, str]] = []
    if not config.parallel.sharded_optimizer and config.gradient_ranks(plan.gpus) > 1:
        saved = worst.optimizer + worst.virtual_step
        found.append((saved, "parallel.sharded_optimizer true"))
    if config.model.recompute != "full":
        found.append((worst.activations, "model.recompute full, or a smaller micro-batch"))
    if not config.parallel.sequence and config.parallel.tensor > 1:
        found.append((worst.activations / 2, "parallel.sequence true"))
    if worst.weighting_activations + worst.always >= worst.update:
        found.append(
            (
                worst.weighting_activations,
                "weighting.encoder llm, a smaller weighting model, or a smaller micro-batch, which "
                "its encoder goes by",
            )
        )
    if config.data.sequence_length >= _LONG_TOKENS:
        found.append((worst.activations / 2, "larger parallel.context"))
    found.append((worst.weights + worst.gradients, "larger parallel.tensor or parallel.pipeline"))
    return [what for _, what in sorted(found, key=lambda pair: -pair[0])]


def _require_whole_replicas(config: Config, gpus: int) -> None:
    """Raise UserError by the rule of config/validate.py, in the words of this command."""
    parallel = config.parallel
    if parallel.model_size > 0 and gpus % parallel.model_size:
        raise UserError(
            f"{layout_of(parallel)}: expected to divide --gpus, which is {gpus}; give a multiple "
            f"of {parallel.model_size}"
        )


def _shape(config: Config) -> LlamaShape:
    """Returns the shape of the run's model.

    The tokenizer need not exist yet: without `model.vocab_size` the vocabulary is the preset's.
    """
    start = config.model.init_from
    if start is None:
        return resolve_shape(config.model)
    if not is_huggingface(Path(start)):
        raise UserError(
            f"model.init_from: {start} is no Hugging Face model; a plan reads no checkpoints, so "
            "leave it out and give the model's sizes"
        )
    return resolve_shape(config.model, init_from=open_huggingface(Path(start)).shape)
