"""The passages of held-out text: those of `evaluation.path`, then of every named set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_dwm.config.errors import UserError
from megatron_dwm.config.schema import DataConfig, EvaluationConfig
from megatron_dwm.data.passages import Passage, read_passages


def held_out_passages(
    evaluation: EvaluationConfig, data: DataConfig
) -> Iterator[tuple[str, Passage]]:
    """Yields (domain, passage) of every line, in the order of the files.

    A line of a named set has the set's name as its domain, or NAME/DOMAIN. Lines of
    `evaluation.path` have their own.

    Raises:
        UserError: a file is missing, empty or broken, or a line of `evaluation.path` has no domain
            (with its number).
    """
    keys, sources = (data.domain_key,), dict[str, str]()
    if evaluation.path is not None:
        for passage in read_passages(evaluation.path, "evaluation.path", keys):
            if passage.domain is None:
                raise UserError(
                    f"{evaluation.path} line {passage.line} has no {data.domain_key} "
                    "(data.domain_key): held-out text needs a domain in every line, or a name "
                    "(evaluation.sets NAME=FILE)"
                )
            sources[passage.domain] = "evaluation.path"
            yield passage.domain, passage
    for name, path in evaluation.sets.items():
        key = f"evaluation.sets {name}"
        for passage in read_passages(path, key, keys):
            domain = name if passage.domain is None else f"{name}/{passage.domain}"
            if sources.setdefault(domain, key) != key:
                raise UserError(
                    f"{key}: {sources[domain]} has domain {domain}, too; give the set another name"
                )
            yield domain, replace(passage, domain=domain)
