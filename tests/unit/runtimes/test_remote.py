"""Artifacts that run in another process: the same results, and an error for every way in which that can end."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fewstep.bundle.contract import TensorSpec
from fewstep.errors import ContractError, RuntimeMissingError
from fewstep.runtimes.executors import worker
from fewstep.runtimes.executors.remote import Guest, Launch, open_remote, remote_runtime
from fewstep.runtimes.executors.worker import PREFIX, decode, encode
from fewstep.runtimes.onnxruntime import runtime as ort
from tests.support.bundles import plain

HERE = Launch((sys.executable,), "a process", start_s=120, call_s=120)
DTYPES = st.sampled_from(["float32", "float16", "int64", "int8", "uint8", "bool"])


@given(st.dictionaries(st.text(), DTYPES.flatmap(lambda d: hnp.arrays(d, hnp.array_shapes(min_dims=0, min_side=0)))))
def test_messages_round_trip(arrays: dict[str, np.ndarray]) -> None:
    message = encode({"do": "run", "n": 3}, arrays)
    header, body = PREFIX.unpack(message[: PREFIX.size])
    assert PREFIX.size + header + body == len(message)
    values, found = decode(message[PREFIX.size :][:header], message[PREFIX.size + header :])
    assert values == {"do": "run", "n": 3}
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def model() -> Path:
    bundle = plain()
    return bundle.file(bundle.manifest.artifact("onnxruntime", "denoiser").path)


def ones() -> dict[str, np.ndarray]:
    return {s.name: np.ones(s.shape, s.dtype) for s in plain().manifest.components["denoiser"].inputs}


def test_a_remote_session_computes_what_a_native_one_does() -> None:
    spec = plain().manifest.components["denoiser"]
    with ort.open_session(model(), spec, 1) as native:
        expected = native.run(ones())
    guest = Guest(HERE, "onnxruntime")
    try:
        with open_remote(guest, model(), spec, 1) as session:
            found = session.run(ones())
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                np.testing.assert_array_equal(found[name], value)
            with pytest.raises(ContractError, match="inputs missing"):
                session.run({})
        assert "onnxruntime" in guest.where and "on a process" in guest.where
        wrong = TensorSpec("elsewhere", "float32", (1,))
        with pytest.raises(ContractError, match="the manifest has"):
            open_remote(guest, model(), spec.__class__(spec.inputs, (wrong,), spec.bindings), 1).run(ones())
        with pytest.raises(ContractError, match=r"cannot open .*nothing\.onnx: NoSuchFile"):
            guest.open(model().with_name("nothing.onnx"), 1)
    finally:
        guest.close()
    guest.close()
    with pytest.raises(ContractError, match="its process was ended"):
        guest.open(model(), 1)


def script(path: Path, body: str) -> Path:
    """Writes a guest that starts well, and then does as ``body`` says with the first request."""
    text = """
        import os, signal, sys, time
        sys.path.insert(0, {folder!r})
        from worker import encode
        sys.stdout.buffer.write(encode({{"version": "1"}}, {{}}))
        sys.stdout.buffer.flush()
        sys.stdin.buffer.read(1)
        {body}
    """
    folder = str(Path(worker.__file__).parent)
    path.write_text(textwrap.dedent(text).format(folder=folder, body=body))
    return path


def test_a_signal_is_named_and_explained(tmp_path: Path) -> None:
    launch = Launch((sys.executable,), "a process", explain=lambda signal: f"it was {signal}")
    guest = Guest(launch, "onnxruntime", script(tmp_path / "s.py", "os.kill(os.getpid(), signal.SIGILL)"))
    with pytest.raises(RuntimeMissingError, match="a process: ended by SIGILL, asked to open ") as caught:
        guest.open(tmp_path / "model.onnx", 1)
    assert caught.value.hint == "it was 4"
    guest.close()


def test_nothing_is_opened_here_in_place_of_there() -> None:
    guest = Guest(HERE, ort.NAME)
    there = remote_runtime(ort.RUNTIME, guest)
    guest.close()
    assert ort.RUNTIME.open_mapped is not None
    assert (there.open_mapped, there.open_exact, there.at_function) == (None, None, None)


def test_what_a_process_said_last_is_told(tmp_path: Path) -> None:
    guest = Guest(HERE, "onnxruntime", script(tmp_path / "s.py", "sys.exit('no memory left')"))
    with pytest.raises(RuntimeMissingError, match=r"ended with status 1, asked to open .*: no memory left"):
        guest.open(tmp_path / "model.onnx", 1)
    guest.close()


def test_no_answer_in_time(tmp_path: Path) -> None:
    launch = Launch((sys.executable,), "a process", call_s=0.2)
    guest = Guest(launch, "onnxruntime", script(tmp_path / "s.py", "time.sleep(600)"))
    with pytest.raises(RuntimeMissingError, match=r"a process: no answer in 0 s to: open .*model\.onnx") as caught:
        guest.open(tmp_path / "model.onnx", 1)
    assert "close other programs" in str(caught.value)
    guest.close()


def test_a_runtime_that_is_not_there() -> None:
    with pytest.raises(RuntimeMissingError, match="asked to start nothing: KeyError: 'nothing'"):
        Guest(HERE, "nothing")
