"""The values that cross a process: frozen, torch-free, picklable. Know no behaviour.

A request's life in types: `Request` (front → decode), `Placement` (scheduler → front),
`KvTicket` (decode → prefill), `KvParcel` (prefill → decode), `PrefillDone` (prefill → decode),
`Emission` and `Failure` (worker → front). A worker's: `WorkerInfo` once, then `Report`s.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from typing import Final, Literal, NamedTuple, NewType, TypeAlias

from diptych.errors import ServingError

RequestId = NewType("RequestId", str)
WorkerId = NewType("WorkerId", str)
FrontId = NewType("FrontId", str)
TransferId = NewType("TransferId", str)
BlockId = NewType("BlockId", int)
BlockHash = NewType("BlockHash", bytes)
"""The name of a KV block's content (diptych.hashing), 32 bytes: equal names mean equal bits."""

Role: TypeAlias = Literal["prefill", "decode", "mixed"]
How: TypeAlias = Literal["remote", "local", "mixed"]
"""remote: prefill and decode apart · local: the decode worker computed the prompt too ·
mixed: one worker of the mixed pool did both."""
Finish: TypeAlias = Literal["stop", "length"]
ModelDtype: TypeAlias = Literal["bf16", "fp32"]
KvDtype: TypeAlias = Literal["bf16", "fp32", "fp8"]
"""Numbers of the KV cache. fp8: e4m3 without scales; what is larger than 448 becomes 448."""
WeightFormat: TypeAlias = Literal["auto", "bf16", "int8", "int4", "fp8"]
"""auto: the file's own 4 or 8 bits where there is a kernel for them, which changes no number, else bf16."""
Activations: TypeAlias = Literal["bf16", "int8", "auto"]
"""auto: int8 where weights of 4 and 8 bits are multiplied faster so, by measurement, else bf16."""
GpuKernels: TypeAlias = Literal["auto", "reference", "triton"]
"""auto: triton where it is installed, else reference, which is plain torch."""
AttentionKernels: TypeAlias = Literal["auto", "triton", "flashinfer"]
"""auto: flashinfer where it is installed, agrees with triton and is faster, by trial, else triton."""
LinkKind: TypeAlias = Literal["loopback", "mapped", "nixl", "gloo", "nccl"]
Wire: TypeAlias = Literal["bf16", "fp32", "fp8", "int8", "fp8_e4m3"]
"""Numbers of KV on its way. fp8: a cache's own, as they lie; fp8_e4m3 and int8: rounded, with scales."""
Eviction: TypeAlias = Literal["reuse", "lru"]
"""`kv.eviction`."""
Verify: TypeAlias = Literal["off", "sample", "all"]


# ---- what a client asked for -----------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. Fronts validate; the engine trusts.

    The noise of a token is a pure function of (seed, choice, position): `seed` is always set,
    drawn once at the front when the client sent none.
    """

    max_tokens: int
    min_tokens: int = 0
    """Stop tokens can't be drawn, and stop strings don't count, while the answer has fewer."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is no limit."""
    min_p: float = 0.0
    """The least probability that is kept, as a share of the highest; 0 keeps all."""
    seed: int = 0
    """0 ≤ seed < 2**64."""
    repetition_penalty: float = 1.0
    """Above 1 makes every token of prompt and answer less likely, below 1 more."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that the answer has."""
    frequency_penalty: float = 0.0
    """Taken off the logit of a token for each time that the answer has it."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit); each token once."""
    allowed_token_ids: tuple[int, ...] = ()
    """Nothing else is drawn; each token once. Empty allows all."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Rows of tokens, none of which may come about, begun in the prompt or not."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer and are not part of it; the front adds the model's own."""
    include_stop: bool = False
    """The stop token or string is part of the answer."""
    logprobs: int | None = None
    """Each token carries its log-probability and so many of the best alternatives'."""
    prompt_logprobs: int | None = None
    """As `logprobs`, of the prompt's tokens but the first. The whole prompt is computed, cached or not."""
    fingerprint: bool = False
    """Each token carries a SHA-256 over the bits of the logits it came from."""
    forced: tuple[int, ...] = ()
    """Teacher forcing, for evaluation: these tokens are emitted in turn whatever the logits say,
    and each emission carries the token the logits would have chosen greedily."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One answer to compute: a tokenised prompt, its block names and how to sample.

    An answer that goes on elsewhere is a request whose prompt ends with what was said of it.
    """

    id: RequestId
    front: FrontId
    tokens: tuple[int, ...]
    granules: tuple[BlockHash, ...]
    """Names of the full 16-token granules of `tokens`; `root` is the name the chain starts from."""
    root: BlockHash
    params: SamplingParams
    said: int = 0
    """The last so many of `tokens` are the answer's: workers that were lost said them."""
    choice: int = 0
    priority: int = 0
    """Workers serve lower ones first, as vLLM does; -2**31 ≤ priority < 2**31."""
    arrived: float = 0.0
    """Unix seconds at the front."""


