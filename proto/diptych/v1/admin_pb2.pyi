from diptych.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_PREFILL: _ClassVar[Role]
    ROLE_DECODE: _ClassVar[Role]
    ROLE_MIXED: _ClassVar[Role]
ROLE_UNSPECIFIED: Role
ROLE_PREFILL: Role
ROLE_DECODE: Role
ROLE_MIXED: Role

class DrainRequest(_message.Message):
    __slots__ = ("worker", "replace", "node")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    worker: str
    replace: bool
    node: str
    def __init__(self, worker: _Optional[str] = ..., replace: _Optional[bool] = ..., node: _Optional[str] = ...) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("moved", "seconds", "ended")
    MOVED_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    moved: int
    seconds: float
    ended: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, moved: _Optional[int] = ..., seconds: _Optional[float] = ..., ended: _Optional[_Iterable[str]] = ...) -> None: ...

class SetRoleRequest(_message.Message):
    __slots__ = ("worker", "role")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    worker: str
    role: Role
    def __init__(self, worker: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ...) -> None: ...

class SetRoleResponse(_message.Message):
    __slots__ = ("seconds",)
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    def __init__(self, seconds: _Optional[float] = ...) -> None: ...

class ScaleRequest(_message.Message):
    __slots__ = ("role", "workers")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    role: Role
    workers: int
    def __init__(self, role: _Optional[_Union[Role, str]] = ..., workers: _Optional[int] = ...) -> None: ...

