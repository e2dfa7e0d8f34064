"""Names of this package's commands, as a message should give them.

A clone has a file in tools/ for each; an installed package has a command on PATH. Training and the
doctor are `python -m megatron_dwm.pretrain` and `python -m megatron_dwm.doctor` in both.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parent.parent
TOOLS = {
    "preprocess": "preprocess_data",
    "merge": "merge_datasets",
    "tokenizer": "train_tokenizer",
    "select": "select_data",
    "score": "score_data",
    "convert": "convert_checkpoint",
    "generate": "generate",
    "evaluate": "evaluate",
    "plan": "plan",
    "report": "report",
    "documents": "top_documents",
    "status": "run_status",
}
"""the file in tools/ of each installed command, without `megatron-dwm-` and `.py`"""


def name_of_command(name: str) -> str:
    """Returns what a user types to start a command: its file in a clone, else the installed name.

    name: the installed command without `megatron-dwm-`, such as "plan".

    Raises:
        KeyError: there is no such command.
    """
    file = f"tools/{TOOLS[name]}.py"
    if (_PACKAGE.parent / file).is_file():
        return f"python {file}"
    return f"megatron-dwm-{name}"
