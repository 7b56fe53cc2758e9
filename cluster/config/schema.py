"""Every key there is, its type, its default and its limits. Knows no file and no environment."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator

from cluster.config.values import Address, parse_address, parse_labels, parse_size, parse_weights
from diptych.hashing import granules_per_block
from diptych.types import (
    Activations,
    AttentionKernels,
    Eviction,
    GpuKernels,
    KvDtype,
    ModelDtype,
    Role,
    Verify,
    WeightFormat,
)

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo


_ATTENTION_TOKENS = 256
"""Whole blocks have to fill it (kernels.reference.attention.SPLIT)."""


def _bytes_or_auto(value: object) -> object:
    size = parse_size(value) if isinstance(value, str) and value != "auto" else value
    if isinstance(size, int) and size <= 0:
        raise ValueError("should be more than 0 bytes")
    return size


def _not_bool(value: object) -> object:
    """TOML's true is a slip of the pen here; pydantic would take it for 1."""
    if isinstance(value, bool):
        raise ValueError("should be a number")
    return value


def _weights(value: object) -> object:
    return parse_weights(value) if isinstance(value, str) else value


def _address(text: str) -> str:
    return str(parse_address(text))


def _labels(text: str) -> str:
    return ",".join(f"{key}={value}" for key, value in parse_labels(text).items())


def _block_size(tokens: int) -> int:
    granules_per_block(tokens)
    if _ATTENTION_TOKENS % tokens:
        raise ValueError(f"should be 16, 32, 64, 128 or 256: attention reads {_ATTENTION_TOKENS} tokens at a time")
    return tokens


def _honoured(what: str, reason: str, *refused: str) -> AfterValidator:
    """Refuses values that the contract names and this version can't keep yet."""

    def check(value: str) -> str:
        if value in refused:
            raise ValueError(f"is not in this version: {reason}; {what} works")
        return value

    return AfterValidator(check)


Count: TypeAlias = Annotated[int, BeforeValidator(_not_bool), Field(ge=0)]
Positive: TypeAlias = Annotated[int, BeforeValidator(_not_bool), Field(gt=0)]
HostPort: TypeAlias = Annotated[str, AfterValidator(_address)]
Memory: TypeAlias = Annotated[Literal["auto"] | int, BeforeValidator(_bytes_or_auto), BeforeValidator(_not_bool)]


Weight: TypeAlias = Annotated[float, BeforeValidator(_not_bool), Field(gt=0)]
Weights: TypeAlias = Annotated[dict[str, Weight], BeforeValidator(_weights)]
Seconds: TypeAlias = Annotated[float, BeforeValidator(_not_bool), Field(ge=0)]
Share: TypeAlias = Annotated[float, BeforeValidator(_not_bool), Field(ge=0, le=0.5)]
Places: TypeAlias = Annotated[Positive, Field(le=30_000)]
"""Each holds a call to the scheduler open, which takes 100,000."""