class ScaleResponse(_message.Message):
    __slots__ = ("started", "ended", "seconds")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    started: _containers.RepeatedScalarFieldContainer[str]
    ended: _containers.RepeatedScalarFieldContainer[str]
    seconds: float
    def __init__(self, started: _Optional[_Iterable[str]] = ..., ended: _Optional[_Iterable[str]] = ..., seconds: _Optional[float] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetStatusResponse(_message.Message):
    __slots__ = ("model", "build", "ready", "workers", "requests_placed", "index_blocks", "queues", "autoscale", "away")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BUILD_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_PLACED_FIELD_NUMBER: _ClassVar[int]
    INDEX_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    QUEUES_FIELD_NUMBER: _ClassVar[int]
    AUTOSCALE_FIELD_NUMBER: _ClassVar[int]
    AWAY_FIELD_NUMBER: _ClassVar[int]
    model: str
    build: str
    ready: bool
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    requests_placed: int
    index_blocks: int
    queues: _containers.RepeatedCompositeFieldContainer[QueueStatus]
    autoscale: AutoscaleStatus
    away: _containers.RepeatedCompositeFieldContainer[AwayWorker]
    def __init__(self, model: _Optional[str] = ..., build: _Optional[str] = ..., ready: _Optional[bool] = ..., workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., requests_placed: _Optional[int] = ..., index_blocks: _Optional[int] = ..., queues: _Optional[_Iterable[_Union[QueueStatus, _Mapping]]] = ..., autoscale: _Optional[_Union[AutoscaleStatus, _Mapping]] = ..., away: _Optional[_Iterable[_Union[AwayWorker, _Mapping]]] = ...) -> None: ...

class AwayWorker(_message.Message):
    __slots__ = ("id", "why")
    ID_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    id: str
    why: str
    def __init__(self, id: _Optional[str] = ..., why: _Optional[str] = ...) -> None: ...

class AutoscaleStatus(_message.Message):
    __slots__ = ("dry_run", "wanted", "changes", "reversals", "words")
    class WantedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class ChangesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    DRY_RUN_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    CHANGES_FIELD_NUMBER: _ClassVar[int]
    REVERSALS_FIELD_NUMBER: _ClassVar[int]
    WORDS_FIELD_NUMBER: _ClassVar[int]
    dry_run: bool
    wanted: _containers.ScalarMap[str, int]
    changes: _containers.ScalarMap[str, int]
    reversals: int
    words: str
    def __init__(self, dry_run: _Optional[bool] = ..., wanted: _Optional[_Mapping[str, int]] = ..., changes: _Optional[_Mapping[str, int]] = ..., reversals: _Optional[int] = ..., words: _Optional[str] = ...) -> None: ...

class QueueStatus(_message.Message):
    __slots__ = ("name", "length", "oldest_seconds", "released", "waited_seconds", "rejected")
    class RejectedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    NAME_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    OLDEST_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RELEASED_FIELD_NUMBER: _ClassVar[int]
    WAITED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    REJECTED_FIELD_NUMBER: _ClassVar[int]
    name: str
    length: int
    oldest_seconds: float
    released: int
    waited_seconds: float
    rejected: _containers.ScalarMap[str, int]
    def __init__(self, name: _Optional[str] = ..., length: _Optional[int] = ..., oldest_seconds: _Optional[float] = ..., released: _Optional[int] = ..., waited_seconds: _Optional[float] = ..., rejected: _Optional[_Mapping[str, int]] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("info", "load", "counters", "alive", "report_age_seconds")
    INFO_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    ALIVE_FIELD_NUMBER: _ClassVar[int]
    REPORT_AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    info: WorkerInfo
    load: WorkerLoad
    counters: WorkerCounters
    alive: bool
    report_age_seconds: float
    def __init__(self, info: _Optional[_Union[WorkerInfo, _Mapping]] = ..., load: _Optional[_Union[WorkerLoad, _Mapping]] = ..., counters: _Optional[_Union[WorkerCounters, _Mapping]] = ..., alive: _Optional[bool] = ..., report_age_seconds: _Optional[float] = ...) -> None: ...

class WorkerInfo(_message.Message):
    __slots__ = ("id", "role", "epoch", "build", "model_digest", "layout", "blocks", "max_context", "device", "host", "pid", "threads", "computes", "node")
    ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    BUILD_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    COMPUTES_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    id: str
    role: Role
    epoch: int
    build: str
    model_digest: str
    layout: KvLayout
    blocks: int
    max_context: int
    device: str
    host: str
    pid: int
    threads: int
    computes: str
    node: str
    def __init__(self, id: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., epoch: _Optional[int] = ..., build: _Optional[str] = ..., model_digest: _Optional[str] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ..., blocks: _Optional[int] = ..., max_context: _Optional[int] = ..., device: _Optional[str] = ..., host: _Optional[str] = ..., pid: _Optional[int] = ..., threads: _Optional[int] = ..., computes: _Optional[str] = ..., node: _Optional[str] = ...) -> None: ...

class KvLayout(_message.Message):
    __slots__ = ("layers", "kv_heads", "block_size", "head_dim", "dtype", "shard", "shards")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    layers: int
    kv_heads: int
    block_size: int
    head_dim: int
    dtype: str
    shard: int
    shards: int
    def __init__(self, layers: _Optional[int] = ..., kv_heads: _Optional[int] = ..., block_size: _Optional[int] = ..., head_dim: _Optional[int] = ..., dtype: _Optional[str] = ..., shard: _Optional[int] = ..., shards: _Optional[int] = ...) -> None: ...

class WorkerLoad(_message.Message):
    __slots__ = ("waiting_requests", "waiting_tokens", "running_requests", "blocks_free", "blocks_cached", "blocks_held", "blocks_granted", "blocks_lent")
    WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_HELD_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_GRANTED_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_LENT_FIELD_NUMBER: _ClassVar[int]
    waiting_requests: int
    waiting_tokens: int
    running_requests: int
    blocks_free: int
    blocks_cached: int
    blocks_held: int
    blocks_granted: int
    blocks_lent: int
    def __init__(self, waiting_requests: _Optional[int] = ..., waiting_tokens: _Optional[int] = ..., running_requests: _Optional[int] = ..., blocks_free: _Optional[int] = ..., blocks_cached: _Optional[int] = ..., blocks_held: _Optional[int] = ..., blocks_granted: _Optional[int] = ..., blocks_lent: _Optional[int] = ...) -> None: ...

class WorkerCounters(_message.Message):
    __slots__ = ("steps", "decode_steps", "decode_rows", "prompt_tokens_computed", "prompt_tokens_cached", "tokens_emitted", "requests_finished", "requests_cancelled", "preemptions", "blocks_sent", "bytes_sent", "blocks_received", "bytes_received", "transfers_committed", "transfers_failed", "leaked_blocks", "engine_cpu_seconds", "cancel_steps_max")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    DECODE_STEPS_FIELD_NUMBER: _ClassVar[int]
    DECODE_ROWS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_COMPUTED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_CACHED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_EMITTED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FINISHED_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_CANCELLED_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_SENT_FIELD_NUMBER: _ClassVar[int]
    BYTES_SENT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    BYTES_RECEIVED_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_COMMITTED_FIELD_NUMBER: _ClassVar[int]
    TRANSFERS_FAILED_FIELD_NUMBER: _ClassVar[int]
    LEAKED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ENGINE_CPU_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CANCEL_STEPS_MAX_FIELD_NUMBER: _ClassVar[int]
    steps: int
    decode_steps: int
    decode_rows: int
    prompt_tokens_computed: int
    prompt_tokens_cached: int
    tokens_emitted: int
    requests_finished: int
    requests_cancelled: int
    preemptions: int
    blocks_sent: int
    bytes_sent: int
    blocks_received: int
    bytes_received: int
    transfers_committed: int
    transfers_failed: int
    leaked_blocks: int
    engine_cpu_seconds: float
    cancel_steps_max: int
    def __init__(self, steps: _Optional[int] = ..., decode_steps: _Optional[int] = ..., decode_rows: _Optional[int] = ..., prompt_tokens_computed: _Optional[int] = ..., prompt_tokens_cached: _Optional[int] = ..., tokens_emitted: _Optional[int] = ..., requests_finished: _Optional[int] = ..., requests_cancelled: _Optional[int] = ..., preemptions: _Optional[int] = ..., blocks_sent: _Optional[int] = ..., bytes_sent: _Optional[int] = ..., blocks_received: _Optional[int] = ..., bytes_received: _Optional[int] = ..., transfers_committed: _Optional[int] = ..., transfers_failed: _Optional[int] = ..., leaked_blocks: _Optional[int] = ..., engine_cpu_seconds: _Optional[float] = ..., cancel_steps_max: _Optional[int] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("request_id",)
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    def __init__(self, request_id: _Optional[str] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("explanations",)
    EXPLANATIONS_FIELD_NUMBER: _ClassVar[int]
    explanations: _containers.RepeatedCompositeFieldContainer[Explanation]
    def __init__(self, explanations: _Optional[_Iterable[_Union[Explanation, _Mapping]]] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("request_id", "tenant", "priority", "prompt_tokens", "max_tokens", "wished_ttft_seconds", "wished_itl_seconds", "deadline_seconds", "age_seconds", "placements", "refusal", "outcome", "ended_seconds")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    WISHED_TTFT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    WISHED_ITL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    AGE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PLACEMENTS_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    ENDED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    tenant: str
    priority: int
    prompt_tokens: int
    max_tokens: int
    wished_ttft_seconds: float
    wished_itl_seconds: float
    deadline_seconds: float
    age_seconds: float
    placements: _containers.RepeatedCompositeFieldContainer[PlacedAt]
    refusal: str
    outcome: Outcome
    ended_seconds: float
    def __init__(self, request_id: _Optional[str] = ..., tenant: _Optional[str] = ..., priority: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., max_tokens: _Optional[int] = ..., wished_ttft_seconds: _Optional[float] = ..., wished_itl_seconds: _Optional[float] = ..., deadline_seconds: _Optional[float] = ..., age_seconds: _Optional[float] = ..., placements: _Optional[_Iterable[_Union[PlacedAt, _Mapping]]] = ..., refusal: _Optional[str] = ..., outcome: _Optional[_Union[Outcome, _Mapping]] = ..., ended_seconds: _Optional[float] = ...) -> None: ...

class PlacedAt(_message.Message):
    __slots__ = ("seconds", "how", "prefill_worker", "decode_worker", "prefix_from", "reason", "candidates", "predicted")
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    HOW_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKER_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_FIELD_NUMBER: _ClassVar[int]
    PREFIX_FROM_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    how: str
    prefill_worker: str
    decode_worker: str
    prefix_from: str
    reason: str
    candidates: _containers.RepeatedCompositeFieldContainer[Candidate]
    predicted: Prediction
    def __init__(self, seconds: _Optional[float] = ..., how: _Optional[str] = ..., prefill_worker: _Optional[str] = ..., decode_worker: _Optional[str] = ..., prefix_from: _Optional[str] = ..., reason: _Optional[str] = ..., candidates: _Optional[_Iterable[_Union[Candidate, _Mapping]]] = ..., predicted: _Optional[_Union[Prediction, _Mapping]] = ...) -> None: ...

class Candidate(_message.Message):
    __slots__ = ("how", "prefill_worker", "decode_worker", "cost_seconds", "terms")
    HOW_FIELD_NUMBER: _ClassVar[int]
    PREFILL_WORKER_FIELD_NUMBER: _ClassVar[int]
    DECODE_WORKER_FIELD_NUMBER: _ClassVar[int]
    COST_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    how: str
    prefill_worker: str
    decode_worker: str
    cost_seconds: float
    terms: _containers.RepeatedCompositeFieldContainer[CostTerm]
    def __init__(self, how: _Optional[str] = ..., prefill_worker: _Optional[str] = ..., decode_worker: _Optional[str] = ..., cost_seconds: _Optional[float] = ..., terms: _Optional[_Iterable[_Union[CostTerm, _Mapping]]] = ...) -> None: ...

class CostTerm(_message.Message):
    __slots__ = ("name", "seconds")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    seconds: float
    def __init__(self, name: _Optional[str] = ..., seconds: _Optional[float] = ...) -> None: ...

class Prediction(_message.Message):
    __slots__ = ("wait_seconds", "ttft_seconds", "itl_seconds", "cached_tokens", "transfer_bytes")
    WAIT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TTFT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ITL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_BYTES_FIELD_NUMBER: _ClassVar[int]
    wait_seconds: float
    ttft_seconds: float
    itl_seconds: float
    cached_tokens: int
    transfer_bytes: int
    def __init__(self, wait_seconds: _Optional[float] = ..., ttft_seconds: _Optional[float] = ..., itl_seconds: _Optional[float] = ..., cached_tokens: _Optional[int] = ..., transfer_bytes: _Optional[int] = ...) -> None: ...

class Outcome(_message.Message):
    __slots__ = ("queue_seconds", "ttft_seconds", "itl_seconds", "tokens", "served", "error")
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TTFT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    ITL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    SERVED_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    queue_seconds: float
    ttft_seconds: float
    itl_seconds: float
    tokens: int
    served: _inference_pb2.Served
    error: str
    def __init__(self, queue_seconds: _Optional[float] = ..., ttft_seconds: _Optional[float] = ..., itl_seconds: _Optional[float] = ..., tokens: _Optional[int] = ..., served: _Optional[_Union[_inference_pb2.Served, _Mapping]] = ..., error: _Optional[str] = ...) -> None: ...
