"""Files and folders that appear whole: nothing is left of processes that died, and full disks are one sentence."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file

from fewstep import disk, faults, owners
from fewstep.bundle.bundle import check_writable, writing
from fewstep.errors import BundleError, StorageError
from fewstep.faults import Place, storage_error, writing_to

REPOSITORY = Path(__file__).parents[2]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def gone() -> str:
    """The tag of a process that has ended."""
    code = "from fewstep.owners import tag; print(tag())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_owners_are_told_apart(gone: str) -> None:
    own = owners.tag()
    machine, boot, pid, start = own.split("-")
    assert not owners.is_gone(f".x.partial-{own}-abc")
    assert owners.is_gone(f".x.partial-{gone}-abc")
    assert owners.is_gone(f"{machine}-{boot}-{pid}-{int(start) + 1}"), "the id was given to another process"
    assert owners.is_gone(f"{machine}-{'0' * 8}-{pid}-{start}"), "the machine was started again"
    assert not owners.is_gone(f"{'0' * 8}-{boot}-{gone.partition('-')[2]}"), "another machine's cannot be asked"
    assert not owners.is_gone(".x.partial-abcdef"), "nobody's"


def test_a_zombie_is_gone() -> None:
    code = "from fewstep.owners import tag; print(tag(), flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    tag = child.stdout.readline().strip()
    assert not owners.is_gone(tag)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert owners.is_gone(tag)
    child.communicate()


def test_a_folder_appears_whole_and_replaces_another_at_once(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for text in ("first", "second"):
        with disk.replacing(target) as partial:
            (partial / "file").write_text(text)
            assert not target.exists() or (target / "file").read_text() == "first"
        assert (target / "file").read_text() == text
    assert names(tmp_path) == ["out"]


def test_two_names_are_exchanged_in_one_step(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert disk._exchange(tmp_path / "a", tmp_path / "b"), "Linux and macOS can"
    assert names(tmp_path / "a") == ["b"]


def test_without_that_the_old_folder_goes_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_exchange", lambda a, b: False)
    test_a_folder_appears_whole_and_replaces_another_at_once(tmp_path)


def test_rests_of_dead_processes_go_and_others_stay(tmp_path: Path, gone: str) -> None:
    alive = f".out.partial-{owners.tag()}-abc"
    for name in (alive, f".out.partial-{gone}-abc", f".other.partial-{gone}-abc", ".out.partial-mine"):
        (tmp_path / name).mkdir()
    with disk.replacing(tmp_path / "out"):
        pass
    assert set(names(tmp_path)) == {f".other.partial-{gone}-abc", ".out.partial-mine", alive, "out"}


def test_a_failure_leaves_nothing_and_the_old_folder(tmp_path: Path) -> None:
    with disk.replacing(tmp_path / "out") as partial:
        (partial / "file").touch()
    with pytest.raises(KeyboardInterrupt), disk.replacing(tmp_path / "out") as partial:
        (partial / "half").touch()
        raise KeyboardInterrupt
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["file"]


def test_what_was_begun_can_be_removed_at_once(tmp_path: Path) -> None:
    with disk.beside(tmp_path / "x"), disk.scratch() as scratch:
        assert scratch.is_dir()
        disk.discard_all()
        assert not scratch.exists()
        assert names(tmp_path) == []


def test_folders_are_synced_before_they_appear(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []

    def record(number: int) -> None:
        synced.append(Path(f"/proc/self/fd/{number}").readlink().name if sys.platform == "linux" else "?")

    monkeypatch.setattr(os, "fsync", record)
    with disk.replacing(tmp_path / "out") as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "file").touch()
    assert synced.index("file") < synced.index("deep") < len(synced) - 1
    assert synced[-1] == tmp_path.name, "the name, after the rename"


ENOSPC = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ENOSPC, "no space left on the disk"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "no space left"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), "no space left"),
        (RuntimeError("open file /x fail, errcode = 28 - unknown error"), "no space left on the disk"),
        (OSError(errno.EROFS, "Read-only file system"), "the file system is read-only"),
        (OSError(errno.EACCES, "Permission denied"), "permission denied"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk quota is used up"),
    ],
    ids=["errno", "safetensors", "torch", "onnxruntime", "read-only", "forbidden", "quota"],
)
def test_what_libraries_make_of_a_full_disk_is_one_sentence(error: Exception, said: str, tmp_path: Path) -> None:
    with pytest.raises(StorageError) as caught, disk.replacing(tmp_path / "out", what="the bundle", hint="elsewhere"):
        try:
            raise error
        except Exception as first:
            raise ValueError("a library's own") from first
    assert caught.value.message.startswith(f"cannot write the bundle to {tmp_path / 'out'}: {said}")
    assert caught.value.hint == "elsewhere"
    assert names(tmp_path) == []


def test_the_real_errors_of_writers(tmp_path: Path) -> None:
    """Oracle: the libraries themselves, under a limit of the system on the size of files."""
    import numpy as np

    array = np.zeros(1 << 16, np.uint8)
    writers = [
        lambda path: save_file({"x": array}, path),
        lambda path: torch.save({"x": torch.from_numpy(array)}, path),
        lambda path: path.write_bytes(array.tobytes()),
        lambda path: shutil.copytree(tmp_path / "source", path),
    ]
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_bytes(array.tobytes())
    for i, write in enumerate(writers):
        with pytest.raises(StorageError, match="cannot write the result to"), small_files(1 << 12):
            with disk.replacing(tmp_path / "out") as partial:
                write(partial / str(i))
        assert names(tmp_path) == ["source"], i


def small_files(most: int) -> _SmallFiles:
    return _SmallFiles(most)


class _SmallFiles:
    """Lets this process write no file longer than so many bytes."""

    def __init__(self, most: int) -> None:
        self._most = most

    def __enter__(self) -> None:
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self._most, self._before[1]))

    def __exit__(self, *_: object) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)


def test_the_place_that_is_full_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {tmp_path / "cache": 10**9, tmp_path / "tmp": 0, tmp_path / "out": 10**9}
    for path in free:
        path.mkdir()
    usage = lambda path: shutil._ntuple_diskusage(1, 1, free.get(Path(path), 10**9))  # type: ignore[attr-defined]  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setattr(faults.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    places = [Place(tmp_path / name, name, f"change {name}") for name in ("cache", "out")]
    with writing_to(places[1]):
        found = storage_error(ENOSPC, places[:1])
    assert found is not None
    assert found.message.startswith(f"cannot write temporary files to {tmp_path / 'tmp'}: no space left")
    assert "TMPDIR" in str(found.hint)


def test_errors_about_something_else_pass(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="other"), disk.replacing(tmp_path / "out"):
        (tmp_path / "other").read_text()
    with pytest.raises(ValueError, match="28"), disk.replacing(tmp_path / "out"):
        raise ValueError("28")
    assert storage_error(PermissionError(errno.EACCES, "Permission denied", "/elsewhere/file")) is None, "it was read"


def test_no_folder_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/x', '/tmp']")

    monkeypatch.setattr(faults.tempfile, "gettempdir", nowhere)
    with pytest.raises(StorageError, match="there is no folder for temporary files: No usable") as caught:
        with disk.scratch():
            pass
    assert "TMPDIR" in str(caught.value.hint)


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    yield folder
    folder.chmod(0o700)


def test_output_that_may_not_be_written_is_said_before_anything_is_done(
    locked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.access(locked, os.W_OK):  # root may write anywhere

        def refuse(**_: object) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", str(locked / "x"))

        monkeypatch.setattr(disk.tempfile, "TemporaryFile", refuse)
    with pytest.raises(StorageError, match=re.escape(f"cannot write to {locked}: permission denied")) as caught:
        check_writable(locked / "bundle")
    assert "-o" in str(caught.value.hint)


def test_other_folders_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(BundleError, match="exists and is not a bundle"), writing(tmp_path / "mine"):
        pass


def test_temporary_folders_are_made_in_one_place() -> None:
    """Where else they are made, a killed process leaves them and a full disk is a traceback."""
    folders = [REPOSITORY / name for name in ("src/fewstep", "export", "calibration", "optimize", "runtimes")]
    files = {path.resolve() for folder in folders for path in folder.rglob("*.py")}
    assert len(files) > 100
    made = re.compile(r"\b(TemporaryDirectory|mkdtemp|NamedTemporaryFile)\(")
    found = {path.relative_to(REPOSITORY).as_posix() for path in files if made.search(path.read_text())}
    # The untouched pipeline imports nothing of fewstep; its folder is inside one that fewstep made.
    assert found == {"src/fewstep/disk.py", "src/fewstep/untouched/__main__.py"}
