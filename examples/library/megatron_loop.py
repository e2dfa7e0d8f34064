"""Alignments of samples in a training loop in Megatron-LM's manner.

    torchrun --nproc-per-node 2 examples/library/megatron_loop.py --tensor-model-parallel-size 2

The loop is Megatron-LM's: its groups, its GPTModel, forward_step and loss_func, its schedule and
its optimizer. Of this project it has the lines that are marked. On a machine without a GPU one more
line redirects to the CPU what Megatron-Core asks of CUDA.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_dwm import MegatronProbe  # ours
from megatron_dwm.runtime.cpu import cuda_redirected_to_cpu  # ours, for a machine without a GPU

VOCAB, LENGTH, SAMPLES, MICRO_BATCH = 128, 32, 8, 2
# A sample repeats one token. The target repeats the tokens below 16, as half of the samples do.
SMALL = 16
Batch = dict[str, Tensor]


def get_batch(number: int, *, target: bool = False) -> Batch:
    """Returns this data-parallel rank's samples of global batch `number`."""
    generator = torch.Generator().manual_seed(number)
    token_B1 = torch.randint(SMALL, (SAMPLES, 1), generator=generator)
    if not target:
        token_B1[1::2] += SMALL + torch.randint(VOCAB - 2 * SMALL, (1,), generator=generator)
    text = token_B1.repeat(1, LENGTH + 1)
    noise = torch.randint(VOCAB, text.shape, generator=generator)
    text = torch.where(torch.rand(text.shape, generator=generator) < 0.3, noise, text)
    mine = text[mine_of()]
    return {
        "tokens": mine[:, :-1],
        "labels": mine[:, 1:],
        "repeats": token_B1.expand_as(text)[mine_of()][:, 0],
    }


def mine_of() -> slice:
    """Returns which samples of a global batch this data-parallel rank has."""
    share = SAMPLES // parallel_state.get_data_parallel_world_size()
    first = parallel_state.get_data_parallel_rank() * share
    return slice(first, first + share)


def micro_batches(batch: Batch) -> Iterator[Batch]:
    """Returns the iterator that the schedule takes."""
    starts = range(0, len(batch["tokens"]), MICRO_BATCH)
    return iter([{k: v[start : start + MICRO_BATCH] for k, v in batch.items()} for start in starts])


def loss_func(output: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Returns the sum of the token losses, and their number, as Megatron-LM's own does."""
    loss = output.float().sum()
    return loss, torch.tensor(output.numel(), dtype=torch.int), {"lm loss": loss.detach()}


def forward_step(
    iterator: Iterator[Batch], model: DistributedDataParallel
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
    """As in Megatron-LM's pretrain_gpt.py."""
    batch = next(iterator)
    positions = torch.arange(LENGTH).expand_as(batch["tokens"])
    return model(batch["tokens"], positions, None, labels=batch["labels"]), loss_func


def build_model(tensor: int, pipeline: int) -> list[DistributedDataParallel]:
    """Returns Megatron-Core's GPTModel with its own layers, wrapped as the schedule takes it."""
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        ffn_hidden_size=128,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        pipeline_dtype=torch.float32,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        add_bias_linear=False,
    )
    config.finalize_model_grads_func = finalize_model_grads
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="LayerNorm"),
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="learned_absolute",
    )
    return [DistributedDataParallel(config, DistributedDataParallelConfig(), model)]


def train(steps: int, tensor: int, pipeline: int) -> None:
    """Train, and print the alignments of the last step beside what each sample repeats."""
    model = build_model(tensor, pipeline)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="adam", lr=3e-3, clip_grad=1.0, use_distributed_optimizer=False),
        model,
    )
    count = SAMPLES // parallel_state.get_data_parallel_world_size() // MICRO_BATCH
    schedule = partial(
        get_forward_backward_func(),
        forward_step_func=forward_step,
        model=model,
        num_microbatches=count,
        seq_length=LENGTH,
        micro_batch_size=MICRO_BATCH,
    )
    probe = MegatronProbe(model, optimizer, micro_batch_size=MICRO_BATCH)  # ours
    for step in range(steps):
        batch, target = get_batch(step), get_batch(step, target=True)
        probed = step > 0  # Adam's moments are empty before the first step
        if probed:
            validate = partial(schedule, data_iterator=micro_batches(target), forward_only=False)
            probe.aim(validate)  # ours
        for chunk in model:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        with probe.attached(count) if probed else nullcontext() as alignments:  # ours
            losses = schedule(data_iterator=micro_batches(batch), forward_only=False)
        optimizer.step()
        if losses and step % 10 == 9:
            loss = sum(float(each["lm loss"]) for each in losses) / (count * MICRO_BATCH * LENGTH)
            print(f"step {step + 1} loss {loss:.3f}", flush=True)
    assert alignments is not None, "the last step is probed"
    _report(batch, alignments.values_n)  # ours


def _report(batch: Batch, alignments_n: Tensor) -> None:
    pairs = zip(batch["repeats"].tolist(), alignments_n.tolist(), strict=True)
    dist.barrier()  # or the last pipeline stage would print its loss in the middle of a line
    if dist.get_rank() == 0:
        for token, value in sorted(pairs):
            print(f"repeats token {token:3}: alignment {value:+.2e}")


def main() -> None:
    """Make the groups as Megatron-LM's initialize.py does, and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tensor-model-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-model-parallel-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps: expected 2 or more; the first one is not probed")
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("MASTER_PORT", "29512")
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    on_gpu = torch.cuda.is_available()
    with nullcontext() if on_gpu else cuda_redirected_to_cpu():
        dist.init_process_group("nccl" if on_gpu else "gloo")
        sizes = options.tensor_model_parallel_size, options.pipeline_model_parallel_size
        parallel_state.initialize_model_parallel(*sizes)
        model_parallel_cuda_manual_seed(1)
        torch.manual_seed(1)
        train(options.steps, *sizes)
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
