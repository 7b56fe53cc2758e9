"""Activations in int8: nearly as good as bf16, the same bits however tokens come, had or refused with a reason."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import pytest
import torch
from torch import Tensor

from diptych.types import Activations, ModelSource, WeightFormat
from kernels.cpu.products import reason_against_int8
from tests.workers.engine.gguf_writer import write_gguf
from tests.workers.engine.test_native_model import LENGTH, wide_config
from tests.workers.engine.tiny_models import some_tokens
from workers.engine import activations
from workers.engine.activations import Pace, chosen, kept_pace
from workers.engine.loading import Loaded, load_model
from workers.engine.model import Model
from workers.engine.model_config import UnsupportedModel
from workers.engine.packed_weights import pack_weights

if TYPE_CHECKING:
    import numpy as np

CPU = torch.device("cpu")
CASES = ["llama, grouped heads", "llama, all biases", "qwen3", "gemma2"]
"""Plain; biased; heads that are normed; products that are normed, and windows."""


@pytest.fixture(autouse=True)
def has_int8(library: ctypes.CDLL) -> None:
    if reason := reason_against_int8(library):
        pytest.skip(f"no int8 here: {reason}")


@pytest.fixture
def q4(tmp_path: Path) -> Callable[[], Path]:
    """The peer's weights as a GGUF of Q4_1, its last product Q8_0."""

    def as_type(label: str, values: np.ndarray) -> tuple[np.ndarray, gguf.GGMLQuantizationType | None]:
        to = gguf.GGMLQuantizationType["Q8_0" if "token_embd" in label or label.startswith("output.") else "Q4_1"]
        return (gguf.quants.quantize(values, to), to) if values.ndim == 2 else (values, None)

    return lambda: write_gguf(tmp_path, tmp_path / "m.gguf", quantise=as_type)


def load_tiny(form: WeightFormat, way: Activations, *, cache: Path | None = None, path: Path | None = None) -> Loaded:
    source = ModelSource(name="m", path=str(path or "random:tiny"), digest="0" * 64)
    return load_model(source, "bf16", form, cache=cache, device=CPU, threads=1, activations=way)


@pytest.mark.parametrize("case", [case for case in CASES if "biases" not in case])
def test_a_model_is_hardly_further_from_exact_weights_than_in_bf16(
    case: str, peer: Any, paged: Any, load: Any, native: Any, q4: Any
) -> None:
    peer(wide_config(case))
    path, tokens = q4(), some_tokens(LENGTH)
    weights = load(path, dtype="bf16")
    exact = paged(load(path)).feed(tokens, [LENGTH])

    def off(way: Activations) -> Tensor:
        said = paged(weights, model=native(weights, activations=way)).feed(tokens, [LENGTH])
        return (said - exact).square().mean().sqrt()

    assert exact.std() > 0.3, "the comparison means nothing if nothing is said"
    # Each product is compared to its reference by itself: over layers two roundings part from one another
    # as far as each parts from what it rounds.
    assert 1.2 * off("bf16") < off("int8") < 2.5 * off("bf16")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("form", ["int8", "int4"])
def test_chunks_and_single_tokens_are_the_same_bits(
    case: str, form: WeightFormat, peer: Any, paged: Any, load: Any, native: Any, tmp_path: Path
) -> None:
    peer(wide_config(case))
    weights, tokens = load(tmp_path, dtype="bf16"), some_tokens(LENGTH)
    ours = paged(weights, model=native(weights, form, activations="int8"))
    whole = ours.feed(tokens, [LENGTH])
    assert torch.equal(ours.feed(tokens, [1, 15, 37, 3, 200, 16, 280]), whole)
    assert torch.equal(ours.feed(tokens, [100, 410]), whole)


