"""A source distribution and a wheel hold the whole package, and the project files agree with each other."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email import message_from_string
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "src" / "fewstep"
FOLDERS = ("src", "export", "calibration", "optimize", "runtimes", "apps/stickers", "licences")
FILES = ("pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE", "NOTICE", "constraints.txt")


def project() -> dict[str, Any]:
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]  # type: ignore[no-any-return]


def package_files() -> set[str]:
    """Returns what belongs to the package, as paths in a wheel: all but notes for developers and caches."""
    roots = {PACKAGE: "fewstep", PACKAGE.with_name("fewstep_command"): "fewstep_command"}
    roots |= {**{p.resolve(): f"fewstep/{p.name}" for p in PACKAGE.iterdir() if p.is_symlink()}}
    return {
        f"{name}/{path.relative_to(root).as_posix()}"
        for root, name in roots.items()
        for path in root.rglob("*")
        if path.is_file() and path.suffix not in {".md", ".pyc"}
    }


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Returns a source distribution and the wheel built from it (not from the tree), made from a copy."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for folder in FOLDERS:
        shutil.copytree(REPOSITORY / folder, copy / folder, symlinks=True, ignore=ignore)
    for file in FILES:
        shutil.copy(REPOSITORY / file, copy)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    return sdist, wheel


def test_sdist_holds_files_and_no_links(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as archive:
        members = archive.getmembers()
    assert [member.name for member in members if not (member.isfile() or member.isdir())] == []
    names = {member.name.partition("/src/")[2] for member in members if member.isfile()}
    assert package_files() <= names


def test_wheel_holds_the_whole_package(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        names = {name for name in archive.namelist() if not name.partition("/")[0].endswith(".dist-info")}
    missing = package_files() - names
    assert not missing, f"not in the wheel: {sorted(missing)}; name them in [tool.setuptools.package-data]"
    assert names == package_files()
    assert {f"fewstep/{name}/__init__.py" for name in ("export", "calibration", "optimize", "runtimes")} <= names


def test_wheel_has_the_command_and_the_licences(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        info = next(name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name)
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
        metadata = message_from_string(archive.read(f"{info}/METADATA").decode())
    assert "fewstep = fewstep_command:main" in entry_points
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"LICENSE", "NOTICE", "licences/OFL-1.1.txt"} <= set(metadata.get_all("License-File", []))


def test_installed_wheel_imports(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        archive.extractall(tmp_path)
    code = "import fewstep.cli, fewstep.runtimes; print(fewstep.__file__); print(fewstep.runtimes.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd="/",
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    installed = tmp_path / "fewstep"
    assert done.stdout.splitlines() == [str(installed / "__init__.py"), str(installed / "runtimes" / "__init__.py")]


def test_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()


def test_changelog_begins_with_this_version() -> None:
    headings = [line for line in (REPOSITORY / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[0].startswith(f"## [{project()['version']}]")


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-interop.txt"])
def test_constraints_pin_every_dependency(name: str) -> None:
    lines = [line for line in (REPOSITORY / name).read_text().splitlines() if line and not line.startswith("#")]
    pins = {canonicalize_name(pin): version for pin, _, version in (line.partition("==") for line in lines)}
    extras = project()["optional-dependencies"]
    wanted = [
        *project()["dependencies"],
        *extras["onnxruntime"],
        "optimum-onnx==0.1.0",
        "hypothesis",
        "pytest",
        "torch",
    ]
    if name == "constraints.txt":
        # An engine's libraries are the business of the machine with the GPU; the others have constraints of their own.
        apart = ("tensorrt", "litert", "executorch")
        groups = [group for extra, group in extras.items() if extra not in apart]
        wanted = [*project()["dependencies"], *(text for group in groups for text in group)]
    for requirement in map(Requirement, wanted):
        if requirement.name != "fewstep":
            pin = pins.get(canonicalize_name(requirement.name))
            assert pin is not None, f"{name} does not pin {requirement.name}"
            assert requirement.specifier.contains(pin), f"{name} pins {requirement.name} {pin}, expected {requirement}"
