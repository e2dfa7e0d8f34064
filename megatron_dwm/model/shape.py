"""The shapes of Llama models: presets, and the shape that a configuration asks for."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from megatron_dwm.config import ModelConfig, UserError
from megatron_dwm.config.validate import Heads

# Megatron-LM's --make-vocab-size-divisible-by. It does not depend on the tensor-parallel size, so
# that a model is the same under every layout.
VOCAB_MULTIPLE = 128


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """A Llama architecture. `vocab_size` counts the tokenizer's pieces, without padding.

    head_dim: width of one attention head; None means hidden_size / num_attention_heads.
    qk_layernorm: RMSNorm over each head of queries and keys (Qwen3).
    add_qkv_bias: a bias on queries, keys and values (Qwen2).
    rope_scaling_factor: Llama 3.1's stretching of the slow rotary frequencies (8 in Llama 3.1, 32
    in Llama 3.2; low_freq_factor 1, high_freq_factor 4, original context 8192); None for none.
    """

    hidden_size: int
    num_layers: int
    num_attention_heads: int
    num_query_groups: int
    ffn_hidden_size: int
    vocab_size: int
    tied_embeddings: bool = False
    rotary_base: float = 10000.0
    norm_epsilon: float = 1e-5
    init_std: float = 0.02
    head_dim: int | None = None
    rope_scaling_factor: float | None = None
    qk_layernorm: bool = False
    add_qkv_bias: bool = False

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: `vocab_size` rounded up to VOCAB_MULTIPLE."""
        return -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    @property
    def layer_matrices(self) -> int:
        """Number of parameters of one layer's matrices."""
        # Queries and the output projection are as wide as all heads, keys and values as all groups.
        heads = self.num_attention_heads + self.num_query_groups
        attention = 2 * self.hidden_size * heads * self.head_size
        return attention + 3 * self.hidden_size * self.ffn_hidden_size

    @property
    def layer_norms(self) -> int:
        """Number of parameters of one layer's norms."""
        return 2 * self.hidden_size + 2 * self.head_size * self.qk_layernorm

    @property
    def layer_biases(self) -> int:
        """Number of parameters of one layer's biases."""
        heads = self.num_attention_heads + 2 * self.num_query_groups
        return heads * self.head_size * self.add_qkv_bias

    def record(self) -> dict[str, Any]:
        """Returns the fields as checkpoints have them, from which `LlamaShape(**fields)` is built.

        A field that earlier versions did not have is left out at its default, so that the record of
        a model that they can build is the one that they wrote.
        """
        later = ("qk_layernorm", "add_qkv_bias")
        return {n: value for n, value in asdict(self).items() if value or n not in later}

    def num_parameters(self) -> int:
        """Number of trainable parameters, without padding."""
        layer = self.layer_matrices + self.layer_norms + self.layer_biases
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tied_embeddings else 2)
        return self.num_layers * layer + embeddings + self.hidden_size


def heads_of(shape: LlamaShape) -> Heads:
    """Returns the sizes that the processes of a layout have to divide."""
    return Heads(
        shape.num_layers,
        shape.hidden_size,
        shape.num_attention_heads,
        shape.num_query_groups,
        shape.padded_vocab_size,
        shape.ffn_hidden_size,
        shape.head_dim,
        shape.qk_layernorm,
        shape.add_qkv_bias,
    )


_QWEN3 = LlamaShape(
    hidden_size=1024,
    num_layers=28,
    num_attention_heads=16,
    num_query_groups=8,
    ffn_hidden_size=3072,
    vocab_size=151936,
    tied_embeddings=True,
    rotary_base=1e6,
    norm_epsilon=1e-6,
    head_dim=128,
    qk_layernorm=True,
)