def test_a_batch_changes_no_bit(peer: Any, paged: Any, load: Any, native: Any, tmp_path: Path) -> None:
    peer(wide_config("llama, grouped heads"))
    weights = load(tmp_path, dtype="bf16")
    ours = paged(weights, model=native(weights, "int4", activations="int8"), sequences=24)
    texts = [some_tokens(length, seed=length) for length in (540, 300, 20, *range(30, 200, 9))]
    alone = [ours.feed(text, [len(text)]) for text in texts]
    fed = [ours.sequence() for _ in texts]
    for sequence, text in zip(fed, texts, strict=True):
        ours.step([], [(sequence, text[:-9])])
    decodes = [(sequence, text[-9]) for sequence, text in zip(fed[1:], texts[1:], strict=True)]
    together = ours.step(decodes, [(fed[0], texts[0][-9:-2])])
    by_length = sorted(range(1, len(texts)), key=lambda at: -len(texts[at]))
    assert torch.equal(together, torch.cat([*(alone[at][-9:-8] for at in by_length), alone[0][-9:-2]]))


def test_what_is_not_finite_stays_in_its_own_sequence(
    peer: Any, paged: Any, load: Any, native: Any, tmp_path: Path
) -> None:
    peer(wide_config("llama, grouped heads"))
    weights = load(tmp_path, dtype="bf16")
    ours = paged(weights, model=native(weights, "int8", activations="int8"))
    texts = [some_tokens(50), some_tokens(30, seed=2)]
    alone = ours.feed(texts[1], [30])
    fed = [ours.sequence(), ours.sequence()]
    for sequence, text in zip(fed, texts, strict=True):
        ours.step([], [(sequence, text[:-1])])
    ours.arena[fed[0].blocks[1], 0, 0, 0, 3] = float("nan")  # one key of one head
    said = ours.said([(fed[0], texts[0][-1]), (fed[1], texts[1][-1])], [])
    assert said.finite.tolist() == [False, True]
    assert torch.equal(said.values[1], alone[-1])


def test_it_computes_with_what_it_says(peer: Any, paged: Any, load: Any, native: Any, tmp_path: Path) -> None:
    peer(wide_config("llama, grouped heads"))
    loaded = load_tiny("int4", "int8", path=tmp_path)
    assert loaded.how.endswith("% q8, activations int8")
    weights, tokens = load(tmp_path, dtype="bf16"), some_tokens(40)
    of_library = paged(weights, model=loaded.model).feed(tokens, [40])
    assert torch.equal(of_library, paged(weights, model=native(weights, "int4", activations="int8")).feed(tokens, [40]))
    assert "activations" not in load_tiny("int4", "bf16", path=tmp_path).how


# ---- had or refused ---------------------------------------------------------------------------------------------


def test_weights_of_bf16_are_refused_by_name_and_left_alone_by_auto(peer: Any, tmp_path: Path) -> None:
    peer(wide_config("llama, grouped heads"))
    with pytest.raises(UnsupportedModel, match=r"activations = int8: the weights lie in bf16.*set it to auto or bf16"):
        load_tiny("bf16", "int8", path=tmp_path)
    assert "activations bf16 (auto: the weights lie in bf16" in load_tiny("bf16", "auto", path=tmp_path).how


def test_a_processor_without_vnni_is_told_so(
    monkeypatch: pytest.MonkeyPatch, peer: Any, paged: Any, load: Any, native: Any, tmp_path: Path
) -> None:
    peer(wide_config("llama, grouped heads"))
    monkeypatch.setenv("CXX", "g++ -mno-avx512vnni")
    cache = tmp_path / "cache"
    with pytest.raises(UnsupportedModel, match="activations = int8: this processor lacks avx512_vnni; set it to auto"):
        load_tiny("int4", "int8", cache=cache, path=tmp_path)
    loaded = load_tiny("int4", "auto", cache=cache, path=tmp_path)
    assert loaded.how.endswith("activations bf16 (auto: this processor lacks avx512_vnni)")
    weights, tokens = load(tmp_path, dtype="bf16"), some_tokens(40)
    plain = paged(weights, model=native(weights, "int4")).feed(tokens, [40])
    assert torch.equal(paged(weights, model=loaded.model).feed(tokens, [40]), plain)


