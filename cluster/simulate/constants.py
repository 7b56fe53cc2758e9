"""What a simulated cluster is made of: pools, rates, links, limits, and the SLO. Read from a JSON file; knows no clock.

The defaults are those of a dense 8B model (32 layers, hidden size 4096, 8 KV heads of 128, bf16) on H200-like GPUs:
derived from 16 GB of weights, 4.3 TB/s and 500 TFLOP/s, not measured.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from diptych.types import Eviction

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
AtLeastOne = Annotated[int, Field(ge=1)]


class ConstantsError(ValueError):
    """A file of constants that can't be used, and why."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Workers(_Part):
    """How many of each role."""

    prefill: Count = 16
    decode: Count = 16
    mixed: Count = 0


class PrefillRates(_Part):
    """Of a step with prompts: base + (linear_flops new + attention_flops new (cached + new/2)) / flops seconds."""

    formula: str = ""
    base: NotNegative = 0.005
    linear_flops: Positive = 1.606e10
    attention_flops: NotNegative = 524288
    flops: Positive = 5.0e14


class DecodeRates(_Part):
    """Seconds of a step that decodes: base + per_sequence batch + per_kv_token (tokens of KV read)."""

    formula: str = ""
    base: NotNegative = 0.0045
    per_sequence: NotNegative = 2.0e-5
    per_kv_token: NotNegative = 3.05e-8


class Link(_Part):
    """Of one worker, each way."""

    bytes_per_second: Positive = 1.25e10
    latency_seconds: NotNegative = 0.001
    per: str = "worker, full duplex"


class TraceHints(_Part):
    """What the rates' author says of the trace they are for; the readers find it out themselves."""

    block_tokens: int | None = None
    bin_seconds: float | None = None
    spread: str = ""
    requests: Annotated[int, Field(ge=1)] | None = None
    """Only the trace's first so many."""


class Slo(_Part):
    """A request is good when its first token comes in time and its mean time between tokens is short enough."""

    ttft_seconds: Positive = 2.0
    ttft_seconds_per_1000_prompt_tokens: NotNegative = 0.15
    mean_itl_seconds: Positive = 0.025
    share: Annotated[float, Field(gt=0, le=1)] = 0.9
    """Of good requests, that a cluster has to keep."""

    def ttft_limit(self, prompt_tokens: int) -> float:
        """In seconds."""
        return self.ttft_seconds + self.ttft_seconds_per_1000_prompt_tokens * prompt_tokens / 1000


class Placement(_Part):
    """Of placement alone: instances of blocks that each compute so many tokens a second."""

    instances: AtLeastOne = 4
    blocks: AtLeastOne = 5000
    tokens_per_second: Positive = 12_000.0


class Autoscale(_Part):
    """Whether roles follow the load; what is not here is as in a real cluster."""

    enabled: bool = False
    interval_seconds: Positive = 1.0
    busy: Positive = 0.85
    window_seconds: Positive = 4.0
    hold_seconds: NotNegative = 2.0
    settle_seconds: NotNegative = 30.0
    decode_per_prefill: NotNegative = 0.25


class Constants(_Part):
    """Everything about the cluster but who decides."""

    about: str = ""
    workers: Workers = Workers()
    kv_bytes_per_token: AtLeastOne = 131072
    kv_tokens_per_worker: AtLeastOne = 800_000
    prefill_seconds: PrefillRates = PrefillRates()
    decode_step_seconds: DecodeRates = DecodeRates()
    max_decode_batch: AtLeastOne = 256
    link: Link = Link()
    trace: TraceHints = TraceHints()
    slo: Slo = Slo()
    placement: Placement = Placement()
    how: Literal["auto", "remote", "local"] = "auto"
    """`placement.how` of ours."""
    autoscale: Autoscale = Autoscale()
    """Of ours."""
    prefill_chunk_tokens: AtLeastOne = 2048
    """Prompt tokens in one step of a prefill worker."""
    decode_chunk_tokens: AtLeastOne = 512
    """Tokens in one step of a worker that decodes, when prompts are computed there too."""
    eviction: Eviction = "lru"
    """Of all workers, whoever places."""
    report_delay_seconds: NotNegative = 0.002
    """From a worker's report to the scheduler's knowing."""
    death_seconds: NotNegative = 0.1
    """From a worker's death to its peers' and the scheduler's knowing."""


def read_constants(path: str | None, settings: Mapping[str, str] | None = None) -> Constants:
    """Of a JSON file in the shape of `Constants` or the defaults, changed by dotted keys. Raises ConstantsError."""
    told: dict[str, Any] = _contents(path) if path else {}
    for key, value in (settings or {}).items():
        _set(told, key, value)
    try:
        return Constants.model_validate(told)
    except ValidationError as error:
        [first, *_] = error.errors()
        where = ".".join(map(str, first["loc"]))
        raise ConstantsError(f"{path or 'constants'}: {where}: {first['msg']}") from error


def _contents(path: str) -> dict[str, Any]:
    try:
        told: Any = json.loads(Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise ConstantsError(f"{path} can't be read: {error}") from error
    if not isinstance(told, dict):
        raise ConstantsError(f"{path} is not a JSON object")
    return cast("dict[str, Any]", told)


def _set(told: dict[str, Any], key: str, value: str) -> None:
    known = list(_keys(Constants))
    if key not in known:
        near = get_close_matches(key, known, 1, 0.0)
        raise ConstantsError(f"{key} is no constant; the nearest is {near[0]}")
    *sections, name = key.split(".")
    for section in sections:
        told = told.setdefault(section, {})
    told[name] = value


def _keys(part: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in part.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, _Part):
            yield from _keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name
