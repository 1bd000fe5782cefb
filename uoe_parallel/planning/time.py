"""How long a step takes, from what it computes and sends and the rates of its machines.

Assumed is, of one device:
- matrix products run at the achievable share of the peak, or as fast as weights can be read, once
  forward and twice backward, whichever takes longer;
- everything else is bound by memory: what the forward pass keeps is written once and read once, and
  so is its gradient, and the recomputed part of it comes twice; AdamW reads and writes its state
  and gradients once;
- the host takes its own time to queue a layer's many small operations, however little they compute:
  a GPU waits for it where that is longer than all of the above, a CPU is the host and does both;
- ranks wait for nobody: routes are even.

Of a collective:
- a message takes latency + bytes / bandwidth of its link; ranks fill nodes one after the other;
- all-reduces take a ring or a tree, whichever is faster, all-gathers and reduce-scatters a ring; in
  an all-to-all a rank exchanges parts with one other after the other;
- a ring enters and leaves a node once, over the links of all devices that the group has there.

Nothing is hidden behind compute, except what ZeRO gathers and reduces in the passes where DeepSpeed
overlaps it (`overlap_comm`, ZeRO 3's default). Stages take turns as in 1F1B (Narayanan et al.,
arXiv 2104.04473): p stages and m micro-batches take (m + p - 1) times as long as the slowest stage
takes for one, of which (p - 1) / (m + p - 1) is the bubble.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, log2

from uoe_parallel.analysis.flops import Computation
from uoe_parallel.analysis.states import ModelStates
from uoe_parallel.analysis.transfer import Transfer
from uoe_parallel.config.schema import Precision
from uoe_parallel.planning.hardware import Hardware, Link

_ZERO_GROUPS = ("data", "expert_data")
"""Groups in which ZeRO communicates."""


@dataclass(frozen=True)
class Route:
    """How the ranks of a group reach each other."""

    size: int
    share: int
    """Ranks of it on the node that has the fewest."""
    intra: Link
    inter: Link | None
    """None where all are on one node."""

    @classmethod
    def of(cls, ranks: Sequence[int], hardware: Hardware) -> Route:
        nodes: dict[int, int] = {}
        for rank in ranks:
            node = rank // hardware.devices_per_node
            nodes[node] = nodes.get(node, 0) + 1
        inter = hardware.inter_node if len(nodes) > 1 else None
        return cls(len(ranks), min(nodes.values()), hardware.intra_node, inter)

    @property
    def hop(self) -> float:
        """Seconds of the slowest link's latency."""
        return (self.inter or self.intra).latency

    @property
    def bandwidth(self) -> float:
        """Of a ring through all ranks, bytes per second."""
        if self.inter is None:
            return self.intra.bandwidth
        crossing = self.share * self.inter.bandwidth
        return crossing if self.share == 1 else min(self.intra.bandwidth, crossing)


def transfer_seconds(transfer: Transfer, route: Route) -> float:
    """Of all calls of a transfer, one after the other."""
    size, hop, rate = route.size, route.hop, route.bandwidth
    if size == 1 or transfer.calls == 0:
        return 0.0
    depth = ceil(log2(size))
    payload = transfer.payload / transfer.calls
    match transfer.operation:
        case "all_reduce":
            ring = 2 * (size - 1) * (hop + payload / size / rate)
            once = min(ring, 2 * depth * hop + 2 * payload / rate)
        case "all_gather":
            once = (size - 1) * (hop + payload / rate)
        case "reduce_scatter":
            once = (size - 1) * (hop + payload / size / rate)
        case "all_to_all":
            once = _pairwise((transfer.payload - transfer.kept) / transfer.calls, route)
        case "broadcast":
            once = depth * hop + payload / rate
        case "send":
            once = hop + payload / rate
    return transfer.calls * once


