"""Megatron-LM's flags of training, and the key that each has here.

A command with one of them is refused in a line that names the key; docs/megatron.md has the table.
"""

from __future__ import annotations

_LLAMA = "every model here is a Llama, a Mistral or a Qwen; leave it out"
_NO_DROPOUT = "there is no dropout here; leave it out"
_ALWAYS = "it is always so here; leave it out"
_CHOSEN = "kernels follow from the machine and model.precision; leave it out"
_NOT_BUILT = "it is not supported here; leave it out"
_FORMAT = "checkpoints have one format, and every rank writes its part; leave it out"
_BY_SIGNAL = "let the scheduler send a signal (docs/robustness.md)"
_COSINE = "the learning rate always falls as a cosine; leave it out"

COUNTERPARTS: dict[str, str] = {
    "tensor-model-parallel-size": "parallel.tensor",
    "pipeline-model-parallel-size": "parallel.pipeline",
    "context-parallel-size": "parallel.context",
    "num-virtual-stages-per-pipeline-rank": "parallel.virtual_stages",
    "num-layers-per-virtual-pipeline-stage": "parallel.virtual_stages, the number of chunks on a "
    "stage",
    "sequence-parallel": "parallel.sequence true",
    "use-distributed-optimizer": "parallel.sharded_optimizer true",
    "overlap-grad-reduce": "parallel.overlap_grad_reduce true",
    "overlap-param-gather": "parallel.overlap_param_gather true",
    "ddp-bucket-size": "parallel.ddp_bucket_size",
    "grad-reduce-in-bf16": "parallel.grad_reduce_in_fp32 false",
    "tp-comm-overlap": "parallel.tp_comm_overlap true",
    "distributed-timeout-minutes": "parallel.timeout_s, in seconds",
    "micro-batch-size": "training.micro_batch_size",
    "global-batch-size": "training.global_batch_size",
    "seq-length": "data.sequence_length",
    "max-position-embeddings": "data.sequence_length",
    "train-iters": "training.steps",
    "train-samples": "training.steps, the samples divided by training.global_batch_size",
    "lr": "training.learning_rate",
    "min-lr": "training.min_learning_rate_fraction, as a fraction of the peak",
    "lr-warmup-fraction": "training.warmup_fraction",
    "lr-warmup-iters": "training.warmup_fraction, as a fraction of training.steps",
    "weight-decay": "training.weight_decay",
    "clip-grad": "training.clip_grad",
    "adam-beta1": "training.adam_beta1",
    "adam-beta2": "training.adam_beta2",
    "adam-eps": "training.adam_epsilon",
    "seed": "run.seed",
    "save": "run.dir",
    "load": "run.dir with run.resume true; to begin with another model, model.init_from",
    "finetune": "model.init_from",
    "save-interval": "training.checkpoint_interval_steps",
    "async-save": "training.checkpoint_async true",
    "data-path": "data.train",
    "tokenizer-model": "data.tokenizer",
    "tokenizer-type": "data.tokenizer, whose ending says it",
    "valid-data-path": "evaluation.path, a JSON Lines file",
    "eval-interval": "evaluation.interval_steps",
    "num-layers": "model.num_layers",
    "hidden-size": "model.hidden_size",
    "ffn-hidden-size": "model.ffn_hidden_size",
    "num-attention-heads": "model.num_attention_heads",
    "group-query-attention": "model.num_query_groups",
    "num-query-groups": "model.num_query_groups",
    "kv-channels": "model.kv_channels",
    "qk-layernorm": "model.qk_layernorm true",
    "add-qkv-bias": "model.add_qkv_bias true",
    "vocab-size": "model.vocab_size",
    "rotary-base": "model.rotary_base",
    "norm-epsilon": "model.norm_epsilon",
    "init-method-std": "model.init_std",
    "untie-embeddings-and-output-weights": "model.tied_embeddings false",
    "bf16": "model.precision bf16",
    "fp8-format": "model.precision fp8, with model.fp8_recipe delayed for Megatron-LM's default",
    "fp8-recipe": "model.fp8_recipe",
    "first-last-layers-bf16": "model.fp8_first_last_bf16 true",
    "recompute-granularity": "model.recompute selective, or full",
    "recompute-activations": "model.recompute selective",
    "cross-entropy-loss-fusion": "model.cross_entropy_loss_fusion true",
    "no-rope-fusion": "model.apply_rope_fusion false",
    "reset-attention-mask": "data.mask_documents true",
    "eod-mask-loss": "data.border_loss false",
    "log-interval": "training.log_interval_steps",
    "tensorboard-dir": "logging.tensorboard true, in run.dir/tensorboard",
    "wandb-project": "logging.wandb_project",
    "wandb-exp-name": "logging.wandb_exp_name",
    "wandb-entity": "logging.wandb_entity",
    "profile": "profiling.tool",
    "use-pytorch-profiler": "profiling.tool torch",
    "profile-step-start": "profiling.first_step",
    "profile-step-end": "profiling.last_step",
    "profile-ranks": "profiling.ranks",
    "data-cache-path": "data.cache_dir",
    "train-data-path": "data.train",
    "accumulate-allreduce-grads-in-fp32": "parallel.grad_reduce_in_fp32 true, the default",
    "lr-warmup-samples": "training.warmup_fraction, as a fraction of training.steps",
    "save-retain-interval": "training.keep_every",
    "pretrained-checkpoint": "model.init_from",
    "no-load-optim": "model.init_from, which takes parameters alone",
    "no-load-rng": "model.init_from, which takes parameters alone",
}
"""a flag without its dashes, and the key in its place"""

