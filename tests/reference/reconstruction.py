"""Alternating quantization and low-rank approximation, written plainly in fp64 with the symmetric root of a moment."""

import torch


def root(second_moment):
    """Return R = E[xxᵀ]^½ of a full moment or of its diagonal."""
    if second_moment.dim() == 1:
        return second_moment.double().sqrt().diag()
    values, vectors = torch.linalg.eigh(second_moment.double())
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def weighted_norm(error, second_moment):
    """Return ‖E R‖, or ‖E‖ without a moment."""
    error = error.double()
    return (error if second_moment is None else error @ root(second_moment)).norm().item()


def iterates(weight, rank, quantize, iterations, start, second_moment, dtype):
    """Return the norm of plain quantization's error, and those of all iterates."""
    weight = weight.double()
    R = torch.eye(weight.shape[1], dtype=torch.float64) if second_moment is None else root(second_moment)

    def approximate(matrix):
        U, S, Vh = torch.linalg.svd(matrix @ R, full_matrices=False)
        A, B = S[:rank].sqrt()[:, None] * Vh[:rank] @ torch.linalg.inv(R), U[:, :rank] * S[:rank].sqrt()
        return B.to(dtype).double() @ A.to(dtype).double()

    term = approximate(weight) if start == "residual" else torch.zeros_like(weight)
    errors = []
    for _ in range(iterations):
        lost = weight - quantize((weight - term).float()).double()
        term = approximate(lost)
        errors.append(((lost - term) @ R).norm().item())
    return ((weight - quantize(weight.float()).double()) @ R).norm().item(), errors
