"""Edits of bundles on disk that no hash shows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from safetensors import safe_open
from safetensors.numpy import save_file

from fewstep.bundle.bundle import MANIFEST, write_manifest
from fewstep.bundle.manifest import Manifest
from fewstep.errors import FewstepError
from fewstep.runtimes.parity.stored_integers import digest

Array = np.ndarray[Any, Any]
Values = dict[str, Any]
Model = Callable[[ir.Model], object]


@dataclass(frozen=True)
class Folder:
    """A bundle's folder whose files may be changed."""

    path: Path

    def manifest(self, edit: Callable[[Values], object]) -> None:
        """Changes the manifest; values that no manifest may have are written as they are."""
        path = self.path / MANIFEST
        values = json.loads(path.read_text(encoding="utf-8"))
        edit(values)
        path.write_text(json.dumps(values), encoding="utf-8")

    def rehash(self) -> None:
        """Writes the hashes of all files anew."""
        path = self.path / MANIFEST
        values = json.loads(path.read_text(encoding="utf-8"))
        try:
            manifest = Manifest.from_json(values, where="seeded")
        except FewstepError:
            return  # refused as soon as it is opened
        write_manifest(self.path, manifest)

    def artifact(self, component: str) -> Path:
        """Returns the path of a component's ONNX model."""
        values = json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))
        found = next(a for a in values["artifacts"] if a["component"] == component and not a["variant"])
        return self.path / str(found["path"])

    def onnx(self, component: str, edit: Model) -> None:
        """Changes a component's ONNX model."""
        path = self.artifact(component)
        model = ir.load(path)
        external = path.with_name(f"{path.name}.data").exists()
        for value in model.graph.initializers.values():  # before their file is written anew
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
        edit(model)
        ir.save(model, path, external_data=f"{path.name}.data" if external else None)

    def golden(self, index: int, edit: Callable[[dict[str, Array], Values], object]) -> None:
        """Changes a golden sample: its arrays and its head."""
        path = sorted((self.path / "golden").glob("*.safetensors"))[index]
        with safe_open(path, framework="numpy") as stream:
            head = json.loads(stream.metadata()["fewstep"])
            arrays = {name: stream.get_tensor(name).copy() for name in stream.keys()}  # no mapping
        edit(arrays, head)
        save_file(arrays, path, metadata={"fewstep": json.dumps(head)})

    def json(self, name: str, edit: Callable[[Any], object]) -> None:
        """Changes a JSON file."""
        path = self.path / name
        values = json.loads(path.read_text(encoding="utf-8"))
        edit(values)
        path.write_text(json.dumps(values), encoding="utf-8")


def initializer(model: ir.Model, *parts: str, like: Callable[[Array], bool] = lambda _: True) -> ir.Value:
    """Returns the first constant whose name has some parts, and whose values are of a kind."""
    for name, value in model.graph.initializers.items():
        if all(part in name for part in parts) and value.const_value is not None:
            if like(value.const_value.numpy()):
                return value
    raise LookupError(f"no constant of the model has {parts}")


def change(value: ir.Value, edit: Callable[[Array], Array]) -> None:
    """Changes the values of a constant."""
    assert value.const_value is not None
    before = value.const_value.numpy()
    value.const_value = ir.tensor(np.ascontiguousarray(edit(before.copy()).astype(before.dtype)), name=value.name)


def weight(*parts: str, edit: Callable[[Array], Array], like: Callable[[Array], bool] = lambda _: True) -> Model:
    """Returns an edit of the first constant with some parts in its name."""
    return lambda model: change(initializer(model, *parts, like=like), edit)


def swapped(array: Array) -> Array:
    """Returns a weight with two channels swapped, the first and the last."""
    array[[0, -1]] = array[[-1, 0]]
    return array


def products(model: ir.Model) -> list[ir.Node]:
    """Returns the nodes that multiply integers."""
    return [node for node in model.graph if node.op_type == "MatMulIntegerToFloat"]


def own(model: ir.Model, node: ir.Node, at: int, edit: Callable[[Array], Array]) -> None:
    """Changes a constant that a node reads, for this node alone."""
    value = node.inputs[at]
    assert value is not None and value.const_value is not None
    before = value.const_value.numpy()
    tensor = ir.tensor(edit(before.copy()).astype(before.dtype), name=f"{value.name}.seeded")
    fresh = ir.Value(name=tensor.name, type=value.type, shape=value.shape, const_value=tensor)
    model.graph.register_initializer(fresh)
    node.replace_input_with(at, fresh)


def half_of_plan(folder: Folder, component: str) -> None:
    """Halves one activation's scale in the plan, in the table of integers and in the model."""
    table = json.loads((folder.path / "quantization" / "integers.json").read_text())[component]
    grid = table["grids"][len(table["grids"]) // 2]

    def in_table(values: Any) -> None:
        for one in values[component]["grids"]:
            if one["name"] == grid["name"]:
                one["scale"] *= 0.5

    def in_plan(values: Any) -> None:
        for one in values["components"][component]["activations"].values():
            if abs(one["scale"] - grid["scale"]) <= 1e-9 * grid["scale"] and one["zero_point"] == grid["zero_point"]:
                one["scale"] *= 0.5

    def in_model(model: ir.Model) -> None:
        for value in model.graph.initializers.values():
            assert value.const_value is not None
            if value.const_value.dtype == ir.DataType.FLOAT and value.const_value.size == 1:
                if float(value.const_value.numpy().reshape(-1)[0]) == np.float32(grid["scale"]):
                    change(value, lambda scale: scale * np.float32(0.5))

    folder.json("quantization/integers.json", in_table)
    folder.json("quantization/plan.json", in_plan)
    folder.onnx(component, in_model)


def table_digest(values: Array) -> str:
    """Returns the hash that the table of integers has for values."""
    return digest(values)


def times(values: Mapping[str, Any], edit: Callable[[float], float]) -> Any:
    """Returns JSON with every time of the schedules and rows changed."""
    changed = json.loads(json.dumps(values))
    for table in changed["schedules"].values():
        table["timesteps"] = [edit(t) for t in table["timesteps"]]
    for row in changed["contract"]["rows"]:
        row["timestep"] = edit(row["timestep"])
    return changed
