"""One contestant of the preprocessing benchmark in a process of its own (see preprocess.py).

Prints seconds of work, tokens made, and peak memory (with its worker processes') as JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

_KIND = "SentencePieceTokenizer"


def ours(file: Path, model: Path, output: Path, workers: int) -> int:
    """Do the work of `preprocess_data.py`."""
    from megatron_dwm.preprocess.pipeline import preprocess
    from megatron_dwm.preprocess.settings import PreprocessSettings

    settings = PreprocessSettings(
        inputs=(str(file),),
        output_prefix=str(output / "p"),
        tokenizer_type=_KIND,
        tokenizer_model=str(model),
        append_eod=True,
        num_workers=workers,
        metadata_keys=("meta.redpajama_set_name",),
    )
    return preprocess(settings).datasets["text"].tokens


def gigatoken_alone(file: Path, model: Path, output: Path, workers: int) -> int:
    """Encode the file to ids in memory with gigatoken."""
    import gigatoken

    tokenizer = gigatoken.Tokenizer.from_sentencepiece(model)
    ids = tokenizer.encode_files(gigatoken.JsonlFileSource([str(file)]))
    return len(ids.layout.content.data)


class _PoolWorker:
    """Does what a worker of Megatron-LM's tool does: parses, encodes, returns a list of ids."""

    processor: Any = None

    @classmethod
    def start(cls, model: str) -> None:
        """Load the model once a process."""
        import sentencepiece

        cls.processor = sentencepiece.SentencePieceProcessor(model_file=model)

    @classmethod
    def encode(cls, line: str) -> list[int]:
        """The ids of one record with its end."""
        ids = cls.processor.encode(json.loads(line)["text"])
        return [*ids, cls.processor.eos_id()] if ids else ids


def pool(file: Path, model: Path, output: Path, workers: int) -> int:
    """Give lines to a pool, 32 at a time, and write their ids to one file, in order."""
    tokens = 0
    with (
        file.open(encoding="utf-8") as lines,
        (output / "pool.bin").open("wb") as target,
        multiprocessing.Pool(workers, _PoolWorker.start, (str(model),)) as processes,
    ):
        for ids in processes.imap(_PoolWorker.encode, lines, 32):
            target.write(np.array(ids, dtype=np.uint16).tobytes())
            tokens += len(ids)
    return tokens


def halves(file: Path, model: Path, output: Path, workers: int) -> int:
    """Make two datasets to merge: the same one under two names."""
    tokens = ours(file, model, output, workers)
    for path in list(output.glob("p_text_document.*")):
        shutil.copy(path, path.with_name(path.name.replace("p_", "q_", 1)))
    return tokens


def merge(file: Path, model: Path, output: Path, workers: int) -> int:
    """Merge them with our tool; the result is on the disk at the end."""
    from megatron_dwm.preprocess.merge import merge_datasets

    prefixes = [str(output / f"{name}_text_document") for name in "pq"]
    tokens = merge_datasets(prefixes, str(output / "merged")).tokens
    for path in output.glob("merged.*"):
        path.unlink()
    return tokens


def cat(file: Path, model: Path, output: Path, workers: int) -> int:
    """Join the same files with the system's cat; the result is on the disk at the end."""
    import subprocess

    for suffix in ("bin", "idx", "meta.parquet"):
        paths = [str(output / f"{name}_text_document.{suffix}") for name in "pq"]
        with (output / f"cat.{suffix}").open("wb") as target:
            subprocess.run(["cat", *paths], stdout=target, check=True)
            os.fsync(target.fileno())
    size = (output / "cat.bin").stat().st_size
    for path in output.glob("cat.*"):
        path.unlink()
    return size // 2


CONTESTANTS: dict[str, Callable[[Path, Path, Path, int], int]] = {
    "ours": ours,
    "ours, zstd": ours,
    "gigatoken alone": gigatoken_alone,
    "pool of workers": pool,
    "halves": halves,
    "merge": merge,
    "cat": cat,
}


def main() -> None:
    """Run the contestant that the arguments name."""
    name, file, model, output, workers = sys.argv[1:]
    # Outside the clock: imports are not work on bytes.
    import gigatoken  # noqa: F401
    import sentencepiece  # noqa: F401

    import megatron_dwm.preprocess.merge
    import megatron_dwm.preprocess.pipeline  # noqa: F401

    begin, cpu_begin = time.perf_counter(), _cpu_seconds()
    tokens = CONTESTANTS[name](Path(file), Path(model), Path(output), int(workers))
    seconds, cpu_seconds = time.perf_counter() - begin, _cpu_seconds() - cpu_begin
    peaks = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]
    if name == "pool of workers":
        peaks.append(int(workers) * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    measured = {"seconds": seconds, "cpu_seconds": cpu_seconds, "tokens": tokens}
    print(json.dumps({**measured, "peak_bytes": 1024 * sum(peaks)}))


def _cpu_seconds() -> float:
    """Processor time of this process and of the processes that it has waited for."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    main()
