"""EVA's initial values and ranks: the directions in which the inputs of layers vary most (arXiv:2410.07170)."""

from collections.abc import Mapping, Sequence

import torch

from qlora.lora.statistics import InputStatistics


def eva_factors(statistics: Mapping[str, InputStatistics], rank: int, rho: float = 2.0) -> dict[str, torch.Tensor]:
    """Compute EVA's initial A of each layer, whose number of rows is the layer's rank.

    B starts at zero. PEFT scales alpha with the rank, so that alpha / rank stays what it is for `rank`.

    Args:
        statistics: Statistics of the layers' inputs by name, with :func:`num_directions` directions or more.
        rank: Mean rank.
        rho: A layer's rank is at most rho · rank; 1 gives all layers the same rank.

    Returns:
        A by layer, (rank of the layer, in), fp32, with orthonormal rows: the principal components of the inputs.

    Raises:
        ValueError: `rank` or `rho` is out of range, or directions or inputs are missing.
    """
    largest = _largest(rank, rho)
    # Layers with the same inputs share their statistics, and the decomposition.
    found = {
        id(one): one.top_directions(min(largest, one.in_features), centered=True) for one in set(statistics.values())
    }
    ratios = {name: found[id(one)][1].tolist() for name, one in statistics.items()}
    ranks = redistribute(ratios, rank, rho)
    return {name: found[id(one)][0][:, : ranks[name]].T.contiguous() for name, one in statistics.items()}


def num_directions(rank: int, rho: float, in_features: int) -> int:
    """Return how many directions of its inputs a layer should keep for :func:`eva_factors`.

    Four times those that it may use, so that these are accurate, and at least 256, which are a few percent of a
    layer's weight in memory.
    """
    return min(max(4 * _largest(rank, rho), 256), in_features)


def redistribute(ratios: Mapping[str, Sequence[float]], rank: int, rho: float) -> dict[str, int]:
    """Choose the rank of each layer by the largest shares of variance over all layers (arXiv:2410.07170, §3.3).

    As in PEFT, the rank · layers largest shares count, at most rho · rank of each layer. But PEFT leaves layers without
    any unadapted, and here every layer gets its first direction, so that the adapted layers are those that were
    asked for; where none is left without in PEFT, ranks are the same. Of equal shares, those of earlier layers count.

    Args:
        ratios: Shares of the variance that a layer's components explain, from the largest on, by layer. A layer may
            have fewer than rho · rank.
        rank: Mean rank.
        rho: Bound on a layer's rank, in multiples of `rank`, from 1.

    Returns:
        Ranks by layer; their sum is rank · layers, or less if the layers have fewer components.
    """
    largest = _largest(rank, rho)
    if empty := [name for name, shares in ratios.items() if not shares]:
        raise ValueError(f"ratios: {', '.join(empty)} have no components.")
    ranks = dict.fromkeys(ratios, 1)
    others = [(share, name) for name, shares in ratios.items() for share in shares[1:largest]]
    others.sort(key=lambda pair: pair[0], reverse=True)  # stable: equal shares stay in the order of layers
    for _, name in others[: (rank - 1) * len(ratios)]:
        ranks[name] += 1
    return ranks


def _largest(rank: int, rho: float) -> int:
    if rank < 1:
        raise ValueError(f"rank: {rank!r} should be a whole number from 1.")
    if not rho >= 1:
        raise ValueError(f"rho: {rho!r} should be a number from 1, or the ranks could not sum up to rank · layers.")
    return round(rank * rho)