class Section(BaseModel):
    """A table of diptych.toml: immutable, and strict about its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class Model(Section):
    """Which model, and in which numbers."""

    name: Annotated[str, Field(min_length=1)] = "smollm2-135m-instruct"
    """A known name, a .gguf file, a folder with safetensors, a Hugging Face id or random:SHAPE."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """auto is bf16; fp32 is batch-invariant: the same bits however a request is served."""

    @property
    def served_dtype(self) -> ModelDtype:
        """`dtype` with `auto` decided."""
        return "fp32" if self.dtype == "fp32" else "bf16"


class Pool(Section):
    """One pool of workers."""

    workers: Count = 1
    """How many workers it starts with."""
    max_workers: Count = 0
    """In a Ray that was joined: as many as its nodes have room for, up to so many; 0 keeps `workers`."""
    labels: Annotated[str, AfterValidator(_labels)] = ""
    """KEY=VALUE[,KEY=VALUE] that their nodes have (`ray start --labels`); a Ray of our own has none."""
    weights: WeightFormat | Literal[""] = ""
    """How its workers keep their weights; empty is engine.weights. KV may come from a pool that keeps them otherwise:
    answers then depend on who computed their prompt."""
    activations: Activations | Literal[""] = ""
    """What its workers multiply; empty is engine.activations."""

    @property
    def node_labels(self) -> dict[str, str]:
        """`labels`, taken apart."""
        return parse_labels(self.labels)

    @model_validator(mode="after")
    def _can_grow(self) -> Pool:
        if 0 < self.max_workers < self.workers:
            raise ValueError(
                f"max_workers = {self.max_workers} is below workers = {self.workers}: raise it, or leave it 0"
            )
        return self


class Pools(Section):
    """How many workers of which role."""

    prefill: Pool = Pool()
    decode: Pool = Pool()
    mixed: Pool = Pool(workers=0)

    def of(self, role: Role) -> Pool:
        """The one whose workers begin in this role."""
        return {"prefill": self.prefill, "decode": self.decode, "mixed": self.mixed}[role]

    @property
    def growing(self) -> list[Role]:
        """The pools that take what nodes offer."""
        roles: tuple[Role, ...] = ("prefill", "decode", "mixed")
        return [role for role in roles if self.of(role).max_workers]

    @model_validator(mode="after")
    def _can_serve(self) -> Pools:
        prefill, decode, mixed = self.prefill.workers, self.decode.workers, self.mixed.workers
        if mixed or (prefill and decode):
            return self
        raise ValueError(
            f"{prefill} prefill, {decode} decode and {mixed} mixed workers can't answer a request: "
            "have at least 1 prefill and 1 decode worker, or 1 mixed"
        )


class Front(Section):
    """Where clients reach the cluster."""

    http: HostPort = "127.0.0.1:8000"
    """HOST:PORT of the OpenAI API; port 0 takes a free one."""
    grpc: HostPort = "127.0.0.1:50051"
    """HOST:PORT of diptych.v1; port 0 takes a free one."""
    count: Positive = 1
    """Processes that answer clients, each on ports of its own: PORT, PORT + 1 and so on."""
    recovery_seconds: Annotated[float, BeforeValidator(_not_bool), Field(ge=0)] = 60.0
    """How long an answer that lost its worker waits for another one to go on with it."""

    @property
    def http_address(self) -> Address:
        """`http`, taken apart."""
        return parse_address(self.http)

    @property
    def grpc_address(self) -> Address:
        """`grpc`, taken apart."""
        return parse_address(self.grpc)


class Kv(Section):
    """The KV cache and how it crosses from prefill to decode."""

    block_size: Annotated[Positive, AfterValidator(_block_size)] = 16
    """Tokens per block: 16, 32, 64, 128 or 256."""
    memory: Memory = "auto"
    """Of each worker's cache: auto, bytes, or a size like 512MiB."""
    dtype: Literal["auto", "fp8"] = "auto"
    """Numbers of the cache: auto is the model's; fp8 (e4m3, no scales, at most ±448) takes half the memory of bf16 and
    half the way to decode, and rounds."""
    link: Annotated[
        Literal["auto", "loopback", "mapped", "nixl", "gloo", "nccl"],
        _honoured(
            "auto, mapped, nixl, gloo or nccl",
            "it needs both roles in one process, and each worker has its own",
            "loopback",
        ),
    ] = "auto"
    """auto is mapped between workers that can map each other's memory, nccl between other GPUs, else gloo.
    nixl needs the nixl package."""
    wire: Literal["native", "int8", "fp8_e4m3"] = "native"
    """Number format of blocks on their way over gloo and nccl; a mapped block is read as it is."""
    verify: Verify = "sample"
    """Which transferred buffers carry a checksum."""
    eviction: Eviction = "lru"
    """Which unused content yields first: reuse is what is least likely to be used again, as learned from what
    was; lru what is unused for longest."""
    lease_seconds: Annotated[float, BeforeValidator(_not_bool), Field(gt=0)] = 10.0
    """A hand-off that takes longer is given up and its blocks return."""


class PlacementSection(Section):
    """Where a request runs."""

    how: Literal["auto", "remote", "local"] = "auto"
    """remote: always hand over from prefill; local: decode computes every prompt itself."""


class QueueSection(Section):
    """How many requests of each class of priority may wait; further ones are refused."""

    high: Places = 1024
    """Priorities below 0."""
    normal: Places = 1024
    """Priority 0."""
    low: Places = 1024
    """Priorities above 0."""


class LeastShareSection(Section):
    """What a class gets of all work, however many more important requests come."""

    normal: Share = 0.1
    """Priority 0; at most 0.5."""
    low: Share = 0.05
    """Priorities above 0; at most 0.5."""


class AdmissionSection(Section):
    """Who waits for a worker, and in which order."""

    queue: QueueSection = QueueSection()
    least_share: LeastShareSection = LeastShareSection()
    weights: Weights = {}
    """Of tenants' shares, as a table or as `gold=3,free=0.5`; 1 for those not named."""
    ttft_seconds: Seconds = 2.0
    """Wished for the first token, where a request wishes nothing itself …"""
    ttft_seconds_per_token: Seconds = 0.00015
    """… and what each prompt token adds to it."""
    give_up: Seconds = 0.0
    """Refuse a request whose first token is predicted later than so many times its wish; 0 never does."""


