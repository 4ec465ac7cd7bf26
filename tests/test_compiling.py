"""Components are compiled from their folders in processes of their own."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.compiling import StoredComponent, compile_stored
from fewstep.errors import ExportError, SourceError
from fewstep.runtimes import ort
from tests.networks import network


@pytest.fixture
def clip(tmp_path: Path) -> StoredComponent:
    """Returns a tiny text encoder in its folder."""
    made = network("clip")
    made.module.save_pretrained(tmp_path / "text_encoder")
    return StoredComponent("text_encoder", tmp_path / "text_encoder", made.part, made.arguments)


def test_component_is_compiled_elsewhere(clip: StoredComponent, tmp_path: Path) -> None:
    artifact, measured = compile_stored(clip, ort.NAME, tmp_path / "out", "fp16")
    assert artifact.path == "text_encoder/model.onnx"
    assert artifact.weights == "fp16"
    assert artifact.bytes == (tmp_path / "out" / artifact.path).stat().st_size
    assert measured.peak_bytes > artifact.bytes


def test_damaged_source_is_refused(clip: StoredComponent, tmp_path: Path) -> None:
    (clip.folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(SourceError, match=r"model.safetensors is not a safetensors file") as caught:
        compile_stored(clip, ort.NAME, tmp_path / "out", "fp16")
    assert caught.value.hint == "download it again"


def test_argument_that_cannot_be_sent_is_named(clip: StoredComponent, tmp_path: Path) -> None:
    odd = StoredComponent(clip.name, clip.folder, clip.part, {"cache": [None, object()]})
    with pytest.raises(ExportError, match=r"text_encoder.cache.1 is a object, expected a tensor, a number"):
        compile_stored(odd, ort.NAME, tmp_path / "out", "fp16")
