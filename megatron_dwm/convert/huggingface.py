"""What we ask of transformers: write a Llama model, run it, load its tokenizer.

The only file of the package that imports transformers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_dwm.config import UserError
from megatron_dwm.model import LlamaShape

try:
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        LlamaConfig,
        LlamaForCausalLM,
    )
    from transformers.utils.logging import disable_progress_bar
except ImportError as error:
    raise UserError(
        f"converting needs the extra `eval` ({error}): pip install -e '.[eval]'"
    ) from error


def llama_config(shape: LlamaShape, *, sequence_length: int, eod_id: int) -> LlamaConfig:
    """transformers' configuration of a model of this shape.

    The end-of-document token is also the beginning of sequence (see tokenizer_files.py).
    """
    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        head_dim=shape.head_size,
        max_position_embeddings=sequence_length,
        rms_norm_eps=shape.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rotary_base},
        tie_word_embeddings=shape.tied_embeddings,
        initializer_range=shape.init_std,
        bos_token_id=eod_id,
        eos_token_id=eod_id,
        attention_bias=False,
        mlp_bias=False,
    )


def write_model(
    config: LlamaConfig,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    directory: Path,
    *,
    max_shard_size: str = "5GB",
) -> None:
    """Write config.json, generation_config.json and model*.safetensors into `directory`.

    `tensors` are all of `LlamaForCausalLM`'s parameters; a missing, unknown or wrongly shaped one
    raises `RuntimeError`. Holds the whole model once, in `dtype`.
    """
    config.dtype = dtype
    _hide_bars_without_terminal()
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(dtype)
    model.load_state_dict(
        {name: tensor.to(dtype) for name, tensor in tensors}, strict=True, assign=True
    )
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id
    )
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    _spell_for_older_readers(directory / "config.json", config, dtype)
    for path in directory.glob("*.safetensors"):  # written readable by their owner alone
        path.chmod((directory / "config.json").stat().st_mode)


def _hide_bars_without_terminal() -> None:
    if not sys.stderr.isatty():
        disable_progress_bar()


def _spell_for_older_readers(path: Path, config: LlamaConfig, dtype: torch.dtype) -> None:
    """transformers before version 5 knows these two by other names, and has defaults for them."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["rope_theta"] = config.rope_parameters["rope_theta"]
    content["torch_dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def huggingface_logits(directory: Path, tokens_BS: Tensor) -> Tensor:
    """float32 logits [B, S, V] of the model in `directory`, computed on the CPU in float32."""
    _hide_bars_without_terminal()
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, local_files_only=True
    )
    return model.eval()(input_ids=tokens_BS, use_cache=False).logits


def encode_with_huggingface(directory: Path, texts: Sequence[str]) -> list[list[int]]:
    """Ids of each text by the tokenizer in `directory`, loaded as any user would."""
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    return tokenizer(list(texts), verbose=False)["input_ids"] if texts else []
