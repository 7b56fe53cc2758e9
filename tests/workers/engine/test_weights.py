"""Where weights come from: folders, seeds, kept conversions; and everything that is refused, by name."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from diptych.errors import InvalidRequest
from diptych.types import ModelSource
from tests.workers.engine.gguf_writer import write_gguf
from tests.workers.engine.tiny_models import config_of
from workers.engine.model_memory import ModelTooLarge, available_bytes
from workers.engine.random_weights import SHAPES, fill_randomly
from workers.engine.weights import UnsupportedModel, Weights, load_weights, stacked

Load = Callable[..., Weights]


@pytest.fixture
def folder(peer: Any, tmp_path: Path) -> Path:
    """A Llama with grouped heads and three layers."""
    peer(config_of("llama, grouped heads"))
    return tmp_path


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """The folder's weights, changed."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def shard(folder: Path) -> list[Path]:
    """The folder's weights in three files, named by an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    files = [f"model-0000{part + 1}-of-00003.safetensors" for part in range(3)]
    for part, file in enumerate(files):
        save_file({name: tensors[name] for name in names[part::3]}, folder / file)
    where = {name: files[place % 3] for place, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return [folder / file for file in files]


def same(one: Weights, other: Weights) -> bool:
    return one.config == other.config and all(
        torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors
    )


# ---- folders --------------------------------------------------------------------------------------------


def test_shards_hold_what_one_file_holds(folder: Path, load: Load) -> None:
    whole = load(folder)
    kept = {name: tensor.clone() for name, tensor in whole.tensors.items()}
    shard(folder)
    save_file({"stray": torch.zeros(1)}, folder / "consolidated.safetensors")
    assert same(load(folder), Weights(config=whole.config, tensors=kept))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrower_files_are_widened(dtype: torch.dtype, folder: Path, load: Load) -> None:
    change(folder, lambda tensors: tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()}))
    stored = load_file(folder / "model.safetensors")
    for name, tensor in load(folder).tensors.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, stored[name].float()), name


def test_products_that_share_an_input_lie_together_without_a_copy(folder: Path, load: Load) -> None:
    tensors = load(folder).tensors
    parts = [tensors[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv"]
    together = stacked(parts)
    assert torch.equal(together, torch.cat(parts))
    assert together.data_ptr() == parts[0].data_ptr()
    assert torch.equal(stacked(parts[::-1]), torch.cat(parts[::-1]))


def refused(load: Load, path: Path | str, complaint: str, **more: Any) -> None:
    with pytest.raises(UnsupportedModel, match=complaint) as caught:
        load(path, **more)
    assert isinstance(caught.value, InvalidRequest)


def test_a_tensor_that_is_missing_extra_or_misshapen_is_named(folder: Path, load: Load) -> None:
    name = "model.layers.2.mlp.up_proj.weight"
    change(folder, lambda tensors: tensors.update({name: tensors[name][:-1]}))
    refused(load, folder, r"model\.safetensors: tensor model\.layers\.2\.mlp\.up_proj.* \[79, 48\].* says \[80, 48\]")
    change(folder, lambda tensors: tensors.pop(name))
    refused(load, folder, r"tensor model\.layers\.2\.mlp\.up_proj\.weight \[80, 48\] is missing; the files are incom")
    change(
        folder, lambda tensors: tensors.update({name: torch.zeros(80, 48), "model.layers.3.x.weight": torch.ones(2)})
    )
    refused(load, folder, r"model\.safetensors: tensor model\.layers\.3\.x\.weight \[2\] is not part .* \(0 to 2\)")


def test_a_bias_that_the_configuration_doesnt_know_is_refused(folder: Path, load: Load) -> None:
    change(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}))
    refused(load, folder, r"q_proj\.bias \[48\] is not part of a llama model.*configuration has no such bias")


def test_quantised_tensors_are_refused(folder: Path, load: Load) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    change(folder, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    refused(load, folder, r"up_proj\.weight is I8, which is quantised.*F32, F16, BF16")


def test_what_follows_from_the_rest_may_be_repeated(folder: Path, load: Load, edit_config: Any) -> None:
    change(folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}))
    edit_config(tie_word_embeddings=True)
    assert "lm_head.weight" not in load(folder).tensors


def test_files_that_are_missing_or_cut_short_are_named(folder: Path, load: Load) -> None:
    content = (folder / "model.safetensors").read_bytes()
    for kept in (0, 5, 200, len(content) // 2, len(content) - 1):
        (folder / "model.safetensors").write_bytes(content[:kept])
        refused(load, folder, rf"model\.safetensors: not a whole safetensors file .*it has {kept} bytes")
    (folder / "model.safetensors").unlink()
    refused(load, folder, r"no \*\.safetensors file")
    (folder / "config.json").write_text('{"model_type": "llama"')
    refused(load, folder, r"config\.json: .*needs a readable config\.json")
    (folder / "config.json").unlink()
    refused(load, folder, r"config\.json: .*No such file")
    refused(load, folder / "gone.gguf", r"gone\.gguf: no such file")


def test_a_shard_that_is_missing_or_lacks_its_tensors_is_named(folder: Path, load: Load) -> None:
    files = shard(folder)
    lacking = load_file(files[1])
    gone = sorted(lacking)[0]
    lacking.pop(gone)
    save_file(lacking, files[1])
    refused(load, folder, rf"00002-of-00003\.safetensors: tensor {gone} is missing, which .*index\.json says")
    files[1].unlink()
    refused(load, folder, r"00002-of-00003\.safetensors: missing, one of 1 of 3 shards")
    (folder / "model.safetensors.index.json").write_text("[]")
    refused(load, folder, r"index\.json: not a readable index")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"model_type": "mamba"}, r"model_type='mamba'.*gemma2, gemma3_text, llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, r"model_type=None"),
        ({"residual_multiplier": 0.2}, r"residual_multiplier=0\.2: not known.*may change the maths"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config=\{'bits': 4\}"),
        ({"sliding_window": 7}, r"sliding_window=7 is not supported; what works: left out"),
        ({"hidden_act": "relu2"}, r"hidden_act='relu2'.*gelu_pytorch_tanh"),
        ({"attn_logit_softcapping": 3.0}, r"attn_logit_softcapping=3\.0"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5.*what works: 1"),
        ({"num_key_value_heads": 3}, r"4 heads can't share 3 KV heads"),
        ({"head_dim": 15}, r"heads of 15 numbers"),
        ({"hidden_size": ...}, r"hidden_size is missing"),
        ({"num_hidden_layers": "3"}, r"num_hidden_layers='3'.*whole number above 0"),
        ({"rms_norm_eps": -1.0}, r"rms_norm_eps=-1\.0.*number above 0"),
        ({"rope_parameters": {"rope_type": "longrope"}}, r"rope_parameters: rope_type='longrope'.*llama3, yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "twist": 1}}, r"rope_scaling: twist=1: not known"),
        ({"rope_parameters": {"rope_type": "linear"}}, r"rope_parameters: factor is missing"),
        ({"layer_types": ["full_attention"] * 2}, r"layer_types=.*3 times full_attention"),
    ],
)
def test_a_field_that_changes_the_maths_is_named(
    fields: dict[str, Any], complaint: str, folder: Path, load: Load, edit_config: Any
) -> None:
    edit_config(**fields)
    refused(load, folder, rf"config\.json: .*{complaint}|config\.json: {complaint}")


def test_fields_that_change_nothing_are_let_by(folder: Path, load: Load, edit_config: Any) -> None:
    before = load(folder).config
    edit_config(pretraining_tp=1, attention_bias=False, rope_scaling=None, sliding_window=None, _name_or_path="x/y")
    assert load(folder).config == before


# ---- memory ---------------------------------------------------------------------------------------------


def test_a_model_larger_than_memory_is_refused_before_it_is_read(folder: Path, load: Load, peer: Any) -> None:
    path = write_gguf(folder, folder / "m.gguf")
    for source in (folder, path, "random:llama-8b"):
        with pytest.raises(ModelTooLarge, match=r"billion weights in float32 need \d+\.\d GiB.* 0\.0 GiB left.*bf16"):
            load(source, room_bytes=100_000)
    refused(
        load, "random:llama-8b", r"8\.0 billion weights in bfloat16 need 15\.\d GiB", dtype="bf16", room_bytes=1 << 33
    )


def test_the_memory_there_is_is_measured() -> None:
    assert 1 << 26 < available_bytes(torch.device("cpu")) <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


# ---- kept conversions --------------------------------------------------------------------------------------


def kept_files(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_conversion_is_kept_and_mapped(dtype: str, folder: Path, load: Load) -> None:
    path, cache = write_gguf(folder, folder / "m.gguf"), folder / "cache"
    fresh = load(path, dtype=dtype)
    assert same(load(path, dtype=dtype, cache=cache), fresh)
    (kept,) = kept_files(cache)
    path.unlink()  # from here on the file alone is enough
    mapped = load(path, dtype=dtype, cache=cache)
    assert same(mapped, fresh)
    assert all(torch.equal(tensor, mapped.tensors[name]) for name, tensor in load_file(kept).items())


def test_what_other_code_converted_is_neither_used_nor_kept(
    folder: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = write_gguf(folder, folder / "m.gguf"), folder / "cache"
    with monkeypatch.context() as other:
        other.setattr("workers.engine.conversion._maker", lambda: "other")
        load(path, cache=cache)
    (stale,) = kept_files(cache)
    load(path, dtype="bf16", cache=cache)
    load(path, cache=cache)
    assert len(kept_files(cache)) == 2
    assert stale not in kept_files(cache)


@pytest.mark.parametrize("spoil", ["cut", "emptied", "header", "shape", "longer"])
def test_a_spoiled_conversion_is_made_again(spoil: str, folder: Path, load: Load) -> None:
    path, cache = write_gguf(folder, folder / "m.gguf"), folder / "cache"
    fresh = load(path, cache=cache)
    (kept,) = kept_files(cache)
    content = kept.read_bytes()
    spoiled = {
        "cut": content[:-1],
        "emptied": b"",
        "header": b"\xff" * 8 + content[8:],
        "shape": content.replace(b'"shape": [80, 48]', b'"shape": [48, 80]', 1),
        "longer": content + b"\0\0\0\0",
    }[spoil]
    assert spoiled != content
    kept.write_bytes(spoiled)
    assert same(load(path, cache=cache), load(path))
    assert kept.read_bytes() == content
    assert fresh.config == load(path, cache=cache).config


def test_a_cache_that_cant_be_written_to_costs_nothing_but_time(folder: Path, load: Load) -> None:
    path = write_gguf(folder, folder / "m.gguf")
    (folder / "cache").write_text("a file where a folder should be")
    assert same(load(path, cache=folder / "cache"), load(path))


# ---- seeds -----------------------------------------------------------------------------------------------------


def test_random_weights_are_the_same_everywhere(load: Load) -> None:
    for shape in ("tiny", "tiny-gemma3"):
        assert same(load(f"random:{shape}"), load(f"random:{shape}"))
    digest = hashlib.sha256(b"other").hexdigest()
    other = load_weights(ModelSource(name="m", path="random:tiny", digest=digest), "fp32", cache=None)
    assert not same(load("random:tiny"), other)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.startswith("tiny")])
def test_tiny_shapes_hold_the_byte_tokenizer(shape: str, load: Load) -> None:
    weights = load(f"random:{shape}")
    assert weights.config.vocabulary >= 260
    assert {name: tuple(tensor.shape) for name, tensor in weights.tensors.items()} == weights.config.shapes


def test_large_shapes_have_the_sizes_of_their_names() -> None:
    billions = {name: round(SHAPES[name].parameters / 1e9, 2) for name in ("llama-1b", "llama-8b", "qwen3-8b")}
    assert billions == {"llama-1b": 1.24, "llama-8b": 8.03, "qwen3-8b": 8.19}


def test_no_two_rows_of_a_large_random_matrix_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.engine.random_weights._DRAWN", 4093)
    matrix = torch.empty(2000, 64)
    fill_randomly({"model.embed_tokens.weight": matrix}, SHAPES["llama-1b"], "0123456789abcdef")
    assert len(torch.unique(matrix, dim=0)) == 2000
    assert matrix.std() == pytest.approx(64**-0.5, rel=0.05)


def test_an_unknown_shape_is_refused_with_the_known_ones(load: Load) -> None:
    refused(load, "random:llama-9b", r"random:llama-9b is not a known shape; known: llama-1b, llama-8b, qwen3-8b, tiny")