class Engine(Section):
    """What one worker takes on at a time."""

    max_batch_tokens: Positive = 512
    """Tokens computed in one step."""
    max_running: Positive = 64
    """Sequences in one worker."""
    threads: Annotated[Count, Field(le=1024)] = 0
    """CPU threads of each worker's engine; 0 shares the cores out."""
    gpus: Annotated[float, BeforeValidator(_not_bool), Field(ge=0)] = 0.0
    """GPUs of each worker, 0.5 for a half; 0 shares out those that Ray has when it is asked: where nodes come later,
    say it."""
    weights: Literal["auto", "bf16", "int8", "int4", "fp8"] = "auto"
    """How a bf16 model's weights are kept. auto, on a CPU, is the file's own 4 or 8 bits where it has them, else bf16,
    and changes no number. int8 and int4 round what the file has in more. A GPU knows bf16, int8 and fp8."""
    activations: Activations = "bf16"
    """What a bf16 model's weights of 4 and 8 bits are multiplied with on a CPU. int8 rounds a row in groups of 32, and
    wants AVX512-VNNI; auto measures which is faster when a worker starts."""
    kernels: GpuKernels = "auto"
    """Of a bf16 model on a GPU: auto is triton where it is installed, else reference, which is plain torch."""
    cuda_graphs: bool = True
    """With triton: decode steps as CUDA graphs, one for each size of batch."""
    attention: AttentionKernels = "auto"
    """With triton: auto tries flashinfer where it is installed, and takes it where it agrees and is faster. CUDA graphs
    decode with triton's."""


class AutoscalePoolSection(Section):
    """Of the workers with one role."""

    least: Positive = 1
    """So many at least."""
    most: Count = 0
    """So many at most; 0 has no limit of its own."""

    @model_validator(mode="after")
    def _bounds(self) -> AutoscalePoolSection:
        if 0 < self.most < self.least:
            raise ValueError(f"most = {self.most} is below least = {self.least}: raise it, or leave it 0")
        return self


class AutoscaleSection(Section):
    """Roles and numbers of workers that follow the load; mixed workers are left alone."""

    enabled: bool = False
    """Move workers between prefill and decode, and then change how many there are."""
    dry_run: bool = False
    """Only say what it would do."""
    interval_seconds: Annotated[float, BeforeValidator(_not_bool), Field(ge=0.05)] = 1.0
    """Between two looks at the load."""
    busy: Annotated[float, BeforeValidator(_not_bool), Field(gt=0, le=2)] = 0.85
    """A role with more load than this, of 1 that it can bear, is short of workers."""
    calm: Annotated[float, BeforeValidator(_not_bool), Field(ge=0, lt=1)] = 0.5
    """With less load than this, all together are one worker too many."""
    window_seconds: Seconds = 4.0
    """What is asked for is averaged over so long."""
    hold_seconds: Seconds = 2.0
    """A role is short for so long before workers come to it."""
    settle_seconds: Seconds = 30.0
    """After a move, so long none goes the other way."""
    grow_seconds: Seconds = 15.0
    """A worker more comes when roles couldn't help for so long."""
    shrink_seconds: Seconds = 120.0
    """A worker less stays when all were calm for so long."""
    itl_seconds: Annotated[float, BeforeValidator(_not_bool), Field(gt=0)] = 0.1
    """Wished between an answer's tokens: a decode worker whose steps take longer is short of help."""
    decode_per_prefill: Seconds = 0.25
    """At least so many decode workers for each prefill worker: their links take in what those send."""
    least: Count = 0
    """Of both roles together; 0 is as many as the cluster starts with."""
    most: Count = 0
    """Of both roles together; 0 is as many as the cluster starts with."""
    prefill: AutoscalePoolSection = AutoscalePoolSection()
    decode: AutoscalePoolSection = AutoscalePoolSection()

    @model_validator(mode="after")
    def _in_order(self) -> AutoscaleSection:
        if self.calm >= self.busy:
            raise ValueError(f"calm = {self.calm:g} has to be below busy = {self.busy:g}: workers would come and go")
        return self

    def workers(self, begins: int) -> tuple[int, int]:
        """The fewest and the most, of both roles, in a cluster that starts with so many."""
        return self.least or begins, self.most or begins


