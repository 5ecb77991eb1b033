"""Several files in one step: after a kill before any change of the file system, all old ones or all new ones are found."""

from __future__ import annotations

import errno
import os
import shutil
import sys
from pathlib import Path

import pytest

from rana_fx import switching as module
from rana_fx.switching import PLACE, names_of, settle, switching

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="symbolic links")

OLD = {"model/a": "old a", "model/only-old.bin": "gone later", "plan/b": "old b"}
NEW = {"model/a": "new a", "model/deep/c": "new c", "plan/b": "new b"}
CHANGES = ("replace", "symlink_to", "hardlink_to", "unlink", "mkdir")  # of Path


def fill(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def found(folder):
    """What a reader finds by name; links that lead nowhere are no files."""
    paths = [path for path in folder.rglob("*") if not any(part.startswith(PLACE) for part in path.parts) and path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


def switch(folder):
    with switching(folder, stale=names_of(["model/*.bin"])) as new:
        fill(new, NEW)


class Killed(BaseException):
    pass


def killed_at(folder, count, monkeypatch, again=False):
    """``switch``, ended before the change of that number; whether there were as many. ``again``: no clean-up, as after a kill."""
    done = []

    def counted(real):
        def change(*args, **given):
            done.append(real)
            if len(done) == count or (again and len(done) > count):
                raise Killed
            return real(*args, **given)

        return change

    with monkeypatch.context() as patch:
        for name in CHANGES:
            patch.setattr(Path, name, counted(getattr(Path, name)))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        try:
            switch(folder)
        except Killed:
            return True
    return False


@pytest.mark.parametrize("old", [OLD, {}], ids=["over old files", "into an empty folder"])
@pytest.mark.parametrize("way", ["killed", "failed"])
def test_all_old_or_all_new_at_every_point(tmp_path, monkeypatch, old, way):
    seen = set()
    for count in range(1, 200):
        folder = tmp_path / str(count)
        folder.mkdir()
        fill(folder, old)
        stopped = killed_at(folder, count, monkeypatch, again=way == "killed")
        got = found(folder)
        assert got in (old, NEW), count
        seen.add(got == NEW)
        settle(folder)
        assert found(folder) == got and not (folder / PLACE).exists(), count
        assert not any(path.is_symlink() for path in folder.rglob("*")), count
        switch(folder)  # goes on from whatever was left
        assert found(folder) == NEW and not (folder / PLACE).exists()
        if not stopped:
            break
    assert count > 15 and seen == {True, False}


def test_a_killed_switch_is_settled_by_the_next(tmp_path, monkeypatch):
    for count in (9, 14, 18):
        folder = tmp_path / str(count)
        fill(folder, OLD)
        assert killed_at(folder, count, monkeypatch, again=True)
        switch(folder)
        assert found(folder) == NEW and not any(path.is_symlink() for path in folder.rglob("*"))


def test_what_fails_inside_changes_nothing(tmp_path):
    fill(tmp_path, OLD)
    with pytest.raises(ZeroDivisionError), switching(tmp_path) as new:
        fill(new, NEW)
        1 / 0  # noqa: B018
    assert found(tmp_path) == OLD and not (tmp_path / PLACE).exists()


def test_links_of_the_user_stay(tmp_path):
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder.mkdir()
    (elsewhere / "a").write_text("old a")
    (folder / "model").mkdir()
    (folder / "model" / "a").symlink_to("../../elsewhere/a")
    (folder / "plan").symlink_to("../elsewhere")
    switch(folder)
    assert found(folder) | {"plan/b": (folder / "plan" / "b").read_text()} == NEW
    assert (folder / "plan").is_symlink() and (folder / "model" / "a").is_symlink()
    assert {path.name: path.read_text() for path in elsewhere.iterdir()} == {"a": "new a", "b": "new b"}


def test_modes_are_kept_and_odd_entries_refused(tmp_path):
    fill(tmp_path, OLD)
    (tmp_path / "plan" / "b").chmod(0o600)
    switch(tmp_path)
    assert (tmp_path / "plan" / "b").stat().st_mode & 0o777 == 0o600
    (tmp_path / "plan" / "b").unlink()
    for make, text in ((Path.mkdir, "plan/b"), (os.mkfifo, "not a regular file")):
        make(tmp_path / "plan" / "b")
        with pytest.raises(OSError, match=text):
            switch(tmp_path)
        shutil.rmtree(tmp_path / "plan") if make is Path.mkdir else None
        (tmp_path / "plan").mkdir(exist_ok=True)
    assert (tmp_path / "model" / "a").read_text() == "new a"


@pytest.mark.parametrize("lacking", ["symlink_to", "hardlink_to"])
def test_file_systems_without_links(tmp_path, monkeypatch, lacking):
    def refuse(self, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    fill(tmp_path, OLD)
    with monkeypatch.context() as patch:
        patch.setattr(Path, lacking, refuse)
        switch(tmp_path)
    assert found(tmp_path) == NEW and not (tmp_path / PLACE).exists()


def test_files_on_another_file_system_are_copied(tmp_path, monkeypatch):
    real = Path.replace

    def replace(self, target):
        if PLACE in self.parts and PLACE not in Path(target).parts:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return real(self, target)

    fill(tmp_path, OLD)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace)
        switch(tmp_path)
    assert found(tmp_path) == NEW and not any(path.is_symlink() for path in tmp_path.rglob("*"))


def test_a_damaged_list_is_told(tmp_path):
    place = tmp_path / PLACE
    place.mkdir()
    (place / module._ENTRIES).write_text("[")
    (place / module._NOW).symlink_to("old")
    with pytest.raises(OSError, match="It was changed"):
        switch(tmp_path)
