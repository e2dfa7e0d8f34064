"""What the records of a run look like as a whole: none a document, or keys that none has."""

from __future__ import annotations

from megatron_dwm.config.errors import UserError
from megatron_dwm.preprocess.messages import warn
from megatron_dwm.preprocess.settings import PreprocessSettings
from megatron_dwm.preprocess.write.workspace import Workspace

_FIRST_RECORDS = 1000


class RecordChecks:
    """Looks at the first thousand records, and at all of them in the end."""

    def __init__(self, settings: PreprocessSettings, workspace: Workspace) -> None:
        self._settings, self._workspace = settings, workspace
        self._first_are_checked = False

    def first_records(self) -> None:
        """Stop if the first thousand records are all rejected; warn of a key that none has.

        Raises UserError.
        """
        state = self._workspace.state
        if self._first_are_checked or state.records < _FIRST_RECORDS:
            return
        self._first_are_checked = True
        if state.num_rejected == state.records:
            self._workspace.remove()
            raise UserError(
                f"none of the first {state.records} records is a document; the first: "
                f"{state.first_reject}"
            )
        for key in self._metadata_not_seen():
            warn(
                f"--metadata-keys {key}: not in any of the first {state.records} records; "
                "its column stays empty where no record has it"
            )

    def all_records(self) -> None:
        """Refuse to write a dataset of nothing. Raises UserError."""
        state = self._workspace.state
        for key, counts in state.keys.items():
            if counts.tokens == 0 and self._settings.num_shards == 1:
                self._workspace.remove()
                raise UserError(self._why_nothing(key))
        if not self._first_are_checked:  # what was said of the first thousand is not said again
            for key in self._metadata_not_seen():
                warn(f"--metadata-keys {key}: no record has this key; its column is empty")
        for key, kind in zip(self._settings.metadata_keys, state.kinds, strict=True):
            if kind == "mixed":
                warn(
                    f"--metadata-keys {key}: fractions, and whole numbers beyond 2^53, which a "
                    "double would round: its column holds strings"
                )

    def _metadata_not_seen(self) -> list[str]:
        seen = self._workspace.state.metadata_seen
        pairs = zip(self._settings.metadata_keys, seen, strict=True)
        return [key for key, is_seen in pairs if not is_seen]

    def _why_nothing(self, key: str) -> str:
        state, where = self._workspace.state, ", ".join(self._settings.inputs)
        if state.num_rejected == state.records > 0:
            return f"all {state.records} records were rejected; the first: {state.first_reject}"
        return f'{where}: no document with any text under "{key}"; nothing to write'