class Cluster(Section):
    """The cluster as a whole."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")] = "diptych"
    """What a detached cluster is called: `diptych status --name`, `diptych stop --name`."""
    max_deaths: Positive = 5
    """A worker, a front or the scheduler that dies more often within ten minutes stays away."""
    drain_seconds: Annotated[float, BeforeValidator(_not_bool), Field(gt=0)] = 120.0
    """How long a worker that drains waits for those who still need its KV."""
    room_seconds: Annotated[float, BeforeValidator(_not_bool), Field(gt=0)] = 60.0
    """How long a Ray that isn't ours may take to find room for a worker; an autoscaler may need minutes."""
    grace_seconds: Count = 3
    """How long answers under way may go on when the cluster is told to stop; in a Ray job at most 1."""


class Log(Section):
    """What is written to stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least important message that is written; debug shows Ray's own lines too."""
    format: Literal["text", "json"] = "text"
    """text is for people; json is one object a line."""
    prompts: bool = False
    """Write the text of prompts and answers: for debugging, with their authors' consent."""


class Config(Section):
    """Everything that can be set."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is cuda where there is one."""
    model: Model = Model()
    pools: Pools = Pools()
    front: Front = Front()
    kv: Kv = Kv()
    placement: PlacementSection = PlacementSection()
    admission: AdmissionSection = AdmissionSection()
    engine: Engine = Engine()
    autoscale: AutoscaleSection = AutoscaleSection()
    cluster: Cluster = Cluster()
    log: Log = Log()

    _origins: dict[str, str] = PrivateAttr(default_factory=dict[str, str])

    @model_validator(mode="after")
    def _agree(self) -> Config:
        pools = self.pools
        if self.autoscale.enabled and not self.admission.ttft_seconds:
            raise ValueError("autoscale.enabled needs admission.ttft_seconds above 0: prompts' load is measured by it")
        if self.placement.how == "remote" and not (pools.prefill.workers and pools.decode.workers):
            raise ValueError(
                f"placement.how = 'remote' needs prefill and decode workers, not {pools.prefill.workers} and "
                f"{pools.decode.workers}: have both, or set placement.how to auto"
            )
        for problem in _ports_problems(self.front):
            raise ValueError(problem)
        if self.autoscale.enabled and (problem := _bounds_problem(self.autoscale, pools)):
            raise ValueError(problem)
        if self.autoscale.enabled and (growing := pools.growing):
            raise ValueError(
                f"autoscale.enabled and pools.{growing[0]}.max_workers both say how many workers there are: set "
                "autoscale.most instead of max_workers, or leave autoscale off"
            )
        if self.kv.link == "nccl" and self.device == "cpu":
            raise ValueError("kv.link = 'nccl' needs CUDA workers, but device is cpu: set kv.link to auto")
        if self.kv.dtype == "fp8" and self.kv.wire != "native":
            raise ValueError(
                f"kv.wire = '{self.kv.wire}' would round what kv.dtype = 'fp8' has in 8 bits already, and send more: "
                "leave kv.wire native"
            )
        for problem in _numbers_problems(self):
            raise ValueError(problem)
        if self.engine.kernels == "triton" and self.device == "cpu":
            raise ValueError("engine.kernels = 'triton' needs CUDA workers, but device is cpu: set it to auto")
        if problem := _attention_problem(self):
            raise ValueError(problem)
        return self

    @property
    def kv_dtype(self) -> KvDtype:
        """`kv.dtype` with `auto` decided."""
        return self.model.served_dtype if self.kv.dtype == "auto" else self.kv.dtype

    def weights_of(self, role: Role) -> WeightFormat:
        """Of this pool's workers."""
        pool: Pool = getattr(self.pools, role)
        return pool.weights or self.engine.weights

    def activations_of(self, role: Role) -> Activations:
        """Of this pool's workers."""
        pool: Pool = getattr(self.pools, role)
        return pool.activations or self.engine.activations

    def model_post_init(self, context: Any, /) -> None:  # noqa: ANN401  (pydantic's signature)
        self._origins = dict(context or {})

    def origin(self, key: str) -> str:
        """Where the value of a dotted key came from: a file, a variable, a flag or `default`."""
        return self._origins.get(key, "default")


