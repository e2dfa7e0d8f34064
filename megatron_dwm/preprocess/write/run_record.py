"""What a run was made from: another run compares it to decide if it may resume.

`P.preprocess.json` stays beside the finished output: inputs with size and time of change, options,
tokenizer, and what became of the records.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_dwm.config.errors import UserError
from megatron_dwm.preprocess.messages import warn
from megatron_dwm.preprocess.read.inputs import Input, digest_of_inputs
from megatron_dwm.preprocess.settings import PreprocessSettings
from megatron_dwm.tokenizer import SpecialTokens, Tokenizer

_FORMAT = 1
_END = "end-of-document id"
_ALL_INPUTS = "--num-shards: the list of all shards' inputs (sha256)"
_SPECIAL_TOKENS = "--tokenizer-hf-include-special-tokens (ids)"


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Fingerprint of a run: the same record means the same output."""

    inputs: list[dict[str, Any]]
    options: dict[str, Any]
    """all options that shape the output: not the workers, nor --on-bad-record"""
    format: int = _FORMAT

    @staticmethod
    def of(
        settings: PreprocessSettings,
        inputs: Sequence[Input],
        everything: Sequence[Input],
        tokenizer: Tokenizer,
    ) -> RunRecord:
        """Build the record of the run that `settings` ask for.

        inputs: of this shard; everything: those of all shards.
        """
        return RunRecord(
            inputs=[asdict(entry) for entry in inputs],
            options={
                "--tokenizer-type": tokenizer.kind,
                "--tokenizer-model (sha256)": tokenizer.sha256,
                "--json-keys": list(settings.json_keys),
                "--metadata-keys": list(settings.metadata_keys),
                "--append-eod": settings.append_eod,
                _END: tokenizer.eod_id,
                _SPECIAL_TOKENS: _spell_ids(tokenizer.around),
                "--pretokenized": settings.pretokenized,
                "--max-record-bytes": settings.max_record_bytes,
                "--shard": settings.shard,
                "--num-shards": settings.num_shards,
                **({_ALL_INPUTS: digest_of_inputs(everything)} if settings.num_shards > 1 else {}),
            },
        )

    @staticmethod
    def read(path: Path) -> RunRecord:
        """Read the record in `path`; `UserError` if it is none."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return RunRecord(
                inputs=content["inputs"], options=content["options"], format=content["format"]
            )
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: not the record of a preprocessing run; remove it") from None

    @property
    def lacks_end(self) -> bool:
        """True if neither the record nor the tokenizer's file says which id ends a document."""
        return (
            _END not in self.options and self.options["--tokenizer-type"] == "HuggingFaceTokenizer"
        )

    def _known_options(self, now: RunRecord) -> dict[str, Any]:
        """The options, completed by what older versions did not record."""
        older = {_END: now.options[_END], _SPECIAL_TOKENS: _spell_ids(SpecialTokens())}
        older |= {name: now.options[name] for name in (_ALL_INPUTS,) if name in now.options}
        return {**older, **self.options}

    def difference(self, now: RunRecord) -> str | None:
        """Say why `now` is another run than this one; None if it is the same."""
        if self.format != now.format:
            return "it was written by another version of this program"
        for name, before in self._known_options(now).items():
            if before != now.options.get(name):
                return f"{name} was {_spell(before)} and is {_spell(now.options.get(name))}"
        names_before, names_now = ([entry["name"] for entry in r.inputs] for r in (self, now))
        if names_before != names_now:
            return f"the inputs were {_list(names_before)} and are {_list(names_now)}"
        for before, after in zip(self.inputs, now.inputs, strict=True):
            if before != after:
                return f"{before['name']} has changed ({_change(before, after)})"
        return None


def difference_to(path: Path, now: RunRecord) -> str | None:
    """Say why `now` is another run than the one recorded in `path`; None if it is the same.

    Raises `UserError` if `path` holds no record.
    """
    before = RunRecord.read(path)
    why = before.difference(now)
    if why is None and before.lacks_end:
        warn(
            f"{path}: does not say which id ends a document (it was written by an older version); "
            f"taken to be {now.options[_END]}, as the tokenizer has it now"
        )
    return why


def _spell(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) or "empty" if isinstance(value, list) else str(value)


def _spell_ids(tokens: SpecialTokens) -> str:
    return f"{list(tokens.before)} before, {list(tokens.after)} after"


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _change(before: dict[str, Any], after: dict[str, Any]) -> str:
    if before["size_bytes"] != after["size_bytes"]:
        return f"{before['size_bytes']} bytes before, {after['size_bytes']} now"
    return "same size, another time of change"
