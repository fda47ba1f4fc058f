"""The two bf16 values around an fp32 value, and how likely stochastic rounding takes the upper one."""

import torch


def neighbours(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest bf16 value at or below each finite value, and the smallest at or above it."""
    nearest = values.bfloat16()
    infinity = torch.tensor(float("inf"), dtype=torch.bfloat16)
    below = torch.where(nearest.float() > values, nearest.nextafter(-infinity), nearest)
    above = torch.where(nearest.float() < values, nearest.nextafter(infinity), nearest)
    return below, above


def probability_up(values: torch.Tensor) -> torch.Tensor:
    """Return the probability of the upper neighbour that makes the expected value exact, fp64."""
    below, above = (neighbour.double() for neighbour in neighbours(values))
    return torch.where(above > below, (values.double() - below) / (above - below).where(above > below, 1), 0)


def stochastic_round(values: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Round up where a uniform number is below that probability; returns bf16."""
    below, above = neighbours(values)
    uniform = torch.rand(values.shape, dtype=torch.float64, generator=generator)
    return torch.where(uniform < probability_up(values), above, below)