class CostTerm(NamedTuple):
    """One named part of a candidate's cost, in seconds."""

    name: str
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """One way the request could have been served."""

    prefill: WorkerId | None
    decode: WorkerId
    how: How
    terms: tuple[CostTerm, ...]

    @property
    def cost(self) -> float:
        """The sum of the terms."""
        return sum(term.value for term in self.terms)


class Prediction(NamedTuple):
    """What the scheduler expects of a placement, to be held against what comes about (`Outcome`)."""

    wait_seconds: float
    """Until the prompt's first token is computed: the queues before it."""
    ttft_seconds: float
    """From the placement to the first token."""
    itl_seconds: float
    """Mean, between the answer's tokens."""
    cached_tokens: int
    """Of the prompt, found in the cache of who computes it; fetched ones included."""
    transfer_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a request runs. A statement, not a reservation: it holds no block."""

    decode: WorkerId
    prefill: WorkerId | None
    """None when the decode worker computes the prompt itself."""
    how: How
    reason: str = ""
    candidates: tuple[Candidate, ...] = ()
    prefix_from: WorkerId | None = None
    """Whose cache gives the prompt's prefix to who computes the rest; None when nobody's pays."""
    predicted: Prediction | None = None
    priority: int | None = None
    """What workers order it by, when not its own: it goes before more important ones by its class's least share."""


# ---- what a client gets back -----------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """How an answer was made: the `diptych` extension of usage objects and final messages."""

    how: How
    prefill_worker: str
    decode_worker: str
    prompt_tokens_computed: int
    cached_tokens: int
    kv_blocks_sent: int = 0
    kv_bytes_sent: int = 0
    kv_seconds: float = 0.0
    """Its KV's way to decode, from the first parcel's word to the last one's landing."""
    kv_wait_seconds: float = 0.0
    """From the prompt's last computed token until its KV was whole at decode: what was not hidden."""


class TokenLogprobs(NamedTuple):
    """What the model gave one token: natural logarithms of the raw logits' softmax, before penalties
    and temperature."""

    logprob: float
    rank: int
    """1 is the most probable."""
    top: tuple[int, ...] = ()
    """The best tokens, the token itself perhaps among them, by falling probability."""
    top_logprobs: tuple[float, ...] = ()


class Emission(NamedTuple):
    """One token on its way to a front. Fenced by (request, attempt, choice, index)."""

    request: RequestId
    attempt: int
    choice: int
    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    """0 for the first generated token."""
    token: int
    """When `finish` is "stop" this is the stop token, which is not part of the answer."""
    finish: Finish | None = None
    served: Served | None = None
    """Set with `finish` (final) and with a worker's first token of the request (so far)."""
    fingerprint: bytes | None = None
    argmax: int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    """With index 0, when asked for: of the prompt's tokens but the first."""