PRESETS: dict[str, LlamaShape] = {
    # Small enough that a newcomer sees an effect within minutes on a CPU.
    "tiny": LlamaShape(
        hidden_size=64,
        num_layers=2,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=176,
        vocab_size=1024,
        tied_embeddings=True,
    ),
    # The papers' two models (METHOD.md, section 1).
    "llama-370m": LlamaShape(
        hidden_size=1024,
        num_layers=24,
        num_attention_heads=16,
        num_query_groups=16,
        ffn_hidden_size=2816,
        vocab_size=32000,
    ),
    "llama-1.3b": LlamaShape(
        hidden_size=2048,
        num_layers=24,
        num_attention_heads=16,
        num_query_groups=16,
        ffn_hidden_size=5504,
        vocab_size=32000,
    ),
    # Touvron et al. 2023.
    "llama-2-7b": LlamaShape(
        hidden_size=4096,
        num_layers=32,
        num_attention_heads=32,
        num_query_groups=32,
        ffn_hidden_size=11008,
        vocab_size=32000,
    ),
    # Grattafiori et al. 2024, table 3; 3.1 stretches the rotary frequencies for its 128k context.
    "llama-3-70b": LlamaShape(
        hidden_size=8192,
        num_layers=80,
        num_attention_heads=64,
        num_query_groups=8,
        ffn_hidden_size=28672,
        vocab_size=128256,
        rotary_base=500000.0,
    ),
    "llama-3.1-405b": LlamaShape(
        hidden_size=16384,
        num_layers=126,
        num_attention_heads=128,
        num_query_groups=8,
        ffn_hidden_size=53248,
        vocab_size=128256,
        rotary_base=500000.0,
        rope_scaling_factor=8.0,
    ),
    # Yang et al. 2025, table 1, and the published config.json.
    "qwen3-0.6b": replace(_QWEN3, hidden_size=1024, ffn_hidden_size=3072),
    "qwen3-1.7b": replace(_QWEN3, hidden_size=2048, ffn_hidden_size=6144),
}


def resolve_shape(
    config: ModelConfig,
    tokenizer_vocab_size: int | None = None,
    *,
    init_from: LlamaShape | None = None,
) -> LlamaShape:
    """Returns the preset's shape, with the fields that the configuration sets in place of its own.

    The vocabulary is the configuration's, else the tokenizer's, else the preset's. A configuration
    that sets the heads but not the query groups asks for plain attention.

    init_from: shape of the model that `model.init_from` names. The run takes this shape, and the
    preset and fields that the configuration sets have to agree with it.
    Raises `UserError` with the values that differ.

    >>> resolve_shape(ModelConfig(preset="llama-1.3b"), 32000).num_parameters()
    1345423360
    """
    given = _given(config)
    if init_from is not None:
        _require_agreement(config, given, init_from)
        return init_from
    if "num_attention_heads" in given and "num_query_groups" not in given:
        given["num_query_groups"] = given["num_attention_heads"]
    preset = PRESETS[config.preset or "tiny"]
    given["vocab_size"] = config.vocab_size or tokenizer_vocab_size or preset.vocab_size
    return _with_plain_heads(replace(preset, **given))


# Megatron's name of a field, and the name that checkpoints have had for it from the start.
_KEYS = {"head_dim": "kv_channels"}


def model_keys(shape: LlamaShape) -> dict[str, Any]:
    """Returns the shape as keys of the section `model`, without what has no key."""
    known = {field.name for field in fields(ModelConfig)}
    named = {_KEYS.get(name, name): value for name, value in asdict(shape).items()}
    return {name: value for name, value in named.items() if name in known}


def _given(config: ModelConfig) -> dict[str, Any]:
    """Returns the fields of a shape that the configuration sets."""
    names = {field.name: _KEYS.get(field.name, field.name) for field in fields(LlamaShape)}
    values = {name: getattr(config, key, None) for name, key in names.items()}
    return {name: value for name, value in values.items() if value is not None}


def _with_plain_heads(shape: LlamaShape) -> LlamaShape:
    """Returns the shape with an empty `head_dim` if heads have the width that empty stands for."""
    heads = shape.num_attention_heads
    plain = shape.head_dim is not None and shape.head_dim * heads == shape.hidden_size
    return replace(shape, head_dim=None) if plain else shape


def _require_agreement(config: ModelConfig, given: dict[str, Any], found: LlamaShape) -> None:
    """Raise UserError if `found` differs from what the configuration asks for.

    init_std may differ: it only matters for new parameters. A preset's vocabulary may differ, too.
    """
    wanted = dict(given)
    if config.preset is not None:
        preset = asdict(PRESETS[config.preset])
        wanted = {**{k: v for k, v in preset.items() if v is not None}, **given}
        wanted["head_dim"] = replace(PRESETS[config.preset], **given).head_size
        if config.vocab_size is None:
            wanted.pop("vocab_size")
    wanted.pop("init_std", None)
    has = {**asdict(found), "head_dim": found.head_size}
    differences = [
        f"{_KEYS.get(name, name)} {has[name]} where the run asks for {wanted[name]}"
        for name in (field.name for field in fields(LlamaShape))
        if name in wanted and has[name] != wanted[name]
    ]
    if differences:
        raise UserError(
            f"model.init_from: {config.init_from} has {', '.join(differences)} (model.preset and "
            "the keys of model): leave them out or make them equal"
        )
