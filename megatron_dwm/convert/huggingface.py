"""Everything that needs transformers: configuration, logits, tokenizer and samples of a model.

No other file of the package imports transformers. Nothing is downloaded, and code in a model
directory is never run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from megatron_dwm.config import UserError
from megatron_dwm.config.architectures import architecture_with
from megatron_dwm.model import LlamaShape
from megatron_dwm.model.on_disk.huggingface_files import HuggingFaceModel

try:
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
    )
    from transformers.utils.logging import disable_progress_bar
except ImportError as error:
    raise UserError(
        f"converting needs the extra `eval` ({error}): pip install -e '.[eval]'"
    ) from error

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_config(
    shape: LlamaShape,
    *,
    context_tokens: int,
    special_tokens: dict[str, Any],
    dtype: torch.dtype,
    directory: Path,
) -> None:
    """Write config.json and generation_config.json for a model of this shape.

    special_tokens: ids, by the names in `SPECIAL_TOKENS`.
    """
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": shape.rotary_base}
    if shape.rope_scaling_factor is not None:
        rope |= {"rope_type": "llama3", "factor": shape.rope_scaling_factor}
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
        rope |= {"original_max_position_embeddings": 8192}
    architecture = architecture_with(
        qk_layernorm=shape.qk_layernorm, add_qkv_bias=shape.add_qkv_bias
    )
    config = AutoConfig.for_model(
        architecture.model_type,
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        head_dim=shape.head_size,
        max_position_embeddings=context_tokens,
        rms_norm_eps=shape.norm_epsilon,
        rope_parameters=rope,
        tie_word_embeddings=shape.tied_embeddings,
        initializer_range=shape.init_std,
        architectures=[architecture.class_name],
        **{"bos_token_id": None, "eos_token_id": None, **special_tokens},
    )
    config.dtype = dtype
    config.save_pretrained(directory)
    GenerationConfig(**special_tokens).save_pretrained(directory)
    _add_older_spellings(directory / "config.json", rope, dtype)


def _add_older_spellings(path: Path, rope: dict[str, Any], dtype: torch.dtype) -> None:
    """Add the names that transformers before version 5 reads, which else takes its defaults."""
    content = json.loads(path.read_text(encoding="utf-8"))
    content["rope_theta"] = rope["rope_theta"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    content["rope_scaling"] = scaling if rope["rope_type"] != "default" else None
    content["torch_dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def huggingface_logits(source: HuggingFaceModel, tokens_BS: Tensor) -> Tensor:
    """Returns float32 logits [B, S, V] of transformers' own model, computed on the CPU.

    The model is built without memory. Each layer's parameters are read just before the layer runs
    and dropped afterwards.
    """
    config = AutoConfig.from_pretrained(source.directory, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    # The rotary frequencies are not parameters, and the files do not have them.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for prefix, part in _parts(model):
        part.register_forward_pre_hook(_loader(source, prefix))
        part.register_forward_hook(_drop)
    return model(input_ids=tokens_BS, use_cache=False).logits


def _parts(model: Any) -> Iterator[tuple[str, Module]]:
    """Yields the parts that are in memory one at a time: layers, and what is outside them."""
    yield "model.embed_tokens.", model.model.embed_tokens
    for number, layer in enumerate(model.model.layers):
        yield f"model.layers.{number}.", layer
    yield "model.norm.", model.model.norm
    tied = model.config.tie_word_embeddings
    yield ("model.embed_tokens." if tied else "lm_head."), model.lm_head


def _loader(source: HuggingFaceModel, prefix: str) -> Callable[[Module, Any], None]:
    def load(part: Module, _: Any) -> None:
        tensors = {name: source.read(prefix + name).float() for name, _ in part.named_parameters()}
        part.load_state_dict(tensors, strict=True, assign=True)

    return load


def _drop(part: Module, *_: Any) -> None:
    part.to("meta")


def encode_with_huggingface(directory: Path, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of each text by the tokenizer in `directory`, loaded as users load it.

    Raises `UserError` if there is no tokenizer that transformers can read.
    """
    tokenizer = _load_tokenizer(directory)
    return tokenizer(list(texts), verbose=False)["input_ids"] if texts else []


def _load_tokenizer(directory: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers raises many kinds for a missing or broken file
        reason = _first_line(error)
        raise UserError(f"{directory}: transformers cannot read its tokenizer: {reason}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _load_model(directory: Path) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(directory, local_files_only=True).eval()
    except Exception as error:  # transformers raises many kinds for missing or broken files
        reason = _first_line(error)
        raise UserError(f"{directory}: transformers cannot read the model: {reason}") from error


def _begin(tokenizer: Any, directory: Path) -> list[int]:
    """Returns the id with which a document begins."""
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return [token]
    raise UserError(
        f"{directory}: its tokenizer has no token for the beginning or the end of a document, so "
        "a prompt cannot be empty"
    )


def hide_bars_without_terminal() -> None:
    """Keep transformers' progress bars out of log files."""
    if not sys.stderr.isatty():
        disable_progress_bar()


@torch.no_grad()
def generate_text(
    directory: Path,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> list[str]:
    """Returns each prompt with its continuation; temperature 0 always takes the most likely token.

    Prompts are encoded by the model's tokenizer; an empty prompt is the start of a document: its
    beginning-of-text token, or, without one, the token that ends the document before. A sample does
    not depend on the other prompts. A line on stderr names each prompt that does not fit in the
    model's context. Raises `UserError` for a model or tokenizer that transformers cannot read.
    """
    hide_bars_without_terminal()
    tokenizer = _load_tokenizer(directory)
    model = _load_model(directory)
    # Only these options count: not a repetition penalty or another rule of the model's own file.
    ends = model.generation_config.eos_token_id
    model.generation_config = GenerationConfig(eos_token_id=ends)
    choice = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    options = choice if temperature > 0 else {"do_sample": False}
    padding = tokenizer.pad_token_id
    padding = tokenizer.eos_token_id if padding is None else padding
    texts = []
    for number, prompt in enumerate(prompts, start=1):
        torch.manual_seed(seed)
        start = tokenizer(prompt, verbose=False)["input_ids"] or _begin(tokenizer, directory)
        _warn_if_too_long(number, len(start), max_new_tokens, model.config.max_position_embeddings)
        ids = torch.tensor([start], device=model.device)
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=padding,
            **options,
        )
        texts.append(tokenizer.decode(found[0], skip_special_tokens=True))
    return texts


def _warn_if_too_long(number: int, tokens: int, new_tokens: int, context: int) -> None:
    if tokens > context:
        what = f"has {tokens} tokens"
    elif tokens + new_tokens > context:
        what = f"has {tokens} tokens, and {new_tokens} more are requested"
    else:
        return
    print(
        f"warning: prompt {number} {what}; the model's context is {context} tokens, and it was not "
        "trained beyond that",
        file=sys.stderr,
    )
