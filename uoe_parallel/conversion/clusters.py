"""Which neurons of a feed-forward block make an expert: those that are active together.

Neurons are parted into clusters of one size by what they do on sample text, as in MoEfication
(Zhang et al., arXiv 2110.01786). A token then needs few clusters for most of what the block adds to
it. The block's neurons change their places and nothing else, so the union computes what it did.

Shape suffixes: T tokens, F neurons, C clusters.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_ROUNDS = 20
"""Most rounds of k-means; it settles in fewer."""


def clusters_of_neurons(activity_TF: Tensor, num_clusters: int, seed: int) -> Tensor:
    """The neurons cluster after cluster, all of one size: int64 [F], a permutation. The same for
    the same activity and seed.

    activity_TF: how much each neuron has to say of each token, fp32, not negative; num_clusters
    divides F.
    """
    # What tells neurons apart is where they do more than they usually do: the cosine of two such
    # vectors is the correlation of their activities.
    pattern_FT = (activity_TF - activity_TF.mean(0)).t()
    pattern_FT = torch.nn.functional.normalize(pattern_FT, dim=1)
    center_CT = _first_centers(pattern_FT, num_clusters, seed)
    cluster_F = assign_evenly(pattern_FT @ center_CT.t())
    for _ in range(_ROUNDS):
        center_CT = torch.zeros_like(center_CT).index_add_(0, cluster_F, pattern_FT)
        center_CT = torch.nn.functional.normalize(center_CT, dim=1)
        before_F, cluster_F = cluster_F, assign_evenly(pattern_FT @ center_CT.t())
        if torch.equal(before_F, cluster_F):
            break
    return cluster_F.argsort(stable=True)


def assign_evenly(similarity_FC: Tensor) -> Tensor:
    """A cluster for each neuron, equally many in each: int64 [F].

    A stable matching (Gale and Shapley, 1962): no neuron and cluster are more similar to each other
    than to what both got. Ties go to the lowest index.
    """
    similarity = similarity_FC.double().cpu().numpy()
    neurons, clusters = similarity.shape
    room = neurons // clusters
    assert room * clusters == neurons
    wish_FC = np.argsort(-similarity, axis=1, kind="stable")
    rejections_F = np.zeros(neurons, dtype=np.int64)
    every = np.arange(neurons)
    while True:
        choice_F = wish_FC[every, rejections_F]
        order = np.lexsort((-similarity[every, choice_F], choice_F))
        first_C = np.searchsorted(choice_F[order], np.arange(clusters))
        place_F = np.empty_like(every)
        place_F[order] = every - first_C[choice_F[order]]
        rejected_F = place_F >= room
        if not rejected_F.any():
            return torch.from_numpy(choice_F).to(similarity_FC.device)
        rejections_F += rejected_F


def _first_centers(pattern_FT: Tensor, count: int, seed: int) -> Tensor:
    """Neurons far from each other (k-means++, Arthur and Vassilvitskii, 2007): [C, T]."""
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(pattern_FT), (), generator=generator))]
    distance_F = torch.full((len(pattern_FT),), torch.inf)
    for _ in range(count - 1):
        from_last_F = (1 - pattern_FT @ pattern_FT[chosen[-1]]).clamp(min=0).cpu()
        distance_F = torch.minimum(distance_F, from_last_F)
        distance_F[chosen] = 0
        chance_F = distance_F if distance_F.sum() > 0 else torch.ones_like(distance_F)
        chosen.append(int(torch.multinomial(chance_F, 1, generator=generator)))
    return pattern_FT[chosen]
