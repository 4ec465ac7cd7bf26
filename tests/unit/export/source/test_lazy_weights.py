"""Weights are found under their names of today, and a checkpoint that does not fit its configuration is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.errors import SourceError
from fewstep.export.source.lazy_weights import load_module, meta_module, stored_weights
from fewstep.export.source.safetensors_index import read_folder, read_header
from tests.support.networks import NETWORKS, network

State = dict[str, torch.Tensor]
UNET = "diffusion_pytorch_model"


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    """Returns the folder of a tiny UNet in one safetensors file."""
    folder = tmp_path / "unet"
    network("unet").module.save_pretrained(folder)
    return folder


def rewrite(folder: Path, change: Callable[[State], State], stem: str = UNET) -> None:
    path = folder / f"{stem}.safetensors"
    save_file(change(load_file(path)), path)


def shard(folder: Path, stem: str = UNET, variant: str = "") -> None:
    """Splits a file in two with an index."""
    path = folder / f"{stem}.safetensors"
    state = load_file(path)
    path.unlink()
    names = sorted(state)
    halves = {f"{stem}-0000{i + 1}-of-00002{variant}.safetensors": names[i::2] for i in range(2)}
    for file, keys in halves.items():
        save_file({key: state[key] for key in keys}, folder / file)
    index = {"metadata": {}, "weight_map": {key: file for file, keys in halves.items() for key in keys}}
    (folder / f"{stem}.safetensors.index{variant}.json").write_text(json.dumps(index))


def values(module: torch.nn.Module) -> State:
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach() for name, tensor in named}


def assert_same(found: State, expected: State) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", NETWORKS)
def test_loaded_module_is_the_saved_one(name: str, tmp_path: Path) -> None:
    made = network(name)
    made.module.save_pretrained(tmp_path)
    module = load_module(tmp_path)
    assert type(module) is type(made.module)
    assert not module.training
    assert_same(values(module), values(made.module))


@pytest.mark.parametrize("name", NETWORKS)
def test_meta_module_holds_no_weights(name: str, tmp_path: Path) -> None:
    network(name).module.save_pretrained(tmp_path)
    module = meta_module(tmp_path)
    assert all(parameter.is_meta for parameter in module.parameters())
    assert not any(buffer.is_meta for buffer in module.buffers())


@pytest.mark.parametrize("name", ["clip", "clip-projection"])
@pytest.mark.parametrize("prefix", [True, False], ids=["prefixed", "bare"])
def test_clip_keys_of_older_and_newer_releases(name: str, prefix: bool, tmp_path: Path) -> None:
    made = network(name)
    made.module.save_pretrained(tmp_path)

    def rename(state: State) -> State:
        bare = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
        if not prefix:
            return bare
        named = {key if key.startswith("text_projection") else f"text_model.{key}": t for key, t in bare.items()}
        return {**named, "text_model.embeddings.position_ids": torch.arange(16)[None]}

    rewrite(tmp_path, rename, "model")
    assert_same(values(load_module(tmp_path)), values(made.module))


@pytest.mark.parametrize("kept", ["shared.weight", "encoder.embed_tokens.weight"])
def test_t5_has_one_table_under_two_names(kept: str, tmp_path: Path) -> None:
    made = network("t5")
    made.module.save_pretrained(tmp_path)
    decoder = {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(1)}
    rewrite(
        tmp_path, lambda state: {kept if k == "shared.weight" else k: t for k, t in state.items()} | decoder, "model"
    )
    module = load_module(tmp_path)
    assert_same(values(module), values(made.module))
    embeddings = [module.shared.weight, module.encoder.embed_tokens.weight]
    assert embeddings[0].data_ptr() == embeddings[1].data_ptr()


def test_attention_of_old_autoencoders(tmp_path: Path) -> None:
    made = network("autoencoder")
    made.module.save_pretrained(tmp_path)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", r"to_out\.0": "proj_attn"}

    def rename(state: State) -> State:
        for new, name in old.items():
            state = {re.sub(rf"\.{new}\.(weight|bias)$", rf".{name}.\1", key): t for key, t in state.items()}
        return state

    rewrite(tmp_path, rename)
    assert any(".proj_attn." in key for key in read_folder(tmp_path))
    assert_same(values(load_module(tmp_path)), values(made.module))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_weights_of_other_precisions_are_read_as_they_are(unet: Path, dtype: torch.dtype) -> None:
    rewrite(unet, lambda state: {key: tensor.to(dtype) for key, tensor in state.items()})
    weights = stored_weights(meta_module(unet), unet)
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    expected = {name: tensor.to(dtype).float() for name, tensor in values(network("unet").module).items()}
    assert_same(values(load_module(unet)), expected)


def test_shards(unet: Path) -> None:
    shard(unet)
    assert_same(values(load_module(unet)), values(network("unet").module))


def test_sharded_variant(unet: Path) -> None:
    shard(unet, variant=".fp16")
    assert_same(values(load_module(unet)), values(network("unet").module))


def test_plain_file_is_preferred_to_a_variant(unet: Path) -> None:
    path = unet / f"{UNET}.safetensors"
    save_file({key: tensor.half() for key, tensor in load_file(path).items()}, unet / f"{UNET}.fp16.safetensors")
    assert {tensor.path.name for tensor in read_folder(unet).values()} == {f"{UNET}.safetensors"}
    path.unlink()
    assert {tensor.path.name for tensor in read_folder(unet).values()} == {f"{UNET}.fp16.safetensors"}


def refused(unet: Path) -> str:
    with pytest.raises(SourceError) as caught:
        stored_weights(meta_module(unet), unet)
    assert caught.value.hint
    return caught.value.message


def test_missing_tensor(unet: Path) -> None:
    rewrite(unet, lambda state: {key: tensor for key, tensor in state.items() if key != "conv_in.bias"})
    assert refused(unet) == f"{unet} lacks conv_in.bias, which UNet2DConditionModel needs"


def test_left_over_tensors(unet: Path) -> None:
    rewrite(unet, lambda state: state | {"a.lora": torch.zeros(1), "b.lora": torch.zeros(1)})
    assert stored_weights(meta_module(unet), unet).unused == ("a.lora", "b.lora")


def test_wrong_shape(unet: Path) -> None:
    rewrite(unet, lambda state: state | {"conv_in.bias": torch.zeros(3)})
    expected = f"{unet}/{UNET}.safetensors: conv_in.bias has shape [3], UNet2DConditionModel expects [16]"
    assert refused(unet) == expected


def test_truncated_file(unet: Path) -> None:
    path = unet / f"{UNET}.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert refused(unet) == f"{path} has {len(whole) - 1} bytes, expected {len(whole)}"


def test_missing_shard_and_missing_tensor_of_a_shard(unet: Path) -> None:
    shard(unet)
    second = unet / f"{UNET}-00002-of-00002.safetensors"
    rewrite(unet, lambda state: dict(list(state.items())[1:]), second.stem)
    assert "lacks the tensor" in refused(unet)
    second.unlink()
    assert f"names the shard '{second.name}', which is not in" in refused(unet)


def test_shard_outside_the_folder(unet: Path) -> None:
    index = {"weight_map": {"conv_in.bias": "../other.safetensors"}}
    (unet / f"{UNET}.safetensors").rename(unet.parent / "other.safetensors")
    (unet / f"{UNET}.safetensors.index.json").write_text(json.dumps(index))
    assert "names the shard '../other.safetensors', which is not in" in refused(unet)


def test_no_weights(unet: Path) -> None:
    (unet / f"{UNET}.safetensors").unlink()
    assert refused(unet).startswith(f"{unet} has no weights, expected")


def test_unknown_class(unet: Path) -> None:
    (unet / "config.json").write_text(json.dumps({"_class_name": "UNet9D"}))
    assert "names the class 'UNet9D', expected a network of diffusers" in refused(unet)


def test_quantized_checkpoint(unet: Path) -> None:
    path = unet / "odd.safetensors"
    save_file({"x": torch.zeros(4).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(SourceError, match="x is stored as F8_E4M3, expected one of"):
        read_header(path)


def test_reading_maps_one_tensor(unet: Path) -> None:
    tensors = read_folder(unet)
    assert sum(tensor.nbytes for tensor in tensors.values()) == sum(
        math.prod(tensor.shape) * 4 for tensor in tensors.values()
    )
    name = "conv_in.weight"
    tensor = tensors[name].read()
    assert tensor.untyped_storage().nbytes() == tensors[name].nbytes
    tensor.zero_()  # a private copy: the file stays as it is
    assert tensors[name].read().any()
