"""Core ML packages to edit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fewstep.runtimes.coreml import runtime as coreml
from fewstep.runtimes.coreml.compile.lower import quiet_coremltools

with quiet_coremltools() as ct:
    pass

SPECIFICATION = "Data/com.apple.CoreML/model.mlmodel"

WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"


def faulty(package: Path, tmp_path: Path) -> Path:
    copy = tmp_path / package.parent.name
    for file in (f for f in package.parent.rglob("*") if f.is_file()):
        target = copy / file.relative_to(package.parent)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    return copy / coreml.ENTRY


def change(package: Path, edit: Callable[[Any], None]) -> None:
    """Edits the operations of a package with coremltools' own protobuf classes."""
    model = ct.proto.Model_pb2.Model()
    path = package.parent / SPECIFICATION
    model.ParseFromString(path.read_bytes())
    function = model.mlProgram.functions["main"]
    edit(function.block_specializations[function.opset].operations)
    path.write_bytes(model.SerializeToString())
