"""All ranks of a launch together: what they have in common, and the groups of a layout."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from uoe_parallel.config.schema import ParallelConfig
from uoe_parallel.doctor.collectives import check_results, time_collectives
from uoe_parallel.doctor.facts import MISTAKE, Facts, compared
from uoe_parallel.doctor.faults import Fault, gathered
from uoe_parallel.doctor.report import Examination, as_json, print_examination
from uoe_parallel.errors import UserError
from uoe_parallel.parallel.agreement import broadcast_json, gather_json, shared_fate
from uoe_parallel.parallel.device import Device
from uoe_parallel.parallel.groups import start_groups
from uoe_parallel.parallel.layout import ParallelLayout


def examine_launch(
    facts: Facts, parallel: Mapping[str, Any], file: Path | None, device: Device, wait: timedelta
) -> bool:
    """Whether all is well, on every rank; rank 0 prints what was found. Collective over all ranks.

    facts: of this rank. parallel: its config's section, empty if it could not be read. file: where
    rank 0 writes everything as JSON. wait: how long ranks wait for each other in their groups.

    Raises UserError if no rank can read its config, or if `file` cannot be written; RuntimeError if
    a rank stays away.
    """
    world = dist.group.WORLD
    assert isinstance(world, ProcessGroup)
    everyone = [Facts.from_json(one) for one in gather_json(facts.to_json(), world)]
    agreed = broadcast_json(_agreement(everyone, parallel), world)
    if agreed["mistake"] is not None:
        raise UserError(agreed["mistake"])
    examination = Examination(everyone, compared(everyone))
    if agreed["parallel"]:
        examination = _with_groups(examination, agreed["parallel"], device, wait)
    is_healthy = broadcast_json(examination.is_healthy, world)
    with shared_fate(f"--json: {file} cannot be written", "Name another file", world):
        if dist.get_rank() == 0:
            print_examination(examination)
            if file is not None:
                text = json.dumps(as_json(examination), indent=1) + "\n"
                file.write_text(text, encoding="utf-8")
    return is_healthy


def _agreement(everyone: Sequence[Facts], parallel: Mapping[str, Any]) -> dict[str, Any]:
    """What rank 0 has all go on with: a mistake that all make alike, or its layout if any."""
    mistakes = {own.config.get(MISTAKE) for own in everyone}
    return {"mistake": mistakes.pop() if len(mistakes) == 1 else None, "parallel": parallel}


def _with_groups(
    examination: Examination, parallel: Mapping[str, Any], device: Device, wait: timedelta
) -> Examination:
    """Also of the groups of this layout. Collective over all ranks."""
    config = ParallelConfig.model_validate(parallel)
    layout = ParallelLayout.from_config(config, dist.get_world_size())
    groups = start_groups(layout, wait)
    reports = gather_json([vars(one) for one in check_results(groups, device)], groups.world)
    wrong = {rank: [Fault(**one) for one in found] for rank, found in enumerate(reports)}
    found = [*examination.found, *gathered(wrong)]
    return Examination(examination.facts, found, str(layout), time_collectives(groups, device))
