"""A resumed run keeps the domain of every document; the rest of a metadata sidecar may change."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_dwm.checkpoint.manifest import list_checkpoints, read_manifest, write_manifest
from tests.small_runs.forked import Job, Server

WARNS_OF_DOMAINS = re.compile(r"^warning: .*domains", re.MULTILINE)


@dataclass
class Stopped:
    """A copy of a stopped run, and its metadata sidecar, which is put back after the test."""

    server: Server
    run_dir: Path
    arguments: list[str]
    sidecar: Path

    def resume(self, *more: str) -> Job:
        """Go on for a step."""
        return self.server.run(self.run_dir, [*self.arguments, *more])


@pytest.fixture
def run(server: Server, stopped: tuple[Path, list[str], Path], tmp_path: Path) -> Iterator[Stopped]:
    origin, arguments, folder = stopped
    shutil.copytree(origin, tmp_path / "run")
    found = Stopped(server, tmp_path / "run", arguments, folder / "data.meta.parquet")
    before = found.sidecar.read_bytes()
    yield found
    found.sidecar.write_bytes(before)


def test_domains_that_changed_places_are_refused(run: Stopped) -> None:
    """Every label is still there, each on another document, and the other columns stay."""
    table = pq.read_table(run.sidecar)
    labels = table["domain"].to_pylist()
    assert labels != labels[::-1]
    column = pa.array(labels[::-1], table.schema.field("domain").type)
    place = table.column_names.index("domain")
    pq.write_table(table.set_column(place, "domain", column), run.sidecar)
    job = run.resume()
    assert job.codes == [2], job.text
    [line] = [line for line in job.text.splitlines() if line.startswith("error: ")]
    assert ".meta.parquet" in line and line.count(f"({len(labels)} documents)") == 2
    assert "--run.allow_changed data.train" in line
    assert run.resume("--run.allow_changed", "validation.path").codes == [2]
    assert run.resume("--run.allow_changed", "data.train").codes == [0]


def test_domains_that_are_gone_are_refused(run: Stopped) -> None:
    """Without the file every document is of domain unknown."""
    content = run.sidecar.read_bytes()
    run.sidecar.unlink()
    assert run.resume().codes == [2]
    run.sidecar.write_bytes(content)
    job = run.resume()
    assert job.codes == [0] and not WARNS_OF_DOMAINS.search(job.text), job.text


def test_other_columns_may_come(run: Stopped) -> None:
    """Training depends on the domains alone, however the file is written."""
    table = pq.read_table(run.sidecar)
    scored = table.append_column("score", pa.array([0.5] * len(table)))
    pq.write_table(scored, run.sidecar, row_group_size=7)
    job = run.resume()
    assert job.codes == [0] and not WARNS_OF_DOMAINS.search(job.text), job.text


def test_a_checkpoint_that_names_no_domains_is_taken_with_a_warning(run: Stopped) -> None:
    """As earlier versions wrote it."""
    newest = list_checkpoints(run.run_dir)[-1]
    manifest = read_manifest(newest)
    old = {key: mark for key, mark in manifest.fingerprint.items() if "domains" not in key}
    assert len(old) == len(manifest.fingerprint) - 1
    write_manifest(newest, replace(manifest, fingerprint=old))
    job = run.resume()
    assert job.codes == [0], job.text
    assert len(WARNS_OF_DOMAINS.findall(job.text)) == 1 and str(newest) in job.text