WITHOUT: dict[str, str] = {
    "rampup-batch-size": "the global batch has one size in a run",
    "lr-decay-style": "the learning rate always falls as a cosine "
    "(training.min_learning_rate_fraction 1 keeps it constant); leave it out",
    "lr-decay-iters": "the cosine ends at the last step; leave it out",
    "split": "held-out text is a file of its own, evaluation.path",
    "eval-iters": "evaluation.path is read whole; leave it out",
    "fp16": "use model.precision bf16",
    "recompute-method": "model.recompute full recomputes every layer; leave it out",
    "recompute-num-layers": "model.recompute full recomputes every layer; leave it out",
    "transformer-impl": "the layers follow from the machine and model.precision; leave it out",
    "make-vocab-size-divisible-by": "the vocabulary is padded to a multiple of 128; leave it out",
    "exit-signal-handler": "a run always saves at SIGTERM, SIGUSR1 and SIGUSR2; leave it out",
    "reset-position-ids": "rotary positions enter by their distance only; data.mask_documents true "
    "is enough",
    "swiglu": _LLAMA,
    "normalization": _LLAMA,
    "disable-bias-linear": _LLAMA,
    "position-embedding-type": _LLAMA,
    "use-rotary-position-embeddings": _LLAMA,
    "attention-dropout": _NO_DROPOUT,
    "hidden-dropout": _NO_DROPOUT,
    "use-mcore-models": _ALWAYS,
    "no-create-attention-mask-in-dataloader": _ALWAYS,
    "check-for-nan-in-loss-and-grad": _ALWAYS,
    "no-check-for-nan-in-loss-and-grad": "a step that is not finite is skipped; leave it out",
    "log-throughput": _ALWAYS,
    "attention-backend": _CHOSEN,
    "use-flash-attn": _CHOSEN,
    "no-masked-softmax-fusion": _CHOSEN,
    "no-bias-swiglu-fusion": _CHOSEN,
    "no-gradient-accumulation-fusion": _CHOSEN,
    "ckpt-format": _FORMAT,
    "use-dist-ckpt": _FORMAT,
    "ckpt-fully-parallel-save": _FORMAT,
    "use-checkpoint-args": "model.init_from takes the shape of its checkpoint; leave it out",
    "override-opt_param-scheduler": "the rate always follows the keys of now; leave it out",
    "override-opt-param-scheduler": "the rate always follows the keys of now; leave it out",
    "exit-on-missing-checkpoint": "the first lines of a run say from where it starts; leave it out",
    "exit-duration-in-mins": _BY_SIGNAL,
    "exit-interval": _BY_SIGNAL,
    "lr-decay-samples": _COSINE,
    "lr-wsd-decay-style": _COSINE,
    "lr-wsd-decay-iters": _COSINE,
    "lr-wsd-decay-samples": _COSINE,
    "decoupled-lr": "all parameters have one rate; leave it out",
    "calculate-per-token-loss": "a step's loss weighs every sample, or unit, by its weight "
    "(docs/METHOD.md); leave it out",
    "num-workers": "samples are read from mapped files, without workers; leave it out",
    "no-mmap-bin-files": "files are always mapped; leave it out",
    "mock-data": "bash examples/quickstart.sh makes data of the text that is shipped",
    "vocab-file": "data.tokenizer takes SentencePiece or a tokenizer.json",
    "merge-file": "data.tokenizer takes SentencePiece or a tokenizer.json",
    "fp8-amax-history-len": "Transformer Engine's default is used; leave it out",
    "fp8-amax-compute-algo": "Transformer Engine's default is used; leave it out",
    "fp8-margin": "Transformer Engine's default is used; leave it out",
    "fp8-param-gather": _NOT_BUILT,
    "use-precision-aware-optimizer": _NOT_BUILT,
    "use-megatron-fsdp": _NOT_BUILT,
    "use-torch-fsdp2": _NOT_BUILT,
    "decoder-first-pipeline-num-layers": "stages have equal numbers of layers; leave it out",
    "decoder-last-pipeline-num-layers": "stages have equal numbers of layers; leave it out",
    "cp-comm-type": "Transformer Engine's own way, or one gather (docs/context.md); leave it out",
    "manual-gc": _NOT_BUILT,
    "empty-unused-memory-level": _NOT_BUILT,
    "log-timers-to-tensorboard": "profiling.tool measures the phases of a step",
}
"""a flag without its dashes that has no key, and what to do"""


def megatron_flag(name: str) -> str | None:
    """Returns the message about an option that is a flag of Megatron-LM's; None if it is none."""
    key, words = COUNTERPARTS.get(name), WITHOUT.get(name)
    if key is None and words is None:
        return None
    here = f"here it is {key}" if key is not None else words
    return f"--{name} is a flag of Megatron-LM's: {here} (docs/megatron.md)"