def _bounds_problem(told: AutoscaleSection, pools: Pools) -> str:
    """Of bounds that no number of workers keeps."""
    begins = pools.prefill.workers + pools.decode.workers
    least, most = told.workers(begins)
    of_most = f"autoscale.most = {most}" if told.most else f"{most}, which is what the cluster starts with"
    if least > most:
        return f"autoscale.least = {least} is above {of_most}: set autoscale.most to {least} or more"
    if (wanted := told.prefill.least + told.decode.least) > most:
        return (
            f"autoscale.prefill.least + autoscale.decode.least = {wanted} is above {of_most}: set autoscale.most to "
            f"{wanted} or more"
        )
    if not begins:
        return "autoscale.enabled has nobody to move or add: mixed workers are left alone"
    if least > begins:
        return f"autoscale.least = {least} is above the {begins} workers that the cluster starts with: start as many"
    for role, bounds, pool in (("prefill", told.prefill, pools.prefill), ("decode", told.decode, pools.decode)):
        if pool.workers < bounds.least:
            return (
                f"autoscale.{role}.least = {bounds.least} is above pools.{role}.workers = {pool.workers}: start as many"
            )
        if bounds.most and pool.workers > bounds.most:
            return f"autoscale.{role}.most = {bounds.most} is below pools.{role}.workers = {pool.workers}: start fewer"
    return ""


def _ports_problems(front: Front) -> Iterator[str]:
    """Several fronts take that many ports from each address on."""
    http, grpc = front.http_address.port, front.grpc_address.port
    for what, port in (("http", http), ("grpc", grpc)):
        if port and port + front.count - 1 > 65535:
            yield f"front.count = {front.count} needs ports {port}…{port + front.count - 1}: lower front.{what}"
    same_host = front.http_address.host == front.grpc_address.host
    if http and grpc and http != grpc and same_host and abs(http - grpc) < front.count:
        yield (
            f"front.count = {front.count} puts HTTP on {http}…{http + front.count - 1} and gRPC on "
            f"{grpc}…{grpc + front.count - 1}, which overlap: move front.http or front.grpc"
        )


def _numbers_problems(config: Config) -> Iterator[str]:
    """Weights and activations that a device lacks, or that don't go together."""
    pools: dict[Role, Pool] = {
        "prefill": config.pools.prefill,
        "decode": config.pools.decode,
        "mixed": config.pools.mixed,
    }
    for place, said in {"engine": config.engine, **{f"pools.{role}": pool for role, pool in pools.items()}}.items():
        if said.weights == "fp8" and config.device == "cpu":
            yield f"{place}.weights = 'fp8' needs CUDA workers, but device is cpu: int8 works on both"
        if said.weights == "int4" and config.device == "cuda":
            yield f"{place}.weights = 'int4' needs CPU workers, but device is cuda: int8 works on both"
        if said.activations == "int8" and config.device == "cuda":
            yield (
                f"{place}.activations = 'int8' needs CPU workers, but device is cuda: leave it bf16, a GPU with "
                "weights = 'int8' rounds them itself"
            )
    if config.model.served_dtype == "fp32":
        return  # which rounds nothing
    for role in pools:
        if config.activations_of(role) == "int8" and config.weights_of(role) == "bf16":
            yield (
                f"{role} workers would multiply activations of int8 with weights of bf16: set engine.weights (or "
                f"pools.{role}.weights) to auto, int8 or int4, or activations to bf16"
            )


def _attention_problem(config: Config) -> str:
    """Of attention that was asked for by name where nothing computes so."""
    asked = config.engine.attention
    if asked == "auto":
        return ""
    if config.device == "cpu":
        return f"engine.attention = '{asked}' needs CUDA workers, but device is cpu: set it to auto"
    if config.engine.kernels == "reference":
        return (
            f"engine.attention = '{asked}' goes with Triton's kernels, but engine.kernels is reference: set one of "
            "them to auto"
        )
    if asked == "flashinfer" and config.kv.dtype == "fp8":
        return "engine.attention = 'flashinfer' reads KV in the model's numbers, but kv.dtype is fp8: set one to auto"
    return ""


def keys(section: type[BaseModel] = Config, prefix: str = "") -> dict[str, FieldInfo]:
    """Every settable key, dotted, in the order of the schema."""
    found: dict[str, FieldInfo] = {}
    for name, field in section.model_fields.items():
        inner = _section_of(field)
        found |= {prefix + name: field} if inner is None else keys(inner, f"{prefix}{name}.")
    return found


def sections(section: type[BaseModel] = Config, prefix: str = "") -> set[str]:
    """Every dotted name that holds keys instead of a value."""
    found: set[str] = set()
    for name, field in section.model_fields.items():
        inner = _section_of(field)
        if inner is not None:
            found |= {prefix + name} | sections(inner, f"{prefix}{name}.")
    return found


def values(config: Config) -> dict[str, object]:
    """The effective value of every key."""
    return {key: _value(config.model_dump(), key) for key in keys()}


def _section_of(field: FieldInfo) -> type[Section] | None:
    kind: object = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, Section) else None


def _value(tree: Mapping[str, Any], key: str) -> object:
    head, _, rest = key.partition(".")
    return _value(tree[head], rest) if rest else tree[head]
