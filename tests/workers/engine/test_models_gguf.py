"""The same weights give the same logits out of a GGUF file, in every type it may hold them in."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from gguf.quants import dequantize, quantize

from tests.workers.engine.gguf_writer import write_gguf
from tests.workers.engine.tiny_models import CASES, GEMMA, SMALL, config_of, llama_rope, logits_of, some_tokens
from workers.engine.weights import UnsupportedModel

CARRIED = [
    "llama, grouped heads",
    "llama, one KV head, tied",
    "llama, no groups, wide heads",
    "llama, linear",
    "llama, llama3",
    "llama, yarn",
    "mistral, window",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
]


@pytest.mark.parametrize("case", CARRIED)
def test_a_gguf_file_gives_the_logits_of_its_folder(case: str, peer: Any, paged: Any, load: Any, tmp_path: Any) -> None:
    theirs = logits_of(peer(config_of(case)), tokens := some_tokens(300))
    folder, file = load(tmp_path), load(write_gguf(tmp_path, tmp_path / "m.gguf"))
    assert file.config.shapes == folder.config.shapes
    ours = paged(file).feed(tokens, [300])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    if "llama3" not in case and "gemma" not in case:  # there, numbers were rounded on their way into the file
        assert torch.equal(ours, paged(folder).feed(tokens, [300]))


def test_gemma_files_say_their_layers_in_numbers_or_one_by_one(peer: Any, paged: Any, load: Any, tmp_path: Any) -> None:
    name, fields = CASES["gemma3, scaled, own layers"]
    theirs = logits_of(peer(getattr(transformers, name)(**fields)), tokens := some_tokens(300))
    said = {"attention.sliding_window_pattern": [False, True, False], "rope.freq_base_swa": 5000.0}
    ours = paged(load(write_gguf(tmp_path, tmp_path / "m.gguf", metadata=said)))
    torch.testing.assert_close(ours.feed(tokens, [300]), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("layers", "scaled_by"), [(45, 16), (46, 24)])
def test_only_the_largest_gemma_scales_queries_by_its_hidden_size(
    layers: int, scaled_by: int, peer: Any, load: Any, tmp_path: Any
) -> None:
    """As in llama.cpp's code: the files don't say it."""
    peer(transformers.Gemma2Config(**GEMMA | {"num_hidden_layers": layers, "hidden_size": 96}))
    path = write_gguf(tmp_path, tmp_path / "m.gguf", metadata={"attention.scale": None})
    assert load(path).config.attention_scale == scaled_by**-0.5


TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]
WIDE = SMALL | {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 64}


def quantised(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """In blocks of `kind`; for those the package can't make, blocks of any numbers with small scales."""
    if "_K" not in kind.name:
        return quantize(values, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(values.size).integers(0, 256, (values.size // block, size), dtype=np.uint8)
    scale = np.frombuffer(np.array([2e-4, 1e-4], dtype=np.float16).tobytes(), dtype=np.uint8)
    if kind.name == "Q6_K":
        blocks[:, -2:] = scale[:2]
    else:
        blocks[:, :4] = scale
    return blocks.reshape(values.shape[0], -1)


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("config", ["LlamaConfig", "Qwen3Config"])
def test_each_type_is_the_packages_numbers(
    config: str, name: str, peer: Any, paged: Any, load: Any, tmp_path: Any
) -> None:
    peer(getattr(transformers, config)(**WIDE))
    kind = gguf.GGMLQuantizationType[name]
    kinds = set[gguf.GGMLQuantizationType]()

    def as_type(label: str, values: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType | None]:
        if values.ndim == 1:
            return values, None
        kinds.add(kind)
        return quantised(values, kind), kind

    def as_numbers(label: str, values: np.ndarray) -> tuple[np.ndarray, None]:
        return (values if values.ndim == 1 else dequantize(quantised(values, kind), kind)), None

    packed = load(write_gguf(tmp_path, tmp_path / "packed.gguf", quantise=as_type))
    plain = load(write_gguf(tmp_path, tmp_path / "plain.gguf", quantise=as_numbers))
    assert kinds == {kind}
    for each, values in plain.tensors.items():
        assert torch.equal(packed.tensors[each], values), each
    tokens = some_tokens(40)
    assert torch.equal(paged(packed).feed(tokens, [40]), paged(plain).feed(tokens, [40]))


def test_a_large_tensor_is_converted_piece_by_piece(
    peer: Any, load: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer(config_of("llama, grouped heads"))
    path = write_gguf(tmp_path, tmp_path / "m.gguf")
    whole = load(path)
    monkeypatch.setattr("workers.engine.gguf_files._PIECE", 1000)
    for name, values in load(path).tensors.items():
        assert torch.equal(values, whole.tensors[name]), name


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        ({"rope.scaling.type": "longrope"}, r"llama\.rope\.scaling\.type='longrope'.*none, linear, yarn"),
        ({"expert_count": 8}, r"llama\.expert_count=8"),
        ({"attention.clamp_kqv": 8.0}, r"llama\.attention\.clamp_kqv=8\.0.*may change the maths"),
        ({"rope.dimension_count": 6}, r"llama\.rope\.dimension_count=6 .*what works: 12"),
        ({"attention.causal": False}, r"llama\.attention\.causal=False"),
        ({"rope.scaling.type": "yarn", "rope.scaling.yarn_ext_factor": 0.5}, r"yarn_ext_factor=0\.5"),
        ({"attention.head_count_kv": 3}, "4 heads can't share 3 KV heads"),
    ],
)
def test_metadata_that_changes_the_maths_is_refused(
    metadata: dict[str, Any], complaint: str, peer: Any, load: Any, tmp_path: Any
) -> None:
    peer(config_of("llama, grouped heads"))
    path = write_gguf(tmp_path, tmp_path / "odd.gguf", metadata=metadata)
    with pytest.raises(UnsupportedModel, match=rf"odd\.gguf: .*{complaint}"):
        load(path)


def test_other_quantisations_and_architectures_are_refused(peer: Any, load: Any, tmp_path: Any) -> None:
    peer(config_of("llama, grouped heads"))

    def as_mxfp4(label: str, values: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType | None]:
        kind = gguf.GGMLQuantizationType.MXFP4
        is_it = label == "blk.1.ffn_down.weight"
        return (quantize(np.resize(values, (48, 96)), kind), kind) if is_it else (values, None)

    with pytest.raises(UnsupportedModel, match=r"m\.gguf: tensor blk\.1\.ffn_down\.weight is of type MXFP4.*Q6_K"):
        load(write_gguf(tmp_path, tmp_path / "m.gguf", quantise=as_mxfp4))
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "rwkv7")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match=r"other\.gguf: general\.architecture='rwkv7'.*gemma3, llama, qwen2"):
        load(tmp_path / "other.gguf")


