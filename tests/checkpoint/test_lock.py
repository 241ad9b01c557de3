"""One writer a folder: a living holder keeps it, a dead one loses it."""

import json
import logging
import os
import subprocess
import sys

import pytest

from megatron_ext.checkpoint import lock
from megatron_ext.errors import DiskError, LockedError


def test_the_second_writer_is_refused_and_told_who_holds_it(tmp_path):
    first = lock.Lease(tmp_path)
    first.take()
    with pytest.raises(LockedError) as caught:
        lock.Lease(tmp_path).take()
    assert caught.value.code == 73
    assert f"pid {os.getpid()}" in str(caught.value) and os.uname().nodename in str(caught.value)
    assert "--save another folder" in str(caught.value)
    first.release()
    second = lock.Lease(tmp_path)
    second.take()
    assert second.is_mine() and not first.is_mine()
    first.release()  # releasing twice takes nothing from the new holder
    assert second.is_mine()
    second.release()
    assert not (tmp_path / lock.LEASE).exists()


def test_a_dead_holder_is_replaced_with_one_warning(tmp_path, caplog):
    process = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    lease = lock.Lease(tmp_path)
    dead = {**lease.identity, "pid": int(process.stdout), "started": "1", "uuid": "other"}
    (tmp_path / lock.LEASE).write_text(json.dumps(dead))
    with caplog.at_level(logging.WARNING):
        lease.take()
    assert lease.is_mine()
    assert len(caplog.records) == 1 and str(dead["pid"]) in caplog.text
    lease.release()


def test_a_reused_pid_is_another_process(tmp_path):
    me = lock.Lease(tmp_path).identity
    assert lock.is_alive(me, me, age_s=1e9)
    assert not lock.is_alive({**me, "started": "1"}, me, age_s=0)


def test_from_another_host_only_the_last_sign_counts(tmp_path):
    me = lock.Lease(tmp_path).identity
    other = {**me, "host": "elsewhere", "namespace": "boot/pid:[1]"}
    assert lock.is_alive(other, me, age_s=lock.STALE_S - 1)
    assert not lock.is_alive(other, me, age_s=lock.STALE_S + 1)
    assert lock.is_alive({}, me, age_s=0), "an unreadable lease is respected while it is young"


def test_losing_the_lease_is_noticed(tmp_path):
    lease = lock.Lease(tmp_path)
    lease.take()
    lease.check()
    (tmp_path / lock.LEASE).unlink()
    with pytest.raises(LockedError, match="lost"):
        lease.check()
    lease.release()


def test_a_folder_that_cannot_be_made_is_a_disk_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError) as caught:
        lock.Lease(tmp_path / "file" / "run").take()
    assert str(tmp_path / "file") in str(caught.value)
