"""What a cluster is: GPUs, links and how they are nested; read from configs/clusters/NAME.yaml.

    part "a": 4 nodes of 8 GPUs        inside   NVLink, per GPU and direction   (one domain: 8 GPUs)
              |                        network  this GPU's share of the node's NICs
    part "b": 4 nodes of 8 GPUs        between  the link from part to part, per node

A homogeneous cluster is one part.  Ranks fill nodes in order, part after part.  Rates are GB/s
(1e9 bytes), latencies microseconds, peaks 16-bit dense TFLOP/s.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from megatron_ext.errors import ConfigError, Violation

FOLDER = Path(__file__).parent.parent.parent / "configs" / "clusters"


@dataclass(frozen=True)
class Link:
    """One level of links.

    Attributes:
        gb_per_s: what a rank (between parts: a node) really moves, one direction.
        latency_us: of one message or one step of a collective.
    """

    gb_per_s: float
    latency_us: float = 5.0


@dataclass(frozen=True)
class Gpu:
    """How fast one rank computes.

    Attributes:
        gemm_efficiency: share of the peak that an infinitely large matrix product reaches: the ONE
            number that is calibrated for each kind.
        attention_efficiency: the same for the attention kernel.
        half_rows, half_width: rows and columns at which a product reaches half of that.
        kernel_us: time of a kernel that does nothing.
    """

    name: str
    peak_tflops: float
    memory_gb: float
    memory_gb_per_s: float
    gemm_efficiency: float = 0.7
    attention_efficiency: float = 0.5
    half_rows: float = 64.0
    half_width: float = 64.0
    kernel_us: float = 4.0


@dataclass(frozen=True)
class Part:
    """Equal nodes on one network.

    Attributes:
        nodes: how many there are; None: as many as the run asks for.
        domain: GPUs of one NVLink (or xGMI) domain; may be more than a node.
        cores: ranks that compute at full speed at once; None: all.
    """

    name: str
    gpu: Gpu
    gpus_per_node: int
    domain: int
    inside: Link
    network: Link
    nodes: int | None = None
    cores: int | None = None

    @property
    def on_cpu(self) -> bool:
        """True where ranks share cores: `planner calibrate` measures such a machine."""
        return self.cores is not None


@dataclass(frozen=True)
class Cluster:
    """One or several parts; `between` joins them."""

    name: str
    parts: tuple[Part, ...]
    between: Link | None = None
    reserve_gb: float = 4.0
    """CUDA context, NCCL and other memory outside the allocator, per rank."""
    fragmentation: float = 0.05
    """Share that the allocator loses."""
    source: str = field(default="", compare=False)

    @property
    def size(self) -> int | None:
        """Ranks of all parts; None: unlimited."""
        if any(part.nodes is None for part in self.parts):
            return None
        return sum(part.nodes * part.gpus_per_node for part in self.parts)

    def part_of(self, slot: int) -> int:
        """Number of the part that holds physical rank `slot`."""
        for number, part in enumerate(self.parts):
            size = None if part.nodes is None else part.nodes * part.gpus_per_node
            if size is None or slot < size:
                return number
            slot -= size
        return len(self.parts) - 1

    def first_of(self, number: int) -> int:
        """First physical rank of a part."""
        return sum((p.nodes or 0) * p.gpus_per_node for p in self.parts[:number])

    def domain_of(self, slot: int) -> tuple[int, int]:
        """(part, NVLink domain in it) of a physical rank."""
        number = self.part_of(slot)
        return number, (slot - self.first_of(number)) // self.parts[number].domain

    @property
    def memory_bytes(self) -> float:
        """Of the smallest GPU, less the reserve."""
        least = min(part.gpu.memory_gb for part in self.parts)
        return (least - self.reserve_gb) * 1e9


def names() -> list[str]:
    """The clusters that are described in configs/clusters."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load(path: str) -> Cluster:
    """The cluster of a file, or of a name in configs/clusters.

    Raises:
        ConfigError: no such file (with the nearest names), not YAML, unknown keys, impossible
            numbers: all violations together.
    """
    import yaml

    where = Path(path)
    if not where.exists() and (FOLDER / f"{where.stem}.yaml").exists():
        where = FOLDER / f"{where.stem}.yaml"
    if not where.is_file():
        close = difflib.get_close_matches(where.stem, names(), n=3, cutoff=0.3) or names()
        raise ConfigError(f"--cluster {path}: no such file", do=f"use {', '.join(close)}")
    try:
        values = yaml.safe_load(where.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--cluster: not YAML: {error}", do="fix it", path=where) from None
    if not isinstance(values, dict):
        raise ConfigError("--cluster: must be a mapping", do="copy configs/clusters/*", path=where)
    return replace(from_values(values, where.stem, str(where)), source=str(where))


OWN = {"name", "parts", "between", "reserve_gb", "fragmentation"}


def from_values(values: dict, name: str = "cluster", path: str = "") -> Cluster:
    """The cluster of a mapping; see `load`."""
    found: list[Violation] = []
    rest = {key: value for key, value in values.items() if key not in OWN}
    listed = values.get("parts") or [{}]
    parts = []
    for number, own in enumerate(listed if isinstance(listed, list) else [{}]):
        merged = {"name": f"part{number}", **rest, **(own if isinstance(own, dict) else {})}
        merged["gpu"] = {**_mapping(rest.get("gpu")), **_mapping(merged.get("gpu"))}
        parts.append(_part(merged, path, found))
    between = None
    if values.get("between") is not None:
        between = _made(Link, values["between"], f"{path}: between", found)
    if len(parts) > 1 and between is None:
        found.append(_bad(path, "parts", len(parts), "need a link", "add between: {gb_per_s: ..}"))
    if len(parts) > 1 and any(part and part.nodes is None for part in parts):
        found.append(_bad(path, "nodes", None, "must be given for each part", "add nodes: N"))
    numbers = {k: values[k] for k in ("reserve_gb", "fragmentation") if k in values}
    for key, value in numbers.items():
        if not _is_number(value) or value < 0:
            found.append(_bad(path, key, value, "must be a number of at least 0", f"{key}: 0"))
    if found:
        raise ConfigError(violations=found)
    return Cluster(str(values.get("name", name)), tuple(parts), between, **numbers)


def _mapping(value) -> dict:
    return value if isinstance(value, dict) else {}


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _bad(path: str, key: str, value: object, rule: str, use: str) -> Violation:
    return Violation(f"{path}: {key}", value, rule, use)


def _part(values: dict, path: str, found: list[Violation]) -> Part | None:
    values = dict(values)
    values["gpu"] = _made(Gpu, values.get("gpu"), f"{path}: gpu", found)
    for key in ("inside", "network"):
        values[key] = _made(Link, values.get(key), f"{path}: {key}", found)
    values.setdefault("domain", values.get("gpus_per_node"))
    part = _made(Part, values, path, found)
    if part and part.domain and part.gpus_per_node and part.domain % part.gpus_per_node:
        rule = f"must be a multiple of gpus_per_node = {part.gpus_per_node}"
        found.append(_bad(path, "domain", part.domain, rule, f"use {part.gpus_per_node}"))
    return part


def _made(cls: type, values, where: str, found: list[Violation]):
    """The dataclass of a mapping; None where it cannot be made (`found` says why)."""
    known = {f.name: f for f in fields(cls)}
    if not isinstance(values, dict):
        needs = ", ".join(known)
        found.append(Violation(where, values, f"must be a mapping of {needs}", "add it"))
        return None
    before = len(found)
    for key, value in values.items():
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            use = f"use {close[0]}" if close else f"use {', '.join(known)}"
            found.append(Violation(f"{where}: {key}", None, "is not a key", use))
        elif known[key].type in ("float", "int", "int | None"):
            found += _number(where, key, value, known[key].type)
    missing = [f.name for f in fields(cls) if f.name not in values and _is_required(f)]
    for name in missing:
        found.append(Violation(f"{where}: {name}", None, "is missing", f"add {name}: VALUE"))
    return cls(**values) if len(found) == before else None


def _is_required(one) -> bool:
    from dataclasses import MISSING

    return one.default is MISSING and one.default_factory is MISSING


def _number(where: str, key: str, value, kind: str) -> list[Violation]:
    if value is None and "None" in kind:
        return []
    zero = key in ("latency_us", "kernel_us", "half_rows", "half_width")
    whole = kind.startswith("int")
    good = _is_number(value) and (value >= 0 if zero else value > 0)
    if not good or (whole and not isinstance(value, int)):
        least = "at least 0" if zero else "more than 0"
        rule = f"must be {'a whole number of' if whole else 'a number of'} {least}"
        return [Violation(f"{where}: {key}", value, rule, f"write {key}: 8")]
    if key.endswith("_efficiency") and value > 1:
        rule = "must be a share of the peak, at most 1"
        return [Violation(f"{where}: {key}", value, rule, f"write {key}: 0.7")]
    return []
