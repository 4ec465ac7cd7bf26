"""Each peer's own environment: other versions of the same packages than ours, pinned, made when they are needed."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path

from fewstep.errors import RuntimeMissingError
from fewstep.hashing import file_sha256

ROOT = Path("build/quant/environments")
CONSTRAINTS = Path(__file__).parent / "peers" / "constraints"
REQUIREMENTS: Mapping[str, tuple[str, ...]] = {
    "ort": ("onnxruntime", "onnx", "sympy"),  # sympy: symbolic shapes of quant_pre_process
    "nncf": ("torch", "nncf", "onnxruntime", "onnx"),
    "olive": ("torch", "olive-ai", "onnxruntime", "onnx", "requests", "huggingface_hub"),  # the last two undeclared
    "modelopt": ("torch", "nvidia-modelopt[onnx,hf]", "requests"),  # the last undeclared
}


def constraints_file(name: str) -> Path:
    """Returns the file that pins every package of an environment."""
    return CONSTRAINTS / f"{name}.txt"


def ensure(name: str) -> Path:
    """Returns the Python of a peer's environment, made unless one with the same pins is there.

    Raises:
        RuntimeMissingError: pip cannot install what is pinned.
    """
    folder = (ROOT / name).resolve()
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    pins = constraints_file(name)
    stamp, wanted = folder / "constraints.sha256", file_sha256(pins)
    if stamp.is_file() and stamp.read_text() == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    command = [str(python), "-m", "pip", "install", "--quiet", "--progress-bar", "off", "-c", str(pins)]
    done = subprocess.run([*command, *REQUIREMENTS[name]], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeMissingError(
            f"the environment of {name} cannot be made: {_last_line(done.stderr)}",
            hint=f"pip could not install {pins}; it needs PyPI",
        )
    stamp.write_text(wanted)
    return python


def _last_line(text: str) -> str:
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no message")