class Outcome(NamedTuple):
    """How a placement went: a front's word to the scheduler when the request ended."""

    request: RequestId
    queue_seconds: float
    """From the front's question to the placement."""
    ttft_seconds: float | None
    """From the placement to the first token at the front; None when there was none."""
    itl_seconds: float | None
    """Mean, between tokens; None with fewer than two."""
    tokens: int
    served: Served | None
    error: str = ""
    """The error's class; empty when the answer is complete, "cancelled" when nobody wanted it any more."""


class Failure(NamedTuple):
    """A request that ended without its last token."""

    request: RequestId
    attempt: int
    error: ServingError


Outgoing: TypeAlias = Emission | Failure


# ---- the hand-off ----------------------------------------------------------------------------


_KV_BYTES: Final[dict[KvDtype, int]] = {"fp32": 4, "bf16": 2, "fp8": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """The shape of one block on one device, block outermost: [layers, 2, heads, block_size, head_dim].

    A worker has one layout per device: they differ in `shard` alone. With more shards than heads
    neighbours hold the same head.
    """

    layers: int
    kv_heads: int
    """Of the model: all shards together."""
    block_size: int
    head_dim: int
    dtype: KvDtype
    shard: int = 0
    shards: int = 1

    def __post_init__(self) -> None:
        heads, shards = self.kv_heads, self.shards
        if not 0 <= self.shard < shards or (heads % shards and shards % heads):
            raise ValueError(f"shard {self.shard} of {shards} does not share {heads} KV heads out evenly")

    @property
    def heads(self) -> range:
        """Which of the model's KV heads lie here."""
        first = self.shard * self.kv_heads // self.shards
        return range(first, first + max(1, self.kv_heads // self.shards))

    @property
    def block_shape(self) -> tuple[int, int, int, int, int]:
        """[layers, 2 (keys, values), heads, block_size, head_dim]."""
        return (self.layers, 2, len(self.heads), self.block_size, self.head_dim)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return prod(self.block_shape) * _KV_BYTES[self.dtype]

    @property
    def of_model(self) -> tuple[int, int, int, bool]:
        """Where two differ in this, KV can't pass between them. Block sizes, shards, and bf16 and fp32 are bridged.

        fp8 is not: its KV has other names, for keys and values of later layers come from rounded ones.
        """
        return self.layers, self.kv_heads, self.head_dim, self.dtype == "fp8"

    def all_shards(self) -> tuple[KvLayout, ...]:
        """Of all devices of this worker."""
        return tuple(replace(self, shard=shard) for shard in range(self.shards))


@dataclass(frozen=True, slots=True, kw_only=True)
class PairAddress:
    """Where the sender meets the receiver to build their two-rank process group."""

    host: str
    port: int
    key: str
    """Unique per (sender, receiver, both their epochs, a device of each)."""
    epoch: int
    """Counts rebuilds of this pair; tickets of an older epoch are dead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLeg:
    """The part of a hand-off that goes from one device of the sender to one of the receiver."""

    source: int
    """The sender's shard."""
    target: int
    """The receiver's shard."""
    first_head: int
    heads: int
    """[first_head, first_head + heads) of the model's KV heads, of every layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvTicket:
    """A promise of room: where a request's KV must land.

    KV travels in granules of 16 tokens, whatever the block sizes of the two sides. Granules
    [first, first + count) of the prompt are wanted: those before are there already, cached from
    an earlier request. The hand-off commits when all of them landed on all legs.
    """

    transfer: TransferId
    request: RequestId
    attempt: int
    receiver: WorkerId
    first: int
    count: int
    lease_seconds: float
    link: LinkKind
    wire: Wire
    legs: tuple[KvLeg, ...]
    addresses: tuple[PairAddress, ...]
    """Of each leg's pair."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvSource:
    """Leased blocks of the sender. Content counts if their generations are the same after it was read."""

    blocks: tuple[BlockId, ...]
    generations: tuple[int, ...]
    skip: int
    """Granules of the first block that are not meant."""
    first_head: int
    """Counted from the sender's shard's first."""
    heads: int
    wire: Wire

    def at(self, blocks: tuple[BlockId, ...]) -> KvSource:
        """The same, of a copy that lies in other blocks."""
        return replace(self, blocks=blocks)


@dataclass(frozen=True, slots=True, kw_only=True)
class NixlOffer:
    """Where NIXL finds a worker's arena."""

    metadata: bytes
    """Of its agent: how it is reached."""
    arena: int
    """Address of its first block."""
    generations: int
    """Address of the first block's generation, 8 bytes each."""
    blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KvOffer:
    """What a worker says to those who may receive from it."""

    worker: WorkerId
    epoch: int
    layout: KvLayout
    """Of its first shard; the others differ in nothing else."""
    device: str
    mapped: str = ""
    """The abstract Unix address where its arena may be had for reading; empty when it has none."""
    nixl: NixlOffer | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KvParcel:
    """The sender's word that one packed buffer is on its way, or may be read at its own."""

    transfer: TransferId
    leg: int
    """Which of the ticket's legs."""
    pair: str
    """The key of its pair's address: epochs of different pairs, and of a sender's incarnations, are alike."""
    epoch: int
    """The pair's."""
    sequence: int
    """Order on the pair: NCCL ignores tags, so order is the only match."""
    first: int
    """Offset into the ticket's granules."""
    count: int
    """Granules."""
    nbytes: int
    checksum: bytes | None = None
    source: KvSource | None = None
    """Where the receiver reads it, over links that read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillOrder:
    """What decode asks of prefill: the prompt's KV and the first token."""

    request: Request
    attempt: int
    decode: WorkerId
    prefix_from: WorkerId | None = None
    """Whose cache has more of the prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillDone:
    """Prefill's word that the prompt is computed and the first token on its way to the front."""

    first: Emission
    """As sent to the front. With a `finish` the answer is over and nothing more will be sent;
    without, decode sends it once more, for the front of a prefill worker that died meanwhile."""
    computed_tokens: int
    cached_tokens: int


# ---- what workers say of themselves ------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerInfo:
    """Said once, when a worker joins. A mismatch in build, model or layout is refused."""

    id: WorkerId
    role: Role
    epoch: int
    build: str
    model_digest: str
    layout: KvLayout
    blocks: int
    max_context: int
    """Longest prompt plus answer, in tokens, that this worker can ever hold."""
    device: str
    host: str
    pid: int
    threads: int
    computes: str = ""
    """With which kernels and weights, in words."""
    node: str = ""
    """Ray's id of the machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A worker's state at one moment."""

    waiting_requests: int = 0
    waiting_tokens: int = 0
    """Prompt tokens queued here and not yet computed."""
    running_requests: int = 0
    blocks_free: int = 0
    blocks_cached: int = 0
    """Not in use, content kept for reuse: can be taken like free ones."""
    blocks_held: int = 0
    """In use by running requests."""
    blocks_granted: int = 0
    """Promised to hand-offs under way (decode side)."""
    blocks_lent: int = 0
    """Held until a hand-off ends (prefill side)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counters:
    """Totals since the worker started; only ever grow."""

    steps: int = 0
    decode_steps: int = 0
    decode_rows: int = 0
    """Sum over decode steps of sequences decoded: occupancy is decode_rows / decode_steps."""
    prompt_tokens_computed: int = 0
    prompt_tokens_cached: int = 0
    tokens_emitted: int = 0
    requests_finished: int = 0
    requests_cancelled: int = 0
    preemptions: int = 0
    blocks_sent: int = 0
    bytes_sent: int = 0
    blocks_received: int = 0
    bytes_received: int = 0
    transfers_committed: int = 0
    transfers_failed: int = 0
    leaked_blocks: int = 0
    engine_cpu_seconds: float = 0.0
    cancel_steps_max: int = 0
    """Most engine steps that ended between a cancel's arrival at this worker and the release of what
    the request held here: the one figure that is no total."""


class Stored(NamedTuple):
    """These blocks' content is now here, in chain order."""

    hashes: tuple[BlockHash, ...]


class Evicted(NamedTuple):
    """These blocks' content is gone."""

    hashes: tuple[BlockHash, ...]


class Cleared(NamedTuple):
    """All cached content is gone."""


KvEvent: TypeAlias = Stored | Evicted | Cleared


class StepSample(NamedTuple):
    """One engine step as it was measured, or the mean of several alike: what rates are learned from."""

    steps: int
    prompt_tokens: float
    """Computed in the step."""
    prompt_pairs: float
    """Attention work of prompts: the sum over their tokens of the positions each one looks at."""
    decode_rows: float
    decode_context: float
    """Sum over decoded sequences of their length in tokens."""
    seconds: float
    """Wall clock, from plan to tokens."""


class TransferSample(NamedTuple):
    """One hand-off as the receiver saw it."""

    sender: WorkerId
    link: LinkKind
    nbytes: int
    seconds: float
    """From the first parcel's word to the last one's landing."""
    exposed_seconds: float
    """From prefill's last computed token to the commit: what was not hidden behind computing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A worker's load and what changed in its cache since its last report.

    `number` counts reports within an epoch from 0. When `full`, `events` is one `Stored` of all
    that is cached, and replaces whatever was believed before.
    """

    worker: WorkerId
    epoch: int
    number: int
    load: Load
    counters: Counters
    events: tuple[KvEvent, ...] = ()
    full: bool = False
    steps: tuple[StepSample, ...] = ()
    """Since the last report; a bounded number of samples stands for all steps."""
    transfers: tuple[TransferSample, ...] = ()


# ---- how a worker is made ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """All a worker needs to start. `epoch` counts the incarnations of its id."""

    id: WorkerId
    role: Role
    epoch: int
    model: ModelSource
    dtype: ModelDtype
    block_size: int
    memory_bytes: int
    """For KV blocks; 0 measures what is free."""
    max_batch_tokens: int
    max_running: int
    threads: int
    device: Literal["cpu", "cuda"]
    host: str
    """The node's address, which links bind and peers dial; empty to ask Ray."""
    link: LinkKind | Literal["auto"]
    """auto: what reads before what sends, where the two workers can."""
    wire: Literal["native", "int8", "fp8_e4m3"]
    """Of links that send; native is the narrower of the two sides' numbers."""
    verify: Verify
    secret: bytes
    """Keys the MAC of parcels under verify=all."""
    lease_seconds: float
    """How long a hand-off may go without a sign of progress."""
    cache: str
    """Folder for converted weights; empty for none."""
    weights: WeightFormat = "auto"
    activations: Activations = "bf16"
    kernels: GpuKernels = "auto"
    cuda_graphs: bool = True
    attention: AttentionKernels = "auto"
    eviction: Eviction = "lru"
    kv: Literal["auto", "fp8"] = "auto"
    """Numbers of the cache; auto is `dtype`."""

    @property
    def kv_dtype(self) -> KvDtype:
        """`kv` with `auto` decided."""
        return self.dtype if self.kv == "auto" else self.kv


# ---- what is done to a running cluster --------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainWorker:
    """Out of service, its answers handed over; then its end."""

    worker: WorkerId
    replace: bool = False
    """A successor takes its place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrainNode:
    """All workers of a Ray node out of service, because it is to go; their pools get others elsewhere."""

    node: str
    """Its address, or Ray's id of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SetWorkerRole:
    """What it does from now on; what it has begun it ends."""

    worker: WorkerId
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalePool:
    """To so many workers."""

    role: Role
    workers: int


Operation: TypeAlias = DrainWorker | DrainNode | SetWorkerRole | ScalePool


@dataclass(frozen=True, slots=True, kw_only=True)
class Changed:
    """What an operation did."""

    seconds: float
    moved: int = 0
    """Answers that went on elsewhere."""
    started: tuple[WorkerId, ...] = ()
    ended: tuple[WorkerId, ...] = ()


# ---- the model, as every process knows it --------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model resolved to local files: what `model.name` meant on this machine."""

    name: str
    path: str
    """A .gguf file, a folder, or `random:<shape>`."""
    digest: str
    """SHA-256 of the content, hexadecimal."""


# ---- the cluster, as the scheduler sees it ---------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """One worker in the scheduler's view."""

    info: WorkerInfo
    load: Load
    counters: Counters
    alive: bool
    report_age_seconds: float


class QueueStatus(NamedTuple):
    """Requests of one class of priority that wait for a placement. Totals only ever grow."""

    name: str
    length: int
    oldest_seconds: float
    released: int
    waited_seconds: float
    """Sum over those released."""
    rejected: tuple[tuple[str, int], ...]
    """By reason."""


class Accuracy(NamedTuple):
    """Sums over ended requests whose placement predicted something; they only ever grow."""

    outcomes: int = 0
    """Those that had a first token."""
    predicted_ttft_seconds: float = 0.0
    actual_ttft_seconds: float = 0.0
    ttft_error_seconds: float = 0.0
    """Of |predicted - actual|, here and below."""
    ttft_errors: tuple[int, ...] = ()
    """Outcomes by |predicted - actual| / actual: those up to each of TTFT_ERROR_BOUNDS, then all others."""
    itl_outcomes: int = 0
    actual_itl_seconds: float = 0.0
    itl_error_seconds: float = 0.0
    hit_outcomes: int = 0
    """Those that ran as they were placed."""
    predicted_hit_tokens: int = 0
    actual_hit_tokens: int = 0
    hits_missed_tokens: int = 0
    """Predicted to be cached and not found: the index said too much."""
    hits_unforeseen_tokens: int = 0
    """Found cached without having been predicted: the index said too little."""


TTFT_ERROR_BOUNDS = (0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0)
"""Of `Accuracy.ttft_errors`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacedAt:
    """One placement of a request, and when."""

    placement: Placement
    seconds: float
    """After it was asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """A decision's record: what was asked, where it ran and why, and how it went."""

    request: RequestId
    tenant: str
    priority: int
    prompt_tokens: int
    max_tokens: int
    ttft_seconds: float | None
    """What its sender wished, as the two that follow."""
    itl_seconds: float | None
    deadline_seconds: float | None
    age_seconds: float
    """Since it was asked for."""
    placements: tuple[PlacedAt, ...]
    """More than one when a worker was lost before it spoke. None: it waits, or nobody could take it."""
    refusal: str
    """Why it was not placed; empty when it was, or still waits."""
    outcome: Outcome | None
    ended_seconds: float | None
    """After it was asked for. None: it runs, or its front's word was lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscaleStatus:
    """What the autoscaler wants, and what it did. Totals only ever grow."""

    dry_run: bool
    wanted: tuple[tuple[Role, int], ...]
    """Workers of each role."""
    changes: tuple[tuple[str, int], ...]
    """Workers that got another role, came or went, by why; what would have been, in a dry run."""
    reversals: int
    """Moves of roles in the direction opposite to the last one's."""
    words: str
    """The last change and its reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterStatus:
    """What `diptych status`, `/metrics` and readiness are made of."""

    model: str
    build: str
    workers: tuple[WorkerStatus, ...]
    requests_placed: int
    index_blocks: int
    """Distinct block names in the prefix index."""
    queues: tuple[QueueStatus, ...] = ()
    """Of the scheduler, the most important class first."""

    accuracy: Accuracy = field(default_factory=Accuracy)
    decision_cpu_seconds: float = 0.0
    """CPU time of all decisions so far."""
    autoscale: AutoscaleStatus | None = None
    """None where it is off."""
    away: tuple[tuple[WorkerId, str], ...] = ()
    """Who should be there and isn't, for longer than a start takes, and why, in words."""
