"""The forward pass in C++: as good as torch's in bf16, and the same bits however tokens come."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import pytest
import torch

from diptych.types import ModelSource, WeightFormat
from tests.workers.engine.gguf_writer import write_gguf
from tests.workers.engine.tiny_models import CASES, config_of, some_tokens
from workers.engine.loading import load_model
from workers.engine.model import Model
from workers.engine.model_config import UnsupportedModel
from workers.engine.packed_weights import kept_file
from workers.engine.weights import Weights

if TYPE_CHECKING:
    import numpy as np

LENGTH = 560
"""Two splits of 256 keys and some: windows leave whole splits behind."""
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}
TURNS_DIFFERENTLY = ("linear", "llama3", "yarn", "dynamic")
"""Another table of turns, the same maths."""
NATIVE = [case for case in CASES if not any(word in case for word in TURNS_DIFFERENTLY)]


def wide_config(case: str) -> Any:
    """Sizes in multiples of 32."""
    return config_of(case, **WIDE)


@pytest.mark.parametrize("case", NATIVE)
def test_it_is_nearer_to_fp32_than_torch_in_bf16(
    case: str, peer: Any, paged: Any, load: Any, native: Any, tmp_path: Path
) -> None:
    peer(wide_config(case))
    weights, tokens = load(tmp_path, dtype="bf16"), some_tokens(LENGTH)
    exact = Weights(config=weights.config, tensors={name: each.float() for name, each in weights.tensors.items()})
    wanted = paged(exact).feed(tokens, [LENGTH])
    assert wanted.std() > 0.3, "the comparison means nothing if nothing is said"
    ours = paged(weights, model=native(weights))
    whole = ours.feed(tokens, [LENGTH])
    off, torchs = ((each - wanted).abs().mean() for each in (whole, paged(weights).feed(tokens, [LENGTH])))
    assert off <= torchs
    # Chunks and single tokens are the same numbers, to the bit.
    assert torch.equal(ours.feed(tokens, [1, 15, 37, 3, 200, 16, 280]), whole)
    assert torch.equal(ours.feed(tokens, [100, 410]), whole)


@pytest.mark.parametrize("case", ["llama, grouped heads", "gemma2"])
def test_a_batch_changes_no_bit(case: str, peer: Any, paged: Any, load: Any, native: Any, tmp_path: Path) -> None:
    peer(wide_config(case))
    weights = load(tmp_path, dtype="bf16")
    ours = paged(weights, model=native(weights), sequences=24)
    texts = [some_tokens(length, seed=length) for length in (540, 300, 20, *range(30, 200, 9))]
    alone = [ours.feed(text, [len(text)]) for text in texts]
    fed = [ours.sequence() for _ in texts]
    for sequence, text in zip(fed, texts, strict=True):
        ours.step([], [(sequence, text[:-9])])
    decodes = [(sequence, text[-9]) for sequence, text in zip(fed[1:], texts[1:], strict=True)]
    together = ours.step(decodes, [(fed[0], texts[0][-9:-2])])
    by_length = sorted(range(1, len(texts)), key=lambda at: -len(texts[at]))
    assert torch.equal(together, torch.cat([*(alone[at][-9:-8] for at in by_length), alone[0][-9:-2]]))


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_a_files_own_bits_are_the_numbers_they_stand_for(
    kind: str, peer: Any, paged: Any, load: Any, native: Any, tmp_path: Path
) -> None:
    def as_type(label: str, values: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType | None]:
        to = gguf.GGMLQuantizationType[kind]
        return (gguf.quants.quantize(values, to), to) if values.ndim == 2 else (values, None)

    peer(wide_config("llama, grouped heads"))
    weights = load(write_gguf(tmp_path, tmp_path / "m.gguf", quantise=as_type), dtype="bf16")
    tokens, models = some_tokens(100), [native(weights, "auto"), native(weights, "bf16")]
    packed, plain = (paged(weights, model=model).feed(tokens, [1, 10, 80]) for model in models)
    assert torch.equal(packed, plain)


@pytest.mark.parametrize(("form", "most"), [("int8", 0.02), ("int4", 0.4)])
def test_fewer_bits_than_the_file_has_are_nearly_its_numbers(
    form: WeightFormat, most: float, peer: Any, paged: Any, load: Any, native: Any, tmp_path: Path
) -> None:
    peer(wide_config("llama, all biases"))
    weights, tokens = load(tmp_path, dtype="bf16"), some_tokens(100)
    rounded, plain = (paged(weights, model=native(weights, each)).feed(tokens, [100]) for each in (form, "bf16"))
    assert 0 < (rounded - plain).square().mean() <= most * plain.square().mean()


@pytest.mark.parametrize("spoil", [None, b"", b"\xff" * 400])
def test_panels_are_kept_and_mapped_and_made_again_when_spoiled(
    spoil: bytes | None, peer: Any, paged: Any, load: Any, native: Any, tmp_path: Path
) -> None:
    peer(wide_config("llama, grouped heads"))
    weights, kept = load(tmp_path, dtype="bf16"), kept_file(tmp_path / "cache", "digest", "auto")
    tokens = some_tokens(40)
    first = paged(weights, model=native(weights, kept=kept)).feed(tokens, [40])
    made = kept.stat().st_ino
    if spoil is not None:
        kept.write_bytes(spoil)
    again = paged(weights, model=native(weights, kept=kept)).feed(tokens, [40])
    assert torch.equal(again, first)
    assert (kept.stat().st_ino == made) == (spoil is None)
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]


def test_what_is_not_finite_stays_in_its_own_sequence(
    peer: Any, paged: Any, load: Any, native: Any, tmp_path: Path
) -> None:
    peer(wide_config("llama, grouped heads"))
    weights = load(tmp_path, dtype="bf16")
    ours, texts = paged(weights, model=native(weights)), [some_tokens(50), some_tokens(30, seed=2)]
    alone = ours.feed(texts[1], [30])
    fed = [ours.sequence(), ours.sequence()]
    for sequence, text in zip(fed, texts, strict=True):
        ours.step([], [(sequence, text[:-1])])
    ours.arena[fed[0].blocks[1], 0, 0, 0, 3] = float("nan")  # one key of one head
    said = ours.said([(fed[0], texts[0][-1]), (fed[1], texts[1][-1])], [])
    assert said.values[0].isnan().all()
    assert torch.equal(said.values[1], alone[-1])
    assert said.finite.tolist() == [False, True]


def test_the_highest_logit_is_the_first_of_its_equals(
    peer: Any, paged: Any, load: Any, native: Any, tmp_path: Path
) -> None:
    peer(wide_config("llama, one KV head, tied"))
    weights = load(tmp_path, dtype="bf16")
    rows = weights.tensors["model.embed_tokens.weight"]
    rows[100:300] = rows[:100].repeat(2, 1)
    ours = paged(weights, model=native(weights))
    said = ours.said([], [(ours.sequence(), some_tokens(200))])
    assert torch.equal(said.values[:, 100:200], said.values[:, :100])
    assert said.highest.tolist() == said.values.argmax(-1).tolist()
    assert not any(100 <= token < 300 for token in said.highest)
    assert any(token < 100 for token in said.highest)
    assert said.finite.all()


def test_blocks_may_hold_anything_beyond_the_end(peer: Any, paged: Any, load: Any, native: Any, tmp_path: Path) -> None:
    peer(wide_config("llama, grouped heads"))
    weights, tokens = load(tmp_path, dtype="bf16"), some_tokens(41)
    ours = paged(weights, model=native(weights))
    clean = ours.feed(tokens, [20])
    ours.arena.fill_(float("nan"))
    assert torch.equal(ours.feed(tokens, [20]), clean)


def test_a_machine_without_a_compiler_computes_with_torch(
    monkeypatch: pytest.MonkeyPatch, peer: Any, tmp_path: Path
) -> None:
    peer(wide_config("llama, grouped heads"))
    monkeypatch.setenv("CXX", "/no/such/compiler")
    source, cpu = ModelSource(name="m", path=str(tmp_path), digest="0" * 64), torch.device("cpu")
    loaded = load_model(source, "bf16", "auto", cache=tmp_path / "cache", device=cpu, threads=1)
    assert isinstance(loaded.model, Model)
    assert "torch on cpu, bf16 (" in loaded.how


def test_a_machine_without_room_for_panels_computes_with_torch(
    monkeypatch: pytest.MonkeyPatch, library: ctypes.CDLL, peer: Any, tmp_path: Path
) -> None:
    peer(wide_config("llama, grouped heads"))
    monkeypatch.setattr("workers.engine.loading.load_library", lambda _: library)
    monkeypatch.setattr("workers.engine.packed_weights.available_bytes", lambda _: 1000)
    source, cpu = ModelSource(name="m", path=str(tmp_path), digest="0" * 64), torch.device("cpu")
    loaded = load_model(source, "bf16", "auto", cache=None, device=cpu, threads=1)
    assert isinstance(loaded.model, Model)
    assert "second copy of the weights" in loaded.how


def test_fp32_and_odd_sizes_are_torchs(peer: Any, tmp_path: Path) -> None:
    peer(config_of("llama, grouped heads"))
    source, cpu = ModelSource(name="m", path=str(tmp_path), digest="0" * 64), torch.device("cpu")
    for dtype, form, told in (("fp32", "int4", "are for bf16"), ("bf16", "auto", "multiples of 32")):
        loaded = load_model(source, dtype, form, cache=None, device=cpu, threads=1)
        assert isinstance(loaded.model, Model)
        assert told in loaded.how
    with pytest.raises(UnsupportedModel, match=r"engine.weights = int4: .*multiples of 32.*set it to auto"):
        load_model(source, "bf16", "int4", cache=None, device=cpu, threads=1)