def _pairwise(sent: float, route: Route) -> float:
    """Of an all-to-all: what goes to the own node and what leaves it take different links."""
    if route.inter is None:
        return (route.size - 1) * route.intra.latency + sent / route.intra.bandwidth
    beyond = route.size - route.share
    leaves = sent * beyond / (route.size - 1)
    hops = (route.share - 1) * route.intra.latency + beyond * route.inter.latency
    return hops + max((sent - leaves) / route.intra.bandwidth, leaves / route.inter.bandwidth)


@dataclass(frozen=True)
class StageTime:
    """Seconds of one rank: the first five of each micro-batch, the others of each step."""

    products: float
    memory: float
    """Of what is bound by memory's bandwidth."""
    communication: float
    """That nothing hides."""
    hidden: float
    """Communication behind products."""
    host: float
    """That the device waits for its host to queue work."""
    after: float
    """Communication outside of the passes: of gradients, weights and small numbers."""
    optimizer: float

    @property
    def micro_batch(self) -> float:
        return self.products + self.memory + self.communication + self.host

    @property
    def step_end(self) -> float:
        return self.after + self.optimizer


@dataclass(frozen=True)
class Work:
    """What a rank does in a step."""

    computations: Sequence[Computation]
    """Of a micro-batch."""
    kept: int
    """Bytes that a micro-batch's forward pass keeps for the backward pass, were nothing
    recomputed."""
    weights: int
    """Bytes of the stage's weights, as the passes use them."""
    layers: float
    """What a host queues, in layers with both blocks routed; see `queued_layers`."""
    states: ModelStates
    traffic: Sequence[Transfer]
    """Of a step."""
    micro_batches: int
    overlaps: bool
    """Whether ZeRO's communication hides behind the passes."""


def stage_time(
    work: Work, routes: Mapping[str, Route], hardware: Hardware, precision: Precision
) -> StageTime:
    """routes: of the groups that the traffic names."""
    rate = hardware.peak(precision) * hardware.achievable
    recomputes = any(c.phase == "recompute" and c.flops for c in work.computations)
    reads = {"forward": 1, "recompute": 1 if recomputes else 0, "backward": 2}
    products = sum(
        max(
            sum(c.flops for c in work.computations if c.phase == phase) / rate,
            times * work.weights / hardware.memory_bandwidth,
        )
        for phase, times in reads.items()
    )
    passes = [t for t in work.traffic if t.phase != "step"]
    zero = [t for t in passes if work.overlaps and t.group in _ZERO_GROUPS]
    seconds = _seconds(passes, routes) / work.micro_batches
    hidden = min(_seconds(zero, routes) / work.micro_batches, products)
    states = work.states
    stepped = 2 * (states.optimizer + states.gradients) + states.weights
    memory = (6 if recomputes else 4) * work.kept / hardware.memory_bandwidth
    busy = products + memory + seconds - hidden
    # A forward pass is a third of what is queued.
    queued = work.layers * hardware.layer_overhead * (4 / 3 if recomputes else 1)
    return StageTime(
        products=products,
        memory=memory,
        communication=seconds - hidden,
        hidden=hidden,
        host=queued if hardware.device == "cpu" else max(0.0, queued - busy),
        after=_seconds((t for t in work.traffic if t.phase == "step"), routes),
        optimizer=stepped / hardware.memory_bandwidth,
    )


def _seconds(transfers: Iterable[Transfer], routes: Mapping[str, Route]) -> float:
    return sum(transfer_seconds(t, routes[t.group]) for t in transfers)


@dataclass(frozen=True)
class StepTime:
    """Of an optimizer step."""

    seconds: float
    bubble: float
    """Share of the passes in which a stage waits for others."""


def step_time(stages: Sequence[StageTime], pipeline: int, micro_batches: int) -> StepTime:
    """stages: the slowest of `pipeline` ones among them."""
    turns = micro_batches + pipeline - 1
    passes = turns * max(stage.micro_batch for stage in stages)
    end = max(stage.step_end for stage in stages)
    return StepTime(seconds=passes + end, bubble=(pipeline - 1) / turns)
