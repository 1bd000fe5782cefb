"""Which ranks measure which links."""

from __future__ import annotations

import torch.distributed as dist

from tests.harness import Ranks
from uoe_parallel.planning.calibrate import link_groups


def _ranks_of_links(local: int) -> tuple[list[int], list[int]]:
    node, across = link_groups(local)
    return dist.get_process_group_ranks(node), dist.get_process_group_ranks(across)


def test_links_of_two_nodes(ranks: Ranks) -> None:
    assert ranks(4).run(_ranks_of_links, 2) == [
        ([0, 1], [0, 2]),
        ([0, 1], [1, 3]),
        ([2, 3], [0, 2]),
        ([2, 3], [1, 3]),
    ]


def test_links_of_one_node(ranks: Ranks) -> None:
    assert ranks(2).run(_ranks_of_links, 2) == [([0, 1], [0]), ([0, 1], [1])]
