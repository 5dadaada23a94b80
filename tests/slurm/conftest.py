"""A cluster for each file of tests, and runs to hand in there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.cluster import Cluster
from slurm.jobs import Jobs


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def jobs(cluster: Cluster, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    return Jobs(cluster, shards, tmp_path_factory.mktemp("jobs"))