def test_wrong_tensors_are_named_with_both_shapes(peer: Any, load: Any, tmp_path: Any) -> None:
    peer(config_of("llama, grouped heads"))

    def cut(label: str, values: np.ndarray) -> tuple[np.ndarray, None]:
        return (values[:-8] if label == "blk.2.ffn_up.weight" else values), None

    path = tmp_path / "m.gguf"
    with pytest.raises(UnsupportedModel, match=r"blk\.2\.ffn_up\.weight is \[72, 48\].* says \[80, 48\]"):
        load(write_gguf(tmp_path, path, quantise=cut))
    with pytest.raises(UnsupportedModel, match=r"model\.layers\.0\.self_attn\.q_proj\.weight \[48, 48\] is missing"):
        load(write_gguf(tmp_path, path, rename={"blk.0.attn_q.weight": None}))
    with pytest.raises(UnsupportedModel, match=r"blk\.7\.ffn_up\.weight \[80, 48\] is not part.*3 layers \(0 to 2\)"):
        load(write_gguf(tmp_path, path, rename={"blk.1.ffn_up.weight": "blk.7.ffn_up.weight"}))
    with pytest.raises(UnsupportedModel, match=r"tensor blk\.1\.ssm_a\.weight is not part of a llama model"):
        load(write_gguf(tmp_path, path, rename={"blk.1.ffn_up.weight": "blk.1.ssm_a.weight"}))


@pytest.mark.parametrize("kept", [3, 200, 3000, 0.5, 0.999])
def test_a_truncated_file_is_named(kept: float, peer: Any, load: Any, tmp_path: Any) -> None:
    name, fields = llama_rope(rope_type="default")
    peer(getattr(transformers, name)(**fields))
    path = write_gguf(tmp_path, tmp_path / "short.gguf")
    content = path.read_bytes()
    path.write_bytes(content[: kept if kept > 1 else int(len(content) * kept)])
    with pytest.raises(UnsupportedModel, match=r"short\.gguf: not a whole GGUF file.*it has \d+ bytes"):
        load(path)
