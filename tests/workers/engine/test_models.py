"""Every architecture gives the logits that transformers gives, in whatever pieces its tokens come."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import DynamicCache

from tests.workers.engine.tiny_models import CASES, config_of, llama_rope, logits_of, some_tokens

TOLERANCE = 1e-4
LENGTH = 560
"""Two splits of 256 keys and some: windows leave whole splits behind."""


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_of_transformers(case: str, peer: Any, paged: Any, load: Any, tmp_path: Any) -> None:
    theirs = logits_of(peer(config_of(case)), tokens := some_tokens(LENGTH))
    assert theirs.std() > 0.3, "the comparison means nothing if nothing is said"
    ours = paged(load(tmp_path))
    whole = ours.feed(tokens, [LENGTH])
    torch.testing.assert_close(whole, theirs, atol=TOLERANCE, rtol=0)
    # Chunks and single tokens are the same numbers, to the bit.
    assert torch.equal(ours.feed(tokens, [1, 15, 37, 3, 200, 16, 280]), whole)
    assert torch.equal(ours.feed(tokens, [100, 410]), whole)


@pytest.mark.parametrize("case", CASES)
def test_a_batch_changes_no_bit(case: str, peer: Any, paged: Any, load: Any, tmp_path: Any) -> None:
    peer(config_of(case))
    ours = paged(load(tmp_path))
    texts = [some_tokens(length, seed=length) for length in (540, 300, 20)]
    alone = [ours.feed(text, [len(text)]) for text in texts]
    fed = [ours.sequence() for _ in texts]
    for sequence, text in zip(fed, texts, strict=True):
        ours.step([], [(sequence, text[:-9])])
    # The two longer ones decode, the shortest goes on with its prompt.
    rows = [text[-9:] for text in texts]
    together = ours.step([(fed[0], rows[0][0]), (fed[1], rows[1][0])], [(fed[2], rows[2][:5])])
    expected = [alone[0][-9:-8], alone[1][-9:-8], alone[2][-9:-4]]
    assert torch.equal(together, torch.cat(expected))
    together = ours.step([(fed[1], rows[1][1]), (fed[2], rows[2][5]), (fed[0], rows[0][1])], [])
    assert torch.equal(together, torch.cat([alone[0][-8:-7], alone[1][-8:-7], alone[2][-4:-3]]))


def test_a_dynamic_rope_past_its_length_is_that_of_transformers_fed_token_by_token(
    peer: Any, paged: Any, load: Any, tmp_path: Any
) -> None:
    name, fields = llama_rope(rope_type="dynamic", factor=2.0)
    model = peer(getattr(transformers, name)(**fields | {"max_position_embeddings": 64}))
    tokens, cache, theirs = some_tokens(120), DynamicCache(config=model.config), list[torch.Tensor]()
    for token in tokens:
        with torch.no_grad():
            theirs.append(model(torch.tensor([[token]]), past_key_values=cache).logits[0])
    weights = load(tmp_path)
    assert weights.config.context == 128
    ours = paged(weights)
    whole = ours.feed(tokens, [120])
    torch.testing.assert_close(whole, torch.cat(theirs), atol=TOLERANCE, rtol=0)
    assert torch.equal(ours.feed(tokens, [70, 30]), whole)


def test_a_window_leaves_old_keys_unread(paged: Any, load: Any) -> None:
    """Blocks that all windows have passed may hold anything finite."""
    ours = paged(load("random:tiny-mistral"))
    tokens = some_tokens(400, below=320)
    sequence = ours.sequence()
    ours.step([], [(sequence, tokens[:399])])
    kept = ours.arena.clone()
    ours.arena[sequence.blocks[: (400 - 48) // 16]] = 1e3
    spoiled = ours.step([(sequence, tokens[399])], [])
    ours.arena.copy_(kept)
    sequence.tokens.pop()
    assert torch.equal(ours.step([(sequence, tokens[399])], []), spoiled)


OLD_NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, grouped heads": ("rope_theta", {"rope_parameters": ..., "rope_theta": 10000.0, "head_dim": ...}),
    "llama, linear": (
        "type",
        {"rope_parameters": ..., "rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    ),
    "llama, llama3": (
        "rope_type",
        {
            "rope_parameters": ...,
            "rope_scaling": {
                "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        },
    ),
    "qwen2": ("torch_dtype", {"layer_types": ..., "torch_dtype": "float32", "dtype": ..., "use_mrope": False}),
    "qwen2, tied, later layers slide": ("max_window_layers", {"layer_types": ...}),
    "gemma2": ("hidden_act", {"layer_types": ..., "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": ...}),
    "gemma3": (
        "rope_local_base_freq",
        {
            "layer_types": ..., "rope_parameters": ..., "_sliding_window_pattern": ..., "sliding_window_pattern": 6,
            "rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "cache_implementation": "hybrid",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OLD_NAMES)
def test_older_names_of_the_fields_mean_the_same(
    case: str, peer: Any, load: Callable[..., Any], edit_config: Callable[..., None], tmp_path: Any
) -> None:
    peer(config_of(case))
    new = load(tmp_path).config
    edit_config(**OLD_NAMES[case][1])
    assert load(tmp_path).config == new


@pytest.mark.parametrize(
    "shape", ["tiny-llama", "tiny-llama-yarn", "tiny-mistral", "tiny-qwen2", "tiny-qwen3", "tiny-gemma2", "tiny-gemma3"]
)
def test_random_shapes_run_in_bf16(shape: str, paged: Any, load: Any) -> None:
    logits = paged(load(f"random:{shape}", dtype="bf16")).feed(some_tokens(300, below=320), [200, 90])
    assert torch.isfinite(logits).all()
    assert logits.std() > 0.1
