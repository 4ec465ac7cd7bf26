"""An ARM64 Linux in a folder: QEMU, Debian's Python and libraries, and wheels. Prepared once, without root.

Nothing of it is installed on this machine. Downloads are kept until they are unpacked, so that preparing goes on where
it was interrupted; a part that is there is whole, because parts appear by rename.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from fewstep.cache import cache_place, default_root
from fewstep.disk import replacing
from fewstep.errors import RuntimeMissingError
from fewstep.hashing import file_sha256
from fewstep.progress import Progress
from fewstep.runtimes.executors.deb_packages import MIRROR, Mirror, unpack

DOWNLOAD_MB = 90
_PYTHON = "3.11"
_QEMU = "qemu-aarch64-static"
_RECORD = "environment.json"
# Python without what it opens windows and sockets with, and the libraries that wheels link to.
_PACKAGES = (
    "python3.11-minimal",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "libc6",
    "zlib1g",
    "libexpat1",
    "libssl3",
    "libffi8",
    "libbz2-1.0",
    "liblzma5",
    "libstdc++6",
    "libgcc-s1",
    "libgomp1",
)
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux2014_aarch64")


@dataclass(frozen=True)
class Cpu:
    """A processor: what QEMU emulates, and how it is described to programs.

    Runtimes choose kernels by the description in ``/proc/cpuinfo``, which QEMU does not make: the two must match, or
    instructions are used that QEMU's processor does not have.
    """

    name: str
    emulated: str
    """QEMU's name."""
    part: int
    """Arm's number of the design."""
    features: tuple[str, ...]
    implementer: int = 0x41

    def description(self) -> str:
        """Returns the text of ``/proc/cpuinfo``."""
        lines = {
            "processor": "0",
            "BogoMIPS": "100.00",
            "Features": " ".join(self.features),
            "CPU implementer": f"{self.implementer:#04x}",
            "CPU architecture": "8",
            "CPU variant": "0x4",
            "CPU part": f"{self.part:#05x}",
            "CPU revision": "1",
        }
        return "".join(f"{key}\t: {value}\n" for key, value in lines.items()) + "\n"


# What QEMU 7.2 reports of its cortex-a76 (AT_HWCAP): a big core of the phones of 2019, with dot products of bytes.
A76 = Cpu(
    "Cortex-A76",
    "cortex-a76",
    0xD0B,
    tuple("fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp".split()),
)


@dataclass(frozen=True)
class Environment:
    """A prepared environment.

    Attributes:
        folder: with ``root`` and what describes it.
        qemu: the emulator.
        qemu_version: for people.
        site: folder of wheels.
    """

    folder: Path
    qemu: Path
    qemu_version: str
    site: Path

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables of a process in it; nothing is taken from this machine's."""
        return {"PYTHONHOME": str(self.folder / "root" / "usr"), "PYTHONPATH": str(self.site), "OMP_NUM_THREADS": "1"}

    def argv(self, cpu: Cpu) -> tuple[str, ...]:
        """Returns how its Python is started on a processor."""
        root = self._described(cpu)
        python = root / "usr" / "bin" / f"python{_PYTHON}"
        return str(self.qemu), "-cpu", cpu.emulated, "-L", str(root), str(python), "-B"

    def _described(self, cpu: Cpu) -> Path:
        """Returns a root whose ``/proc/cpuinfo`` is of this processor: links to the one that all share."""
        shared, description = self.folder / "root", cpu.description()
        root = self.folder / f"{cpu.emulated}-{cpu.part:x}-{len(cpu.features)}"
        cpuinfo = root / "proc" / "cpuinfo"
        if not cpuinfo.is_file() or cpuinfo.read_text() != description:
            cpuinfo.parent.mkdir(parents=True, exist_ok=True)
            for name in ("etc", "lib", "usr"):
                if not (root / name).is_symlink():
                    (root / name).symlink_to(shared / name)
            cpuinfo.write_text(description)
        return root


def environment_folder() -> Path:
    """Returns where the environment is, or will be."""
    return default_root() / "arm64" / Mirror().suite


def is_prepared() -> bool:
    """Returns whether the part that all runtimes share is there."""
    return (environment_folder() / _RECORD).is_file()


