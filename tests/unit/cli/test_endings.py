"""How the command ends: bugs, missing packages, full disks and signals are a sentence each, with their own status."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fewstep import cli, faults
from fewstep.cli import endings, stages

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Runs ``fewstep inspect`` with what it calls replaced, and returns status, stdout and stderr."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(faults.tempfile, "tempdir", str(tmp_path))

    def call(failure: BaseException | Callable[[], object], *options: str) -> tuple[int, str, str]:
        def inspect(_: object) -> object:
            if isinstance(failure, BaseException):
                raise failure
            return failure()

        monkeypatch.setattr(stages.stages, "inspect", inspect)
        monkeypatch.setattr(sys, "argv", ["fewstep", "inspect", "x", *options])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capfd.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return call


def test_a_bug_is_a_sentence_and_a_file_with_the_traceback(run: Run, tmp_path: Path) -> None:
    status, out, err = run(KeyError("unet"), "--json")
    assert (status, out) == (endings.BUG, "")
    assert "Traceback" not in err
    found = re.fullmatch(r"error: KeyError: 'unet'\n\nhint: this is a bug, the traceback is in (\S+)\n", err)
    assert found is not None, err
    text = Path(found[1]).read_text()
    assert text.startswith("fewstep inspect x --json\n")
    assert "Traceback (most recent call last)" in text and "KeyError: 'unet'" in text
    assert Path(found[1]).parent == tmp_path


def test_a_bug_where_no_file_can_be_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(endings.tempfile, "mkstemp", full)
    status, _, err = run(RecursionError("too deep"))
    assert status == endings.BUG
    assert "there was no room for a file" in err and "Traceback" in err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/full/x.bin"), "cannot write /full/x.bin: no space left"),
        (PermissionError(errno.EACCES, "Permission denied", "/secret/x"), "/secret/x: Permission denied"),
        (ConnectionError("no route to huggingface.co"), "no route to huggingface.co"),
        (MemoryError("Unable to allocate 1.9 TiB"), "there is not enough memory: Unable to allocate 1.9 TiB"),
        (RuntimeError("[...] DefaultCPUAllocator: can't allocate memory: you tried"), "there is not enough memory"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "torch is not installed, and this needs it"),
        (ImportError("cannot import name 'x' from 'onnx'", name="onnx"), "onnx cannot be imported: cannot import name"),
    ],
    ids=["full", "forbidden", "network", "memory", "memory-torch", "missing", "broken"],
)
def test_what_is_not_a_bug_is_status_2_with_a_hint(run: Run, error: Exception, said: str) -> None:
    status, out, err = run(error)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {said}")
    assert err.count("\n\nhint: ") == 1
    assert "bug" not in err


def test_an_import_of_fewstep_itself_that_fails_is_a_bug(run: Run) -> None:
    assert run(ModuleNotFoundError("No module named 'fewstep.nothing'", name="fewstep.nothing"))[0] == endings.BUG


def test_reader_that_goes_away_is_no_parity_failure(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", sys.stdout)  # put back
    assert run(BrokenPipeError(errno.EPIPE, "Broken pipe"))[0] == 128 + 13


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_one_line(run: Run, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    status, out, err = run(lambda: signal.raise_signal(number))
    assert (status, out, err) == (128 + number, "", f"{endings.INTERRUPTED}\n")
    assert signal.getsignal(number) == before


def test_what_a_library_makes_of_a_signal_is_still_the_signal(run: Run) -> None:
    def wraps() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise RuntimeError("the worker died") from error

    assert run(wraps)[0] == 128 + signal.SIGTERM


EXTRAS = {
    "torch": "compile",
    "diffusers": "compile",
    "torchao": "compile",
    "onnxscript": "compile",
    "onnxruntime": "onnxruntime",
    "coremltools": "coreml",
    "ai_edge_litert": "litert",
    "executorch": "executorch",
    "tensorrt": "tensorrt",
    "fontTools": "stickers",
    "numpy": None,
    "nothing": None,
}


@pytest.mark.parametrize("module", EXTRAS)
def test_extras_of_packages(module: str) -> None:
    assert faults.extra_of(module) == EXTRAS[module]


def fewstep(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in a fresh interpreter, after some code."""
    text = f"{code}\nfrom fewstep_command import main; main()"
    return subprocess.run(
        [sys.executable, "-c", text, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    "arguments",
    [("build", "stickers", "-o", "out"), ("inspect", "stickers"), ("optimize", "stickers", "-o", "out")],
    ids=["build", "inspect", "optimize"],
)
def test_without_torch_the_extra_is_named(arguments: tuple[str, ...], tmp_path: Path) -> None:
    code = f"import os, sys; os.chdir({str(tmp_path)!r}); sys.modules['torch'] = None"
    done = fewstep(code, *arguments, FEWSTEP_CACHE=str(tmp_path / "cache"))
    assert done.returncode == 2
    # What a target needs is looked at first.
    said = "cannot compile without torch" if arguments[0] == "build" else "torch is not installed, and this needs it"
    assert f"{said}\n\nhint: pip install 'fewstep[compile]'\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


# Raises a signal in this process at the moment when a module is first looked for.
_AT_IMPORT = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(finder)
            signal.raise_signal(signal.{number})
finder = Finder()
sys.meta_path.insert(0, finder)
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("module", ["fewstep", "numpy", "rich.console", "fewstep.cli.bundles"])
def test_a_signal_during_imports_is_one_line(module: str, number: str) -> None:
    done = fewstep(_AT_IMPORT.format(module=module, number=number), "runtimes")
    assert done.returncode == 128 + getattr(signal, number)
    assert done.stderr == "interrupted; nothing was written\n"


def test_a_signal_that_python_would_drop_ends_the_command(tmp_path: Path) -> None:
    code = f"""
import json, signal, weakref
from fewstep.pipeline import stages
class Thing: pass
def inspect(_):
    from pathlib import Path
    from fewstep.disk import replacing
    with replacing(Path({str(tmp_path / "out")!r})):
        thing = Thing()
        kept = weakref.ref(thing, lambda _: signal.raise_signal(signal.SIGINT))
        del thing
        while True: pass
stages.inspect = inspect
"""
    done = fewstep(code, "inspect", "x")
    assert (done.returncode, done.stderr) == (130, f"{endings.INTERRUPTED}\n")
    assert list(tmp_path.iterdir()) == []


def test_cache_is_shown_verified_and_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    from fewstep.cache import StageCache
    from fewstep.errors import StorageError

    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    with monkeypatch.context():
        cache = StageCache()
        entries = [cache.get_or_make("stage", {"n": n}, lambda at: (at / "x").write_text("abc"))[0] for n in range(3)]
    runner = CliRunner()
    shown = json.loads(runner.invoke(cli.cli, ["cache", "--json"]).stdout)
    assert shown["stages"]["stage"]["entries"] == 3 and shown["limit"] == 64 * 10**9
    assert "stage" in runner.invoke(cli.cli, ["cache"]).stdout
    assert "3 of 3 entries are as they were written" in runner.invoke(cli.cli, ["cache", "verify"]).stdout
    (entries[1] / "x").write_text("abd")
    found = runner.invoke(cli.cli, ["cache", "verify"])
    assert f"damaged  {entries[1]}: x was altered" in found.stdout
    assert isinstance(found.exception, StorageError)
    assert "1 of 3 entries of the stage cache are damaged" in found.exception.message
    assert "say what to remove" in runner.invoke(cli.cli, ["cache", "prune"]).stderr
    assert "removed 0 entries" in runner.invoke(cli.cli, ["cache", "prune", "--all"]).stdout, "in use by this process"
    del cache
    assert "removed 1 entries" in runner.invoke(cli.cli, ["cache", "prune", "--damaged"]).stdout
    assert "removed 2 entries" in runner.invoke(cli.cli, ["cache", "prune", "--all"]).stdout


def test_no_folder_for_temporary_files_is_a_sentence_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/x']")

    with monkeypatch.context() as patch:  # pytest makes temporary files, too
        patch.setattr(faults.tempfile, "gettempdir", nowhere)
        status, _, err = run(OSError(errno.ENOSPC, "No space left on device"))
    assert status == 2
    assert "hint: set TMPDIR to a folder you can write" in err
