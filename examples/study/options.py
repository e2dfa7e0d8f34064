"""The options of a run of the study, beside the files of the study's folder."""

from __future__ import annotations

import shlex
from collections.abc import Callable

from examples.study.spec import PACKED, Run

_PACKED = (
    "--data.sequence_length 512 --data.mask_documents true --training.global_batch_size 8 "
    "--training.micro_batch_size 8"
)

Named = Callable[[str], object]
"""from the name of a run to one of its files"""


def options_of(run: Run, *, checkpoint: Named, directory: Named) -> list[str]:
    """Returns the words of a run's options; later ones win.

    checkpoint, directory: what stands for the last checkpoint and the folder of another run.
    """
    size, method = run.size, run.method
    of_target = "--validation.loss_on last_word" if run.target == "last_word" else ""
    start = ""
    if run.start is not None:
        start = f"--model.init_from {checkpoint(run.start)} --model.init_optimizer true"
    lines = (
        "--training.micro_batch_size 32",
        size.options,
        _PACKED if run.corpus == PACKED else "",
        of_target if method.target else "",
        start,
        _filled(run, checkpoint, directory),
        f"--training.steps {run.steps} --training.learning_rate {run.learning_rate}",
    )
    return [word for line in lines for word in shlex.split(line)]


def _filled(run: Run, checkpoint: Named, directory: Named) -> str:
    """Returns a method's options with the files of the runs that they name."""
    found = run.method.options
    for needed in run.method.after:
        name = run.beside(needed)
        found = found.replace(f"{{{needed}.run}}", str(directory(name)))
        if f"{{{needed}}}" in found:
            found = found.replace(f"{{{needed}}}", str(checkpoint(name)))
    return found