def test_without_the_kernels_int8_is_refused_and_auto_is_torch(
    monkeypatch: pytest.MonkeyPatch, peer: Any, tmp_path: Path
) -> None:
    peer(wide_config("llama, grouped heads"))
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(UnsupportedModel, match=r"activations = int8: .*/no/such/compiler.*set it to auto or bf16"):
        load_tiny("int4", "int8", cache=tmp_path / "cache", path=tmp_path)
    with pytest.raises(UnsupportedModel, match=r"engine.weights = int4: .*/no/such/compiler.*set it to auto or bf16"):
        load_tiny("int4", "auto", cache=tmp_path / "cache", path=tmp_path)
    assert isinstance(load_tiny("auto", "auto", cache=tmp_path / "cache", path=tmp_path).model, Model)


# ---- auto --------------------------------------------------------------------------------------------------------


def test_a_clock_that_sees_nothing_finds_both_ways_alike(
    monkeypatch: pytest.MonkeyPatch, library: ctypes.CDLL, peer: Any, load: Any, tmp_path: Path
) -> None:
    peer(wide_config("llama, grouped heads"))
    packed = pack_weights(library, load(tmp_path, dtype="bf16"), "int8", None)
    monkeypatch.setattr(activations.time, "thread_time", lambda: 0.0)
    assert chosen(library, packed, "auto", None).activations == "bf16"


def test_auto_measures_once_and_keeps_it(
    monkeypatch: pytest.MonkeyPatch, library: ctypes.CDLL, peer: Any, load: Any, tmp_path: Path
) -> None:
    peer(wide_config("llama, grouped heads"))
    packed = pack_weights(library, load(tmp_path, dtype="bf16"), "int8", None)
    kept = kept_pace(tmp_path / "cache", library, "digest", "int8")
    first = chosen(library, packed, "auto", kept)
    assert first.how.startswith(f", activations {first.activations} (auto: int8 has ")
    written = Pace(**json.loads(kept.read_text()))
    assert min(written) > 0
    monkeypatch.setattr(activations, "measured", lambda *_: pytest.fail("measured again"))
    assert chosen(library, packed, "auto", kept) == first
    # What can't be read is measured again; another form or model is another file.
    monkeypatch.setattr(activations, "measured", lambda *_: Pace(3.0, 2.0))
    kept.write_text("{")
    assert chosen(library, packed, "auto", kept).activations == "int8"
    assert json.loads(kept.read_text()) == {"many": 3.0, "single": 2.0}
    assert len({kept_pace(tmp_path, library, *of) for of in (("a", "int8"), ("a", "int4"), ("b", "int8"))}) == 3


@pytest.mark.parametrize(
    ("pace", "way"), [(Pace(1.5, 1.2), "int8"), (Pace(1.5, 0.5), "bf16"), (Pace(1.05, 2.0), "bf16")]
)
def test_auto_wants_many_rows_faster_and_one_no_slower(
    pace: Pace, way: str, library: ctypes.CDLL, peer: Any, load: Any, tmp_path: Path
) -> None:
    peer(wide_config("llama, grouped heads"))
    packed = pack_weights(library, load(tmp_path, dtype="bf16"), "int8", None)
    kept = kept_pace(tmp_path, library, "digest", "int8")
    kept.write_text(json.dumps(pace._asdict()))
    choice = chosen(library, packed, "auto", kept)
    assert choice.activations == way
    told = f"{pace.many:.2f}x the pace of bf16 for 60 rows, {pace.single:.2f}x for one"
    assert choice.how == f", activations {way} (auto: int8 has {told})"


def test_a_folder_that_cant_be_written_stops_nobody(
    monkeypatch: pytest.MonkeyPatch, library: ctypes.CDLL, peer: Any, load: Any, tmp_path: Path
) -> None:
    peer(wide_config("llama, grouped heads"))
    packed = pack_weights(library, load(tmp_path, dtype="bf16"), "int8", None)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(activations, "measured", lambda *_: Pace(3.0, 2.0))
    assert chosen(library, packed, "auto", tmp_path / "file" / "x.pace").activations == "int8"
