"""Files and folders appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cdkd_edge.core import files
from cdkd_edge.core.files import (
    being_made,
    read_json,
    read_small,
    read_toml,
    remove_abandoned,
    scratch_folder,
    sha256_of,
    whole_file,
    whole_folder,
    write_text,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "a.tif"
    with whole_file(path) as temporary:
        assert temporary.parent.parent == path.parent, "on the same file system"
        assert temporary.name == "a.tif"  # libraries choose a format by the suffix
        temporary.write_bytes(b"whole")
        assert not path.exists()
    assert path.read_bytes() == b"whole"
    assert names(path.parent) == ["a.tif"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_a_failure_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(error), whole_file(path) as temporary:  # noqa: PT012
        temporary.write_text("ha")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.json"]


def test_a_read_only_file_system_is_told_of_by_the_name_that_the_user_knows(tmp_path, monkeypatch):
    def refused(path, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(files.Path, "mkdir", refused)
    with pytest.raises(OSError, match="Read-only") as caught:
        write_text(tmp_path / "report.json", "{}")
    assert caught.value.filename == str(tmp_path / "report.json")


def test_a_block_that_wrote_nothing_fails(tmp_path):
    with pytest.raises(FileNotFoundError), whole_file(tmp_path / "a"):
        pass
    assert names(tmp_path) == []


def test_two_writers_do_not_meet(tmp_path):
    path = tmp_path / "a"
    with whole_file(path) as first, whole_file(path) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"  # the one that finished last
    assert names(tmp_path) == ["a"]


def test_it_is_an_ordinary_file(tmp_path):
    (tmp_path / "plain").touch()
    write_text(tmp_path / "a", "ä")
    assert (tmp_path / "a").read_bytes() == "ä".encode()
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_data_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr("cdkd_edge.core.files.os.fsync", lambda descriptor: steps.append("sync"))
    monkeypatch.setattr("cdkd_edge.core.files.os.replace", lambda old, new: steps.append("rename"))
    with whole_file(tmp_path / "a") as temporary:
        temporary.touch()
    assert steps == ["sync", "rename", "sync"]


def test_a_folder_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "run"
    with whole_folder(path) as temporary:
        (temporary / "a").touch()
        assert not path.exists()
        assert temporary.parent == path.parent
    assert names(path.parent) == ["run"]
    assert names(path) == ["a"]


def test_a_failure_leaves_no_folder(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "run") as temporary:  # noqa: PT012
        (temporary / "deep").mkdir()
        (temporary / "deep" / "a").touch()
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_a_failure_leaves_no_parent_that_was_made_for_it(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "far/away/run"):
        raise KeyboardInterrupt
    assert names(tmp_path) == []
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "far/away/run"):  # noqa: PT012
        (tmp_path / "far/other").touch()
        raise KeyboardInterrupt
    assert names(tmp_path / "far") == ["other"], "what somebody else has put there stays"


HALF_A_FILE = """
import sys, time
from pathlib import Path
from cdkd_edge.core.files import whole_file
with whole_file(Path(sys.argv[1])) as temporary:
    temporary.write_bytes(b"half")
    temporary.with_name(temporary.name + "-journal").write_bytes(b"half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_half_a_file_of_a_killed_process_goes_when_the_next_file_is_written(tmp_path):
    holders = [
        subprocess.Popen([sys.executable, "-c", HALF_A_FILE, tmp_path / name], stdout=subprocess.PIPE)
        for name in ("killed.gpkg", "alive.gpkg")
    ]
    (tmp_path / ".mine.0123abcd.part").write_text("a file, not a folder: not ours")
    try:
        for holder in holders:
            assert holder.stdout.readline() == b"ready\n"
        holders[0].kill()
        holders[0].wait()
        subprocess.run(
            [sys.executable, "-c", "import sys; from cdkd_edge.core.files import *; write_text(Path(sys.argv[1]), 'x')",
             tmp_path / "other.txt"], check=True,
        )  # fmt: skip
        assert [name.split(".")[1] for name in names(tmp_path) if name.startswith(".")] == ["alive", "mine"]
        assert (tmp_path / "other.txt").exists()
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()
            holder.stdout.close()


def test_a_name_of_the_greatest_length(tmp_path):
    path = tmp_path / ("ä" * 125 + ".json")
    write_text(path, "{}")
    with whole_folder(tmp_path / ("x" * 255)):
        pass
    assert sorted(map(len, names(tmp_path))) == [130, 255]


def test_a_link_goes_on_leading_where_it_leads(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link.json").symlink_to(tmp_path / "disk" / "real.json")  # dangling, so far
    for text in ("one", "two"):
        write_text(tmp_path / "link.json", text)
        assert (tmp_path / "link.json").is_symlink()
        assert (tmp_path / "disk" / "real.json").read_text() == text
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OSError, match="symbolic links"):
        write_text(tmp_path / "loop", "x")
    assert names(tmp_path) == ["disk", "link.json", "loop"]


def test_devices_and_pipes_are_written_to_and_stay(tmp_path, monkeypatch):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with subprocess.Popen(["cat", fifo], stdout=subprocess.PIPE) as reader:
        write_text(fifo, "through")
        assert reader.stdout.read() == b"through"
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    monkeypatch.setattr(files, "_READER_SECONDS", 0.2)
    with pytest.raises(OSError, match="nobody reads from this pipe"):
        write_text(fifo, "x")
    with pytest.raises(OSError, match=r"No space.*/dev/full"):
        write_text(files.Path("/dev/full"), "x")
    assert stat.S_ISCHR(files.Path("/dev/full").stat().st_mode)
    with open(tmp_path / "out", "wb") as out:
        write = "from cdkd_edge.core.files import *; write_text(Path('/dev/stdout'), 'a'); print('b')"
        subprocess.run([sys.executable, "-c", write], stdout=out, check=True)
    assert (tmp_path / "out").read_text() in ("b\n", "ab\n"), "the stream stays open"
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path, "x")
    assert names(tmp_path) == ["fifo", "out"]


