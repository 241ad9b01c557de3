"""One Slurm cluster for the tests of a file."""

from __future__ import annotations

import pytest

from tests.slurm.cluster import Cluster, install


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two nodes for all tests of this file."""
    reason = install()
    if reason is not None:
        pytest.skip(reason)
    made = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        made.start()
        yield made
    finally:
        made.stop()
