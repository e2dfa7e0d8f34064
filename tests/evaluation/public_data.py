"""Made-up rows in the form of the public data sets, for the suite without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROWS = 6


def _multiple_choice(i: int) -> dict[str, Any]:
    return {
        "question": f"What is {i} and one?",
        "question_stem": f"One more than {i} is",
        "choices": {"text": [f"{i}", f"{i + 1}", "seven", "none"], "label": ["A", "B", "C", "D"]},
        "answerKey": "B",
    }


_ROWS: dict[str, Any] = {
    "sciq": lambda i: {
        "support": f"Iron number {i} rusts.",
        "question": "What rusts?",
        "distractor1": "gold",
        "distractor2": "glass",
        "distractor3": "air",
        "correct_answer": "iron",
    },
    "arc_easy": _multiple_choice,
    "arc_challenge": _multiple_choice,
    "logiqa": lambda i: {
        "context": f"All {i} boats are red.",
        "question": "What follows?",
        "options": ["boats are red", "cars are red", "nothing", "boats sink"],
        "label": "a",
    },
    "boolq": lambda i: {"passage": f"Year {i} was wet.", "question": "was it wet", "label": i % 2},
    "hellaswag": lambda i: {
        "activity_label": "Cooking",
        "ctx_a": f"Cook {i} heats oil.",
        "ctx_b": "then she",
        "endings": ["fries an egg.", "flies away.", "is a fish.", "sleeps."],
        "label": "0",
    },
    "piqa": lambda i: {"goal": f"Open jar {i}", "sol1": "twist", "sol2": "sing", "label": 0},
    "winogrande": lambda i: {
        "sentence": f"The cup {i} did not fit the box because the _ was large.",
        "option1": "cup",
        "option2": "box",
        "answer": "1",
    },
    "openbookqa": _multiple_choice,
    "lambada_openai": lambda i: {"text": f"They counted {i} sheep and then one more sheep"},
}
_SPLITS = {
    "lambada_openai": ("test",),
    "boolq": ("train", "validation"),
    "hellaswag": ("train", "validation"),
    "piqa": ("train", "validation"),
    "winogrande": ("train", "validation"),
}


def write_public_data(directory: Path) -> None:
    """Write DIR/TASK/SPLIT.jsonl for every task of the suite and every split that it reads."""
    for task, row in _ROWS.items():
        (directory / task).mkdir(parents=True)
        for split in _SPLITS.get(task, ("train", "test")):
            lines = [json.dumps(row(i)) + "\n" for i in range(ROWS)]
            (directory / task / f"{split}.jsonl").write_text("".join(lines))
