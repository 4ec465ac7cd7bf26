"""Python's interface without a package that it needs: a sentence with what to install, and nothing half-written."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fewstep
from fewstep.errors import RuntimeMissingError
from fewstep.faults import naming_packages
from tests.support.bundles import built

ROOT = Path(__file__).parents[1]
# Every public function that needs PyTorch, and those that need a bundle's runtime (`profile` asks another process).
NEED_TORCH = {
    "build": "fewstep.build('stickers', out=out)",
    "verify": "fewstep.verify(bundle, against='stickers')",
    "inspect": "stages.inspect('stickers')",
    "export": "stages.export('stickers', out, steps=None, guidance=None, progress=Silent())",
    "calibrate": "stages.calibrate('stickers', out, prompts='', seeds=1, seed=0, sampler='', **NONE, **SILENT)",
    "optimize": "stages.optimize('stickers', out, recipe='w8a8', progress=Silent())",
    "self_test": "selftest.self_test('onnxruntime')",
}
NEED_RUNTIME = {
    "generate": "bundle.generate('red apple')",
    "generate_batch": "bundle.generate_batch(['red apple'], [7])",
    "verify": "fewstep.verify(bundle)",
    "draw": "stages.draw(bundle, ['a'], [7], inputs=[{}], negative=None, runtime=None, **NONE, progress=Silent())",
    "loop": "stages.loop(bundle, out, steps=None, runtime=None, progress=Silent())",
}
_CODE = """
import json, sys
from pathlib import Path
package, path, out, calls = sys.argv[1], sys.argv[2], Path(sys.argv[3]), json.loads(sys.argv[4])
sys.modules[package] = None
NONE = {"steps": None, "guidance": None}
import fewstep
from fewstep.pipeline import selftest, stages
from fewstep.progress import Silent
SILENT = {"progress": Silent()}
bundle = fewstep.Bundle.open(path)
said = {}
for name, call in calls.items():
    try:
        eval(call)
        said[name] = "returned"
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"
    if out.exists():
        said[name] += "; wrote something"
print(json.dumps(said))
"""


@pytest.mark.parametrize(
    ("package", "extra", "calls"),
    [("torch", "compile", NEED_TORCH), ("onnxruntime", "onnxruntime", NEED_RUNTIME)],
    ids=["torch", "onnxruntime"],
)
def test_public_functions_name_what_to_install(
    package: str, extra: str, calls: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    arguments = (package, str(built("lcm").bundle.path), str(tmp_path / "out"), json.dumps(calls))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _CODE, *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.stdout, done.stderr
    for name, said in json.loads(done.stdout.splitlines()[-1]).items():
        assert said.startswith("RuntimeMissingError: "), (name, said)
        assert package in said and f"hint: pip install 'fewstep[{extra}]'" in said, (name, said)
        assert "wrote" not in said, (name, said)


def test_what_is_not_of_a_package_stays_as_it_is() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_part"), naming_packages():
        raise ModuleNotFoundError("No module named 'fewstep.no_such_part'", name="fewstep.no_such_part")
    with pytest.raises(RuntimeMissingError, match="elsewhere is not installed"), naming_packages():
        raise ModuleNotFoundError("No module named 'elsewhere'", name="elsewhere")


def test_functions_are_what_they_were() -> None:
    assert fewstep.build.__name__ == "build" and "ParityError" in str(fewstep.build.__doc__)
