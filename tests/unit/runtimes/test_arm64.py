"""ARM64: what is said where it cannot be, and, where it is prepared, that it finds what is wrong."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fewstep.errors import RuntimeMissingError
from fewstep.progress import Silent
from fewstep.runtimes.coreml import runtime as coreml
from fewstep.runtimes.executors import arm64, arm64_environment
from fewstep.runtimes.executors.arm64_environment import A76, Environment, is_prepared, prepare
from fewstep.runtimes.executors.remote import Guest
from fewstep.runtimes.onnxruntime import runtime as ort
from tests.support.bundles import plain
from tests.support.quantized import painted

# `fewstep verify BUNDLE --executor arm64` prepares it once; a test fetches nothing.
emulated = pytest.mark.skipif(
    not (arm64.can_emulate() and is_prepared()), reason="ARM64 is not prepared: fewstep verify --executor arm64"
)


def test_on_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert not arm64.state().ready
    with (
        pytest.raises(RuntimeMissingError, match="emulated on Linux on x86-64 only, and this is Linux on riscv64"),
        arm64.at(ort.RUNTIME, Silent()),
    ):
        pass


@pytest.mark.parametrize("machine", ["aarch64", "arm64"])
def test_on_an_arm64_machine_it_runs_natively(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    assert "not emulated" in arm64.state().detail
    with arm64.at(ort.RUNTIME, Silent()) as there:
        assert there.open is ort.RUNTIME.open
        assert there.executor is not None and "natively" in there.executor()


def test_a_runtime_without_arm64_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    with (
        pytest.raises(RuntimeMissingError, match="coreml cannot be run on emulated ARM64, expected one of onnx"),
        arm64.at(coreml.RUNTIME, Silent()),
    ):
        pass


def test_no_mirror(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    monkeypatch.setenv("FEWSTEP_DEBIAN_MIRROR", "http://127.0.0.1:9")
    assert not is_prepared()
    with pytest.raises(RuntimeMissingError, match=r"cannot fetch http://127\.0\.0\.1:9/dists/bookworm") as caught:
        prepare({"onnxruntime": "1.0"}, Silent())
    assert "what is fetched already is kept" in str(caught.value.hint)
    assert not is_prepared()


def test_wheels_that_do_not_exist(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    said = "ERROR: No matching distribution found for onnxruntime==0.0.1"
    done = subprocess.CompletedProcess([], 1, "", f"note\n{said}\n")
    monkeypatch.setattr(arm64_environment, "_pip", lambda packages, target: done)
    with pytest.raises(RuntimeMissingError, match=r"no ARM64 wheel of onnxruntime==0\.0\.1 .*No matching") as caught:
        arm64_environment._install({"onnxruntime": "0.0.1"}, tmp_path / "site")
    assert "install a version here that has ARM64 wheels" in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == [], "nothing half is left"


def test_a_changed_emulator_is_not_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    folder = arm64_environment.environment_folder()
    folder.mkdir(parents=True)
    (folder / "qemu").write_bytes(b"changed")
    record = f'{{"qemu": {{"path": "{folder / "qemu"}", "version": "QEMU 7", "sha256": "00"}}}}'
    (folder / "environment.json").write_text(record)
    with pytest.raises(RuntimeMissingError, match=r"qemu is not what .*environment\.json says"):
        prepare({"onnxruntime": "1.0"}, Silent())


def test_a_processor_is_described_as_it_is_emulated(tmp_path: Path) -> None:
    environment = Environment(tmp_path, tmp_path / "qemu", "QEMU 7", tmp_path / "site")
    argv = environment.argv(A76)
    root = Path(argv[argv.index("-L") + 1])
    text = (root / "proc" / "cpuinfo").read_text()
    assert "CPU part\t: 0xd0b" in text and "asimddp" in text
    assert argv[argv.index("-cpu") + 1] == "cortex-a76"
    other = environment.argv(replace(A76, features=("fp", "asimd")))
    assert other != argv, "another description has a root of its own"
    assert set(environment.variables) == {"PYTHONHOME", "PYTHONPATH", "OMP_NUM_THREADS"}, "nothing of this machine's"


@pytest.fixture
def environment() -> Environment:
    from importlib import metadata

    return prepare({"onnxruntime": metadata.version("onnxruntime")}, Silent())


@emulated
@pytest.mark.slow
def test_arm64_computes_what_this_machine_does(environment: Environment) -> None:
    from fewstep.pipeline.replay import replay

    found = replay(plain(), "arm64", minutes=2)
    assert found.report, found.report.failures
    assert "emulated ARM64 (QEMU" in found.report.executor


@emulated
@pytest.mark.slow
def test_a_processor_that_is_described_wrongly_is_named(environment: Environment) -> None:
    """Dot products of bytes are described, and the processor has none: whole numbers meet an illegal instruction."""
    bundle = painted("w8a8").bundle
    (component,) = (c for c in bundle.manifest.components if c == "denoiser")
    path = bundle.file(bundle.manifest.artifact("onnxruntime", component).path)
    guest = Guest(arm64.launch(environment, replace(A76, emulated="cortex-a72")), "onnxruntime")
    try:
        number = guest.open(path, 1)
        inputs = {s.name: np.ones(s.shape, s.dtype) for s in bundle.manifest.components[component].inputs}
        with pytest.raises(RuntimeMissingError, match=r"emulated ARM64 .* ended by SIGILL") as caught:
            guest.run(number, inputs, None, path)
        assert "an instruction that cortex-a72 does not have" in str(caught.value.hint)
        assert "asimddp" in str(caught.value.hint)
    finally:
        guest.close()
