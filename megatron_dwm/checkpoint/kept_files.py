"""Small files that every checkpoint contains, so that it can be used on its own.

    tokenizer/    the run's tokenizer: tokenizer.model, or tokenizer.json and its
                  tokenizer_config.json; around_text.json, if the documents of the training data
                  have the special tokens that tokenizer.json puts around a text
    huggingface/  files of the model that the run started from, without its weights: config.json,
                  generation_config.json, the tokenizer's files, chat templates, license

They are read once, when the run starts, so later changes do not reach a checkpoint. Cost: their
size, in the main process and in every checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from megatron_dwm.config import Config, UserError
from megatron_dwm.model.on_disk.huggingface_files import is_huggingface
from megatron_dwm.tokenizer import Tokenizer, open_tokenizer

TOKENIZER = "tokenizer"
HUGGINGFACE = "huggingface"

_TOKENIZER_JSON = "tokenizer.json"
_TOKENIZER_MODEL = "tokenizer.model"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_AROUND = "around_text.json"
TOKENIZER_FILES = (
    *(_TOKENIZER_JSON, _TOKENIZER_MODEL, _TOKENIZER_CONFIG),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
)
SETTINGS_FILES = ("config.json", "generation_config.json")
_OTHER_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*")


def kept_files(config: Config, tokenizer: Tokenizer, newest: Path | None) -> dict[str, bytes]:
    """Returns the files that every checkpoint of a run contains, by path inside a checkpoint.

    newest: the checkpoint that the run resumes from; its files of the first model are copied.
    """
    first = _of_the_first_model(config, newest)
    return {
        **{f"{TOKENIZER}/{name}": content for name, content in _of_tokenizer(tokenizer).items()},
        **{f"{HUGGINGFACE}/{name}": content for name, content in first.items()},
    }


def huggingface_files(directory: Path) -> dict[str, bytes]:
    """Returns the files of a Hugging Face directory except weights and README, by name."""
    patterns = (*SETTINGS_FILES, *TOKENIZER_FILES, *_OTHER_FILES)
    paths = sorted({path for pattern in patterns for path in directory.glob(pattern)})
    return {path.relative_to(directory).as_posix(): _read(path) for path in paths if path.is_file()}


def own_tokenizer(directory: Path) -> Path | None:
    """Returns the main file of a tokenizer in `directory`, or None."""
    files = (directory / name for name in (_TOKENIZER_JSON, _TOKENIZER_MODEL))
    return next((file for file in files if file.is_file()), None)


def open_own_tokenizer(file: Path) -> Tokenizer:
    """Open what `own_tokenizer` returned, with the special tokens that training had around a text.

    Raises UserError as `open_tokenizer` does.
    """
    return open_tokenizer(file, include_special_tokens=file.with_name(_AROUND).is_file())


def had_special_tokens(checkpoint: Path) -> bool | None:
    """Returns whether training had special tokens around a text; None without its tokenizer."""
    file = own_tokenizer(checkpoint / TOKENIZER)
    return None if file is None else file.with_name(_AROUND).is_file()


def write_files(files: Mapping[str, bytes], directory: Path) -> None:
    """Write files by their paths inside `directory`. Raises OSError."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def _of_tokenizer(tokenizer: Tokenizer) -> dict[str, bytes]:
    if tokenizer.kind != "HuggingFaceTokenizer":
        return {_TOKENIZER_MODEL: tokenizer.file}
    files = {_TOKENIZER_JSON: tokenizer.file}
    around = dataclasses.asdict(tokenizer.around)
    if any(around.values()):
        files[_AROUND] = json.dumps(around).encode()
    config = tokenizer.model_path.with_name(_TOKENIZER_CONFIG)
    if config.is_file():
        files[_TOKENIZER_CONFIG] = _read(config)
    return files


def _of_the_first_model(config: Config, newest: Path | None) -> dict[str, bytes]:
    """Returns the files of the first Hugging Face model, which every run from it passes on."""
    start = config.model.init_from
    if start is None:
        return {}
    if newest is not None and (newest / HUGGINGFACE).is_dir():
        return huggingface_files(newest / HUGGINGFACE)
    directory = Path(start)
    return huggingface_files(directory if is_huggingface(directory) else directory / HUGGINGFACE)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
