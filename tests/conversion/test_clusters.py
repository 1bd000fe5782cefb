"""Neurons that are active together become one expert."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from uoe_parallel.conversion.clusters import assign_evenly, clusters_of_neurons


@pytest.mark.parametrize("seed", range(5))
def test_planted_groups_are_found(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    group_F = torch.arange(24) % 4
    topic_T = torch.randint(4, (200,), generator=generator)
    noise_TF = torch.rand(200, 24, generator=generator)
    activity_TF = (topic_T.unsqueeze(1) == group_F).float() + 0.5 * noise_TF
    order_F = clusters_of_neurons(activity_TF, 4, seed)
    found = group_F[order_F].view(4, 6)
    assert (found == found[:, :1]).all()
    assert sorted(found[:, 0].tolist()) == [0, 1, 2, 3]


def test_neurons_that_are_never_active_have_their_place_too() -> None:
    order_F = clusters_of_neurons(torch.zeros(10, 12), 3, 0)
    assert sorted(order_F.tolist()) == list(range(12))


@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 100))
def test_clusters_are_even_and_stable(clusters: int, room: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Few values, so that there are ties.
    similarity_FC = torch.randint(4, (clusters * room, clusters), generator=generator).float()
    cluster_F = assign_evenly(similarity_FC)
    assert torch.bincount(cluster_F, minlength=clusters).tolist() == [room] * clusters
    own_F1 = similarity_FC.gather(1, cluster_F.unsqueeze(1))
    for cluster in range(clusters):
        weakest = similarity_FC[cluster_F == cluster, cluster].min()
        wanted_F = similarity_FC[:, cluster]
        assert not ((wanted_F > own_F1.squeeze(1)) & (wanted_F > weakest)).any()