def prepare(wheels: Mapping[str, str], progress: Progress) -> Environment:
    """Returns an environment with wheels of these versions, prepared now or before.

    Args:
        wheels: versions by package.
        progress: told of every package.

    Raises:
        RuntimeMissingError: no network, no mirror, a hash that is wrong, no pip, or no such wheels.
    """
    folder = environment_folder()
    if not is_prepared():
        _prepare_root(folder, progress)
    record = json.loads((folder / _RECORD).read_text())
    qemu = Path(record["qemu"]["path"])
    if not qemu.is_file() or file_sha256(qemu) != record["qemu"]["sha256"]:
        raise RuntimeMissingError(
            f"{qemu} is not what {folder / _RECORD} says", hint=f"delete {folder}: it will be prepared again"
        )
    name = "-".join(f"{package}-{version}" for package, version in sorted(wheels.items()))
    site = folder / "wheels" / name
    if not site.is_dir():
        advance = progress.task(f"fetch {name} for ARM64", 1)
        _install(wheels, site)
        advance()
    return Environment(folder, qemu, record["qemu"]["version"], site)


def _prepare_root(folder: Path, progress: Progress) -> None:
    mirror = Mirror(os.environ.get("FEWSTEP_DEBIAN_MIRROR", MIRROR).rstrip("/"))
    downloads = folder.parent / "downloads"
    own = system_qemu()
    advance = progress.task("prepare ARM64 (once)", len(_PACKAGES) + (2 if own is None else 1))
    release, signed = mirror.release()
    index = mirror.index(release, "arm64")
    advance()
    with _whole(folder) as partial:
        record: dict[str, object] = {"mirror": mirror.url, "signature checked": signed}
        versions = {}
        for name in _PACKAGES:
            unpack(mirror.fetch(index[name], downloads), partial / "root")
            versions[name] = index[name].version
            advance()
        qemu, path = own, own
        if qemu is None:
            package = mirror.index(release, "amd64")["qemu-user-static"]
            unpack(mirror.fetch(package, downloads), partial, [f"usr/bin/{_QEMU}"])
            qemu, path = partial / "usr" / "bin" / _QEMU, folder / "usr" / "bin" / _QEMU
            advance()
        record["qemu"] = {"path": str(path), "version": _version(qemu), "sha256": file_sha256(qemu)}
        (partial / _RECORD).write_text(json.dumps({**record, "packages": versions}, indent=1))
    shutil.rmtree(downloads)


def system_qemu() -> Path | None:
    """Returns the system's own emulator if it knows the processor, None otherwise."""
    for name in (_QEMU, "qemu-aarch64"):
        found = shutil.which(name)
        if found is not None:
            known = subprocess.run([found, "-cpu", "help"], capture_output=True, text=True, check=False).stdout
            if A76.emulated in known.split():
                return Path(found)
    return None


def _version(qemu: Path) -> str:
    said = subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True).stdout
    return f"QEMU {said.split('version', 1)[1].split()[0]}"


def _install(wheels: Mapping[str, str], site: Path) -> None:
    """Installs ARM64 wheels into a folder; pip checks each against the hash of the package index."""
    if util.find_spec("pip") is None:
        raise RuntimeMissingError("pip is not installed, and fetches the ARM64 wheels", hint="python -m ensurepip")
    site.parent.mkdir(parents=True, exist_ok=True)
    with _whole(site) as partial:
        wanted = [f"{package}=={version}" for package, version in wheels.items()]
        done = _pip([*wanted, "numpy"], partial)
        if done.returncode != 0:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            why = said[0] if said else done.stderr[-200:]
            raise RuntimeMissingError(
                f"no ARM64 wheel of {', '.join(wanted)} for Python {_PYTHON}: {why}",
                hint="connect to the network, or install a version here that has ARM64 wheels",
            )


def _pip(packages: Sequence[str], target: Path) -> subprocess.CompletedProcess[str]:
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--python-version", _PYTHON, "--implementation", "cp"]
    options += ["--abi", f"cp{_PYTHON.replace('.', '')}", "--target", str(target)]
    for name in _PLATFORMS:
        options += ["--platform", name]
    argv = [sys.executable, "-m", "pip", "install", *options, *packages]
    return subprocess.run(argv, capture_output=True, text=True, check=False)


@contextmanager
def _whole(folder: Path) -> Iterator[Path]:
    """Yields a folder that takes its place when the block ends without an error."""
    with replacing(folder, what="what emulates ARM64", hint=cache_place().hint) as partial:
        yield partial
