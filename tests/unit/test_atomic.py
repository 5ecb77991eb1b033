"""Writing files: whole or not at all; through links, into FIFOs and devices; modes kept; nothing left of killed writes."""

from __future__ import annotations

import errno
import os
import signal
import stat
import sys
import threading
import time
from pathlib import Path

import pytest

from rana_fx import atomic
from rana_fx.atomic import locked, read_regular, replacing, write_bytes

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="links, FIFOs and modes of POSIX")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    write_bytes(path, b"old")
    with pytest.raises(ZeroDivisionError), replacing(path) as file:
        file.write(b"new")
        1 / 0  # noqa: B018
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a"]
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new" and names(tmp_path) == ["a"]


def test_a_link_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "real").mkdir()
    target, link, chain = tmp_path / "real" / "a", tmp_path / "link", tmp_path / "chain"
    target.write_bytes(b"old")
    link.symlink_to("real/a")
    chain.symlink_to("link")
    write_bytes(chain, b"new")
    assert link.is_symlink() and chain.is_symlink() and not target.is_symlink() and target.read_bytes() == b"new"
    target.unlink()  # both lead to nothing now
    write_bytes(chain, b"again")
    assert link.is_symlink() and chain.is_symlink() and target.read_bytes() == b"again"
    assert names(tmp_path / "real") == ["a"]


def test_links_in_a_circle(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").is_symlink()


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
def test_the_mode_is_kept(tmp_path, mode):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(mode)
    write_bytes(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_a_new_file_has_the_mode_that_open_gives(tmp_path):
    write_bytes(tmp_path / "a", b"")
    (tmp_path / "b").write_bytes(b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root gives files away")
def test_the_owner_is_kept(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    os.chown(path, 12345, 23456)
    write_bytes(path, b"new")
    found = path.stat()
    assert (found.st_uid, found.st_gid, path.read_bytes()) == (12345, 23456, b"new")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everything")
def test_a_write_protected_file_is_an_error(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(0o400)
    with pytest.raises(PermissionError):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"


def test_a_folder_is_an_error(tmp_path):
    (tmp_path / "a").mkdir()
    for path in (tmp_path / "a", tmp_path / "a" / ".."):
        with pytest.raises(IsADirectoryError, match="Is a directory"):
            write_bytes(path, b"new")
    assert names(tmp_path) == ["a"] and names(tmp_path / "a") == []


def test_a_fifo_is_written_to(tmp_path):
    path, got = tmp_path / "fifo", []
    os.mkfifo(path)
    content = os.urandom(1 << 18)  # more than a pipe holds
    reader = threading.Thread(target=lambda: got.append(path.read_bytes()))
    reader.start()
    write_bytes(path, content)
    reader.join()
    assert got == [content] and stat.S_ISFIFO(path.lstat().st_mode) and names(tmp_path) == ["fifo"]


def test_a_fifo_without_a_reader_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "READER_SECONDS", 0.05)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="No process reads this FIFO") as caught:
        write_bytes(tmp_path / "fifo", b"new")
    assert caught.value.errno == errno.ENXIO and stat.S_ISFIFO((tmp_path / "fifo").lstat().st_mode)


def test_a_device_is_written_to(tmp_path):
    link = tmp_path / "link"
    link.symlink_to(os.devnull)
    write_bytes(link, b"new")
    assert link.is_symlink() and stat.S_ISCHR(link.stat().st_mode) and names(tmp_path) == ["link"]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_descriptors_of_this_process_are_written_to(tmp_path):
    """/dev/fd/3 where 3 is a file: what was written before stays."""
    with (tmp_path / "a").open("wb", buffering=0) as file:
        file.write(b"before ")
        write_bytes(Path(f"/dev/fd/{file.fileno()}"), b"facts")
        file.write(b" after")
    assert (tmp_path / "a").read_bytes() == b"before facts after" and names(tmp_path) == ["a"]
    reading, writing = os.pipe()
    write_bytes(Path(f"/dev/fd/{writing}"), b"facts")
    os.close(writing)
    assert os.read(reading, 99) == b"facts"
    os.close(reading)


def test_names_as_long_as_a_file_system_takes(tmp_path):
    for name in ("x" * 255, "ü" * 127):
        write_bytes(tmp_path / name, b"new")
        assert (tmp_path / name).read_bytes() == b"new"
    assert len(names(tmp_path)) == 2


def killed(path, content):
    """A process that is killed while it writes."""
    if not (pid := os.fork()):
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        write_bytes(path, content)
    os.waitpid(pid, 0)


def test_leftovers_of_killed_writes_are_removed_by_the_next(tmp_path):
    path, other = tmp_path / "a", tmp_path / "b"
    write_bytes(path, b"old")
    for target in (path, path, other):  # the second removes what the first left
        killed(target, b"half")
    (tmp_path / ".a.77.tmp").write_bytes(b"as earlier versions named them")
    (tmp_path / ".a.b.tmp").write_bytes(b"of somebody else")
    assert len(names(tmp_path)) == 5 and path.read_bytes() == b"old"
    write_bytes(path, b"new")
    left = names(tmp_path)
    assert path.read_bytes() == b"new" and len(left) == 3 and {"a", ".a.b.tmp"} < set(left)
    assert next(name for name in left if name.startswith(".b.")).endswith(".tmp")


def test_a_write_in_progress_is_no_leftover(tmp_path):
    path = tmp_path / "a"
    with replacing(path) as file:
        file.write(b"first")
        write_bytes(path, b"second")
        assert path.read_bytes() == b"second" and len(names(tmp_path)) == 2
    assert path.read_bytes() == b"first" and names(tmp_path) == ["a"]


def test_many_writers_at_once(tmp_path):
    """A reader meets one of the contents, always whole, and no writer loses its temporary file to another."""
    path, errors = tmp_path / "a", []
    contents = [bytes([65 + index]) * 10_000 for index in range(6)]

    def write(content):
        try:
            for _ in range(20):
                write_bytes(path, content)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            assert path.read_bytes() in contents
    assert not errors and names(tmp_path) == ["a"]


def test_without_locks_only_old_leftovers_are_removed(tmp_path, monkeypatch):
    def none(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(atomic.fcntl, "flock", none)
    for name, age in ((".a.77.tmp", 2 * 86_400), (".a.78.tmp", 60)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    write_bytes(tmp_path / "a", b"new")
    assert names(tmp_path) == [".a.78.tmp", "a"]
    with locked(tmp_path):
        pass


def test_only_regular_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    (tmp_path / "a").write_bytes(b"content")
    for path in (tmp_path / "fifo", tmp_path / "link", Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            read_regular(path)
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "nothing")
    assert read_regular(tmp_path / "a") == b"content"


def test_a_lock_holds_for_one_at_a_time(tmp_path):
    order = []

    def second():
        with locked(tmp_path):
            order.append("second")

    thread = threading.Thread(target=second)
    with locked(tmp_path):
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
