"""Options of the whole test suite, its fixtures, and which tests are slow."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.small_runs.fixtures import corpus, server, short, stopped  # noqa: F401

# By processor time; begun first, so that no worker is left alone with one of them at the end.
LONGEST = (
    *("test_jobs.py", "test_quickstart.py", "test_faults.py", "test_runs.py", "test_benchmark.py"),
    *(
        "test_followed.py",
        "test_sweep.py",
        "test_first_gpu_run.py",
        "test_evaluate.py",
        "test_measured.py",
        "test_features.py",
    ),
)

# Folders and files whose tests start processes, train or convert models; `-m "not slow"` runs the
# others in under a minute. A new file is slow if its folder is listed.
SLOW = (
    *(
        "bilevel/",
        "checkpoint/",
        "compat/",
        "convert/",
        "doctor/",
        "evaluation/",
        "forking/",
        "gpu/",
        "library/",
        "packaging/",
    ),
    *("pages/", "planning/", "preprocess/", "recipes/", "run/", "signatures/", "slurm/", "tools/"),
    *("scoring/", "selection/", "study/", "training/", "weighting/"),
    *("report/test_browser.py", "report/test_command.py"),
    *("config/test_examples.py", "config/test_printing.py", "model/test_fp8.py"),
    *("model/test_llm_borders.py", "model/test_recomputation.py"),
    *("runtime/test_bring_up.py", "runtime/test_peers.py", "runtime/test_start.py"),
    "tokenizer/test_engine.py",
    *("test_metrics_document.py", "test_quickstart.py", "test_sweep.py", "test_testing.py"),
)
# Files of these folders that only call functions.
NOT_SLOW = (
    *("bilevel/test_adapters.py", "checkpoint/test_manifest.py", "convert/test_generate.py"),
    *("evaluation/test_scores.py", "planning/test_published.py"),
    "pages/test_named.py",
    *("preprocess/test_index_writer.py", "preprocess/test_merge_types.py"),
    *("preprocess/test_metadata.py", "preprocess/test_preprocess_output.py"),
    *("run/test_changes.py", "run/test_health.py", "run/test_lost_checkpoints.py"),
    *("weighting/test_concentration.py", "weighting/test_costs.py", "weighting/test_noise.py"),
    *("weighting/test_encoder_borders.py", "weighting/test_schedule.py"),
    *("weighting/test_sizes.py", "weighting/test_contract.py"),
)
_TESTS = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    """Tests that need more than a checkout run only when asked."""
    parser.addoption(
        "--real-weights",
        action="store_true",
        help="also run the tests that fetch a public model (93 MB)",
    )
    parser.addoption("--long", action="store_true", help="also run the long mode of tests")
    parser.addoption("--fault-table", metavar="FILE", help="write what faults were survived")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark slow tests, and put the longest files first; tests/run.sh starts them in this order."""
    for item in items:
        name = item.path.relative_to(_TESTS).as_posix()
        if name.startswith(SLOW) and name not in NOT_SLOW:
            item.add_marker("slow")
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))