def test_documents_are_bounded(tmp_path):
    path = tmp_path / "a"
    with pytest.raises(OSError, match="larger than 16 MiB"):
        read_small(files.Path("/dev/zero"))
    os.mkfifo(tmp_path / "fifo")
    assert read_small(tmp_path / "fifo") == b"", "no writer: no waiting"
    path.write_bytes(b"12345")
    assert read_small(path, 5) == b"12345"
    with pytest.raises(OSError, match="larger"):
        read_small(path, 4)


@pytest.mark.parametrize("text", [b"{", b"\xff", b"[" * 100_000, b'{"a": NaN}', b""])
def test_what_is_no_json_is_a_value_error(tmp_path, text):
    (tmp_path / "a").write_bytes(text)
    with pytest.raises(ValueError, match=r"\S"):
        read_json(tmp_path / "a")


@pytest.mark.parametrize("text", [b"a = [", b"a = '\xff'", b"a = " + b"[" * 100_000, b"a = 1\na = 2"])
def test_what_is_no_toml_is_a_value_error(tmp_path, text):
    (tmp_path / "a").write_bytes(text)
    with pytest.raises(ValueError, match=r"\S"):
        read_toml(tmp_path / "a")


def test_documents_are_read(tmp_path):
    (tmp_path / "a").write_bytes(b'\xef\xbb\xbf{"a": [1, "\xc3\xa4"]}')
    assert read_json(tmp_path / "a") == {"a": [1, "ä"]}
    (tmp_path / "a").write_text("[t]\nx = 1")
    assert read_toml(tmp_path / "a") == {"t": {"x": 1}}


