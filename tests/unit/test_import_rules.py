"""The stage folders are sub-packages of fewstep, none hides another module, and bundles run without torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGE = REPOSITORY / "src" / "fewstep"
STAGES = ("export", "calibration", "optimize", "runtimes")
LINKS = {**{stage: f"../../{stage}" for stage in STAGES}, "stickers": "../../apps/stickers"}
COMPILE_TIME = re.compile(
    r"fewstep\.runtimes\.("
    r"\w+\.(compile|debug)\..*|passes\..*|pytorch\..*|"
    r"parity\.(divergence|quantized_reference)|executorch\.session)"
)
"""Modules that only `fewstep[compile]` can import; `generate`, `profile` and `inspect` do without them."""
HEAVY = (
    "torch",
    "torchao",
    "diffusers",
    "transformers",
    "accelerate",
    "ai_edge_litert",
    "executorch",
    "litert_torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "scipy",
)


@pytest.mark.parametrize("name", LINKS)
def test_stage_folder_is_linked_into_the_package(name: str) -> None:
    link = PACKAGE / name
    assert link.is_symlink(), (
        f"src/fewstep/{name} is a text file, expected a link to {LINKS[name]}: git on Windows writes links so.\n"
        "hint: turn on Developer Mode, then `git config core.symlinks true` and `git checkout -- src/fewstep`"
    )
    assert link.readlink().as_posix() == LINKS[name]
    assert (link / "__init__.py").is_file()


def test_no_other_links() -> None:
    folders = [PACKAGE, *((PACKAGE / name).resolve() for name in LINKS)]
    links = {
        path.relative_to(REPOSITORY).as_posix() for folder in folders for path in folder.rglob("*") if path.is_symlink()
    }
    assert links == {f"src/fewstep/{name}" for name in LINKS}, "a link to elsewhere is broken in a clone and in a wheel"


def declared_names() -> set[str]:
    """Returns the import names of all dependencies in pyproject.toml, and of the backends that are not there yet."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.match(r"[\w-]+", text)[0].replace("-", "_") for group in groups for text in group}  # type: ignore[index]
    return names | {"PIL", "torchao", "tensorrt", "coremltools", "executorch", "optimum", "openvino"}


@pytest.mark.parametrize("name", LINKS)
def test_no_module_is_named_like_a_dependency(name: str) -> None:
    taken = declared_names() | set(sys.stdlib_module_names)
    modules = {path.stem for path in (PACKAGE / name).resolve().glob("*.py")} - {"__init__", "__main__"}
    assert not modules & taken, (
        f"{LINKS[name].removeprefix('../../')} has modules named like a dependency or a module of Python: "
        f"{sorted(modules & taken)}; a file run from that folder would import them in its place"
    )


def test_no_test_imports_another() -> None:
    importing = re.compile(r"^ *(?:from|import) tests\.[\w.]*\btest_\w+", re.M)
    files = (REPOSITORY / "tests").rglob("*.py")
    found = [path.relative_to(REPOSITORY).as_posix() for path in files if importing.search(path.read_text("utf-8"))]
    assert not found, "what tests share is in tests/support"


def test_folders_are_small_and_say_what_they_hold() -> None:
    tops = [REPOSITORY / name for name in ("src/fewstep", "tests", *STAGES)]
    folders = sorted({path.parent for top in tops for path in top.rglob("__init__.py")})
    crowded = {f.relative_to(REPOSITORY).as_posix() for f in folders if len(list(f.glob("*.py"))) > 19}  # with __init__
    assert not crowded, "split the folder"
    silent = [f for f in folders if not (f / "__init__.py").read_text("utf-8").startswith('"""')]
    assert not silent, "the docstring of a folder says what lives there"


def python(code: str, *arguments: str) -> object:
    """Returns what ``code`` prints as JSON, run in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_root_package_hides_no_stage() -> None:
    code = "import fewstep, json, sys; print(json.dumps([callable(getattr(fewstep, n, None)) for n in sys.argv[1:]]))"
    hidden = python(code, *STAGES)
    assert hidden == [False] * len(STAGES), "a function of fewstep/__init__.py hides the stage of its name"


def test_no_name_of_a_package_hides_a_folder_in_it() -> None:
    folders = sorted({path.parent for path in (PACKAGE / "runtimes").resolve().rglob("__init__.py")})
    parts = [folder.relative_to(REPOSITORY).parts for folder in folders]
    names = [".".join(("fewstep", *part)) for part in parts if part != ("runtimes",)]
    code = """
import importlib, json, sys
importlib.import_module("fewstep.runtimes")
pairs = [(name.rpartition("."), importlib.import_module(name)) for name in sys.argv[1:]]
print(json.dumps([m.__name__ for (parent, _, leaf), m in pairs if getattr(sys.modules[parent], leaf) is not m]))
"""
    assert len(names) > 10
    assert python(code, *names) == []


@pytest.mark.parametrize("module", ["fewstep", "fewstep.cli", "fewstep.bundle.bundle"])
def test_import_is_light(module: str) -> None:
    code = "import importlib, json, sys; importlib.import_module(sys.argv[1]); print(json.dumps(sorted(sys.modules)))"
    loaded = python(code, module)
    assert isinstance(loaded, list)
    found = sorted(set(loaded) & set(HEAVY))
    assert not found, f"import {module} loads {found}: import them where they are used"


def modules_to_run() -> list[str]:
    """Returns every module that takes part in running a bundle."""
    light = ("bundle", "cli", "numerics", "pipeline", "proof", "recipe", "report", "runtimes", "text")
    folders = [PACKAGE / name for name in light]
    files = [
        *PACKAGE.glob("*.py"),
        *(folder / path.relative_to(folder.resolve()) for folder in folders for path in folder.resolve().rglob("*.py")),
    ]
    names = {
        ".".join(("fewstep", *f.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__") for f in files
    }
    return sorted(name for name in names if not COMPILE_TIME.fullmatch(name))


def test_bundles_run_without_torch() -> None:
    code = """
import importlib, json, sys
names, blocked = json.loads(sys.argv[1]), json.loads(sys.argv[2])
sys.modules.update(dict.fromkeys(blocked))  # None makes import raise ModuleNotFoundError
failures = {}
for name in names:
    try:
        importlib.import_module(name)
    except ImportError as error:
        failures[name] = str(error)
print(json.dumps(failures))
"""
    names = modules_to_run()
    assert len(names) > 5
    assert python(code, json.dumps(names), json.dumps(HEAVY)) == {}
