"""mesh/imports.py."""

import gc
import sys

import pytest

from megatron_ext.mesh.imports import without_collections


@pytest.fixture
def thawed():
    yield
    gc.unfreeze()


def test_nothing_is_collected_while_the_first_rank_imports(monkeypatch, thawed):
    monkeypatch.delitem(sys.modules, "megatron.core", raising=False)
    before = gc.get_freeze_count()
    with pytest.raises(KeyError), without_collections():
        assert not gc.isenabled()
        raise KeyError
    assert gc.isenabled() and gc.get_freeze_count() > before


def test_a_second_run_in_a_process_freezes_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core", sys)
    before = gc.get_freeze_count()
    with without_collections():
        assert gc.isenabled()
    assert gc.get_freeze_count() == before
