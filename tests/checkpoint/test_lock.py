"""One writer a folder: a living holder keeps it, a dead one loses it."""

import errno
import json
import logging
import os
import subprocess
import sys
import threading
import time

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


@pytest.fixture
def quick(monkeypatch):
    """The lease's times, shortened."""
    for name, value in {"BEAT_S": 0.1, "STALE_S": 0.8, "LOOK_S": 0.02}.items():
        monkeypatch.setattr(lock, name, value)


ELSEWHERE = {"host": "a", "pid": 7, "started": "5", "namespace": "boot/pid:[2]", "uuid": "b"}


@pytest.mark.parametrize("left", [json.dumps(ELSEWHERE), "", "{", "[]"])
def test_where_only_age_can_tell_it_is_waited_for_and_said_once(tmp_path, caplog, quick, left):
    """A container killed and started again sees another process-id namespace; an empty lease is
    what a crash of an older version leaves.
    """
    (tmp_path / lock.LEASE).write_text(left)
    lease, begin = lock.Lease(tmp_path), time.monotonic()
    with caplog.at_level(logging.WARNING):
        lease.take()
    assert 0.5 < time.monotonic() - begin < 5
    assert lease.is_mine()
    waiting = [text for text in caplog.messages if "waiting for another sign of it" in text]
    assert len(waiting) == 1 and "1 s at most" in waiting[0]
    lease.release()


def test_a_holder_that_gives_a_sign_is_refused_before_its_lease_is_stale(tmp_path, quick):
    path = tmp_path / lock.LEASE
    path.write_text(json.dumps(ELSEWHERE))
    os.utime(path, (time.time() - 0.3,) * 2)
    threading.Timer(0.2, os.utime, (path,)).start()
    begin = time.monotonic()
    with pytest.raises(LockedError, match="host a pid 7"):
        lock.Lease(tmp_path).take()
    assert time.monotonic() - begin < 0.5


def test_a_lease_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    """Its name comes by a link to a file that is written already; nothing else is left."""
    lease, seen = lock.Lease(tmp_path), []
    link = os.link

    def watched(source, target):
        seen.append((json.loads(source.read_text()), target.exists()))
        link(source, target)

    monkeypatch.setattr(os, "link", watched)
    lease.take()
    assert seen == [(lease.identity, False)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lease.guard", lock.LEASE]
    lease.release()


def test_a_file_system_without_links_gets_its_lease_by_a_rename(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    lease = lock.Lease(tmp_path)
    lease.take()
    assert lease.is_mine()
    with pytest.raises(LockedError):
        lock.Lease(tmp_path).take()
    lease.release()


def test_several_folders_are_taken_all_or_none(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    first, second = lock.Leases([two]), lock.Leases([one, two, one / ".." / "one"])
    first.take()
    with pytest.raises(LockedError, match="two"):
        second.take()
    assert not (one / lock.LEASE).exists()
    first.release()
    second.take()
    second.check()
    second.release()
    assert not (one / lock.LEASE).exists() and not (two / lock.LEASE).exists()