def test_files_of_a_folder_in_the_making_do_not_wait_for_its_lock(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = time.monotonic()
    with whole_folder(Path("new")) as folder, scratch_folder() as scratch:
        for index in range(3):
            write_text(folder / f"{index}", "")
            write_text(scratch / f"{index}", "")
    assert time.monotonic() - started < 1.5
    assert len(list((tmp_path / "new").iterdir())) == 3


def test_errors_name_what_the_user_knows(tmp_path):
    with pytest.raises(OSError, match="No space") as caught, whole_folder(tmp_path / "new") as folder:
        raise OSError(errno.ENOSPC, "No space", str(folder / "a.png"))
    assert caught.value.filename == str(tmp_path / "new/a.png")
    with pytest.raises(OSError, match=r"^GDAL refuses$"), whole_file(tmp_path / "a"):  # errors of GDAL have no number
        raise OSError("GDAL refuses")


def test_folders_nested_too_deeply_are_an_error_of_the_system(tmp_path):
    with pytest.raises(OSError, match="too long"):
        write_text(tmp_path.joinpath(*["d"] * 1500), "")


HOLDS = """
import sys, time
from pathlib import Path
from cdkd_edge.core.files import whole_folder
with whole_folder(Path(sys.argv[1])) as temporary:
    (temporary / "half").touch()
    print("ready", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_is_removed_and_a_living_one_s_is_not(tmp_path):
    holders = [
        subprocess.Popen([sys.executable, "-c", HOLDS, tmp_path / f"run{number}"], stdout=subprocess.PIPE)
        for number in (1, 2)
    ]
    (tmp_path / ".mine.part").mkdir()
    (tmp_path / ".run.0123abcd.part").symlink_to(tmp_path / ".mine.part")
    try:
        for holder in holders:
            assert holder.stdout.readline() == b"ready\n"
        assert remove_abandoned(tmp_path) == ()
        holders[0].kill()
        holders[0].wait()
        (removed,) = remove_abandoned(tmp_path)
        assert removed.name.startswith(".run1.")
        left = [name.split(".")[1] for name in names(tmp_path)]
        assert sorted(left) == ["mine", "run", "run2"]
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()
            holder.stdout.close()
    assert remove_abandoned(tmp_path / "absent") == ()


def test_two_cannot_make_the_same_folder(tmp_path):
    """Known at the start, not when the work is done."""
    path = tmp_path / "run [1]"
    holder = subprocess.Popen([sys.executable, "-c", HOLDS, path], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"ready\n"
        assert being_made(path)
        assert not being_made(tmp_path / "run")
        with pytest.raises(FileExistsError, match="another process is making it"), whole_folder(path):
            raise AssertionError
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    assert not being_made(path)
    with whole_folder(path):
        pass
    assert path.is_dir()


def test_scratch_folders_go_and_take_those_of_killed_processes_with_them(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / ".cdkd-edge.0123abcd.part").mkdir()
    (tmp_path / ".cdkd-edge.0123abcd.part" / "half").touch()
    (tmp_path / "tmpother").mkdir()
    with scratch_folder() as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "a").touch()
        assert names(tmp_path) == [folder.name, "tmpother"]
    assert names(tmp_path) == ["tmpother"]


def test_where_folders_cannot_be_locked(tmp_path, monkeypatch):
    def refuse(descriptor, how):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr("cdkd_edge.core.files.fcntl.flock", refuse)
    (tmp_path / ".run.0123abcd.part").mkdir()
    assert remove_abandoned(tmp_path) == ()
    with whole_folder(tmp_path / "run"):
        pass
    assert names(tmp_path) == [".run.0123abcd.part", "run"]


def test_a_folder_that_exists_is_kept(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(FileExistsError), whole_folder(tmp_path / "run"):
        pass
    assert names(tmp_path) == ["run"]


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 21) + 5])
def test_sha256_of_a_file_read_in_pieces(tmp_path, size):
    content = bytes(range(256)) * (size // 256 + 1)
    (tmp_path / "a").write_bytes(content[:size])
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content[:size]).hexdigest()


def test_a_folder_that_somebody_else_has_locked_is_used_all_the_same(tmp_path, monkeypatch):
    """``flock FOLDER cdkd-edge bench`` must not wait for itself."""
    monkeypatch.setattr(files, "_LOCK_SECONDS", 0.1)
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        with whole_folder(tmp_path / "run") as temporary:
            (temporary / "result").touch()
        assert remove_abandoned(tmp_path) == ()
    finally:
        os.close(descriptor)
    assert (tmp_path / "run/result").exists()
