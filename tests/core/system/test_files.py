"""Files appear whole or not at all, and a full disk is one clear error."""

import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from builders.machine import files_of_at_most
from uni_instruct.errors import DiskError, RequestError
from uni_instruct.system.files import atomic_file, atomic_folder, atomic_folder_if_absent, refuse_file_name, sha256


def test_a_file_takes_the_old_one_s_place_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with atomic_file(path) as partial:
        partial.write_text("old")
    with atomic_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    with pytest.raises(KeyError), atomic_file(path) as partial:
        _break_off(partial, KeyError)
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["file"]


def test_a_folder_takes_the_old_one_s_place_only_when_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with atomic_folder(path) as partial:
        (partial / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(path) as partial:
        _break_off(partial / "b", KeyboardInterrupt)
    assert os.listdir(path) == ["a"]
    with atomic_folder(path) as partial:
        (partial / "b").write_text("new")
    assert os.listdir(path) == ["b"]
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("writing", [atomic_file, atomic_folder])
def test_a_pipe_is_not_replaced_and_not_waited_for(
    tmp_path: Path, writing: Callable[[Path], AbstractContextManager[Path]]
) -> None:
    """As root, /dev/null would become a folder for everybody."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RequestError, match=r"pipe is not a (file|folder), so it is not replaced; write elsewhere"):
        writing(tmp_path / "pipe").__enter__()
    assert (tmp_path / "pipe").is_fifo()
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_file_does_not_become_a_folder(tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(RequestError, match="notes is not a folder, so it is not replaced"):
        atomic_folder(tmp_path / "notes").__enter__()
    assert (tmp_path / "notes").read_text() == "mine"
    assert os.listdir(tmp_path) == ["notes"]


@pytest.mark.parametrize("writing", [atomic_file, atomic_folder])
@pytest.mark.parametrize("path", ["", ".", "..", "/", "x/.."])
def test_what_has_no_name_is_not_written(path: str, writing: Callable[[Path], AbstractContextManager[Path]]) -> None:
    with pytest.raises(RequestError, match="itself cannot be written; name a file or folder in it"):
        writing(Path(path)).__enter__()


@pytest.mark.parametrize("name", ["digits-0.08", "run.v2", "a.old", "v1.5", "x.", ".hidden", "a.b c", "run"])
def test_a_folder_may_have_a_dot_in_its_name(name: str) -> None:
    refuse_file_name(Path(name))


def test_a_folder_is_not_made_under_the_name_of_a_file(tmp_path: Path) -> None:
    for name in ("g.zip", "g.pkl", "g.safetensors", "g.TXT"):
        with pytest.raises(
            RequestError, match=rf"g\.\w+ ends in \.\w+, and a folder is made; name a folder, such as {tmp_path}/g$"
        ):
            refuse_file_name(tmp_path / name)
    (tmp_path / "g.zip").mkdir()
    refuse_file_name(tmp_path / "g.zip")  # it is one


def test_what_a_killed_process_left_is_removed_by_the_next_and_what_another_fills_is_not(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    fill = "from uni_instruct.system.files import atomic_folder\nfrom pathlib import Path\nimport sys\n"
    fill += "with atomic_folder(Path(sys.argv[1])) as p:\n (p / 'a').touch(); print(p.name, flush=True); sys.stdin.read()"
    command, pipes = [sys.executable, "-c", fill, str(path)], {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as killed, subprocess.Popen(command, text=True, **pipes) as other:
        left, filled = (process.stdout.readline().strip() for process in (killed, other))
        killed.kill()
        killed.wait()
        assert sorted(os.listdir(tmp_path)) == sorted([left, filled])
        # In containers a process often has the number of the one before it.
        (tmp_path / f".folder.{os.getpid()}.tmp").mkdir()
        (tmp_path / f".folder.{os.getpid()}.tmp" / "foreign").touch()
        (tmp_path / ".folder.x.7.tmp").mkdir()
        with atomic_folder(path) as partial:
            assert os.listdir(partial) == []
            (partial / "b").touch()
        assert sorted(os.listdir(tmp_path)) == sorted(["folder", filled, ".folder.x.7.tmp"])
        other.communicate("")
    assert other.returncode == 0
    assert os.listdir(path) == ["a"]
    assert sorted(os.listdir(tmp_path)) == [".folder.x.7.tmp", "folder"]


def test_of_two_that_make_a_folder_once_the_first_s_stays(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    with atomic_folder_if_absent(path) as late:
        (late / "a").write_text("late")
        with atomic_folder_if_absent(path) as early:
            (early / "a").write_text("early")
        before = path.stat().st_ino
    assert path.stat().st_ino == before
    assert (path / "a").read_text() == "early"
    assert os.listdir(tmp_path) == ["folder"]
    with pytest.raises(KeyError), atomic_folder_if_absent(tmp_path / "other") as partial:
        _break_off(partial / "b", KeyError)
    assert os.listdir(tmp_path) == ["folder"]


def test_a_full_disk_is_one_error_and_leaves_nothing(small_disk: Path) -> None:
    for kind in (atomic_file, atomic_folder, atomic_folder_if_absent):
        with pytest.raises(DiskError, match="No space left on device; free space") as caught, kind(small_disk / "x") as p:
            (p / "y" if p.is_dir() else p).write_bytes(b"1" * 200_000)
        assert caught.value.exit_code == 2
        assert os.listdir(small_disk) == []


def test_the_remedy_names_no_option_and_fits_the_fault(tmp_path: Path) -> None:
    """What is written may be --out's, --grid's, --plot's or the cache's; room is no help where a name is too long."""
    (tmp_path / "file").write_text("")
    for place, remedy in ((tmp_path / ("x" * 300), "give a shorter name"), (tmp_path / "file" / "x", "write elsewhere")):
        with pytest.raises(DiskError) as caught, atomic_file(place) as partial:
            partial.write_text("x")
        assert caught.value.remedy == remedy


def test_a_limit_on_file_size_is_one_error_and_leaves_nothing(tmp_path: Path) -> None:
    for kind in (atomic_file, atomic_folder, atomic_folder_if_absent):
        with (
            files_of_at_most(10_000),
            pytest.raises(DiskError, match=os.strerror(errno.EFBIG)),
            kind(tmp_path / "x") as partial,
        ):
            (partial / "y" if partial.is_dir() else partial).write_bytes(b"1" * 20_000)
        assert os.listdir(tmp_path) == []


def test_a_parent_that_is_a_file_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for kind in (atomic_file, atomic_folder, atomic_folder_if_absent):
        with pytest.raises(DiskError, match="cannot write"), kind(tmp_path / "file" / "x"):
            pytest.fail("nothing can be written there")


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_file(tmp_path / "x"):
        (tmp_path / "missing").read_bytes()


def test_sha256_is_the_standard_one(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * 100_000)
    assert sha256(tmp_path / "x") == hashlib.sha256(b"abc" * 100_000).hexdigest()


def _break_off(path: Path, error: type[BaseException]) -> None:
    path.write_text("broken")
    raise error
