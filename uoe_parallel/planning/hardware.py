"""What machines a run gets: rates, sizes and links of one kind of node, from a YAML file.

`machines/` has those of common nodes; `calibrate` measures this machine.
"""

from __future__ import annotations

from importlib import resources
from math import ceil
from pathlib import Path
from typing import Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)

from uoe_parallel.config import yaml_text
from uoe_parallel.config.schema import Precision, Section
from uoe_parallel.errors import UserError

MEASURED = "this_machine"
"""The name of the profile that `--calibrate` writes."""
MEASURED_FILE = Path("runs/hardware") / f"{MEASURED}.yaml"
"""Where it goes, and is looked for."""

_MACHINES = resources.files("uoe_parallel.planning") / "machines"


class Link(Section):
    """What connects two devices."""

    bandwidth: PositiveFloat
    """Bytes per second that a device sends in one direction while it receives as many."""
    latency: NonNegativeFloat
    """Seconds from one device to another, whatever the size."""


class Hardware(Section):
    """Nodes of equal devices, all alike."""

    name: str
    device: Literal["cuda", "cpu"]
    devices_per_node: PositiveInt
    flops: dict[Precision, PositiveFloat]
    """Peak of a device in dense matrix products, floating-point operations per second, by the
    precision of a run."""
    achievable: float = Field(gt=0, le=1)
    """Share of the peak that large matrix products reach."""
    memory: PositiveInt
    """Bytes of a device."""
    memory_bandwidth: PositiveFloat
    """Bytes per second, read and written ones together."""
    reserved_memory: NonNegativeInt
    """Bytes that libraries take before the first tensor: CUDA's context, NCCL's buffers."""
    fragmentation: float = Field(ge=0, lt=1)
    """Allowance for what an allocator holds and can't use, as a share of what is allocated."""
    layer_overhead: NonNegativeFloat
    """Seconds that the host takes to queue the forward and backward pass of a layer with both
    blocks routed, however few its tokens."""
    intra_node: Link
    inter_node: Link

    def peak(self, precision: Precision) -> float:
        """Floating-point operations per second. Raises UserError for a precision without figure."""
        if precision not in self.flops:
            known = ", ".join(self.flops)
            raise UserError(
                f"training.precision = {precision}: the hardware profile {self.name} has figures "
                f"for {known} alone; choose one of these, or add flops.{precision} to a copy of it"
            )
        return self.flops[precision]

    def needed(self, allocated: int) -> int:
        """Bytes of a device's memory that a rank takes which allocates so many."""
        return self.reserved_memory + ceil(allocated * (1 + self.fragmentation))


def load_hardware(name: str) -> Hardware:
    """The profile of that name, or in that YAML file.

    Raises UserError if there is none, or it is not a profile.
    """
    text, source = _read(name)
    try:
        return Hardware.model_validate(yaml_text.parse(text))
    except yaml_text.YamlError as error:
        problem = f"is not YAML: {error.problem}"
    except ValidationError as error:
        first = error.errors()[0]
        problem = f"{'.'.join(map(str, first['loc'])) or 'as a whole'}: {first['msg'].lower()}"
    raise UserError(f"the hardware profile {source}: {problem}; correct it there")


def known_machines() -> list[str]:
    """Names of the profiles that come with the package."""
    return sorted(f.name.removesuffix(".yaml") for f in _MACHINES.iterdir() if "yaml" in f.name)


def _read(name: str) -> tuple[str, str]:
    if name in known_machines():
        return (_MACHINES / f"{name}.yaml").read_text(encoding="utf-8"), name
    path = MEASURED_FILE if name == MEASURED else Path(name)
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError):
        mend = f"use {', '.join(known_machines())}, or the path of a YAML file"
        if name == MEASURED:
            mend = f"--calibrate measures it and writes {path}"
        raise UserError(f"--gpu {name}: there is no such hardware profile; {mend}") from None
