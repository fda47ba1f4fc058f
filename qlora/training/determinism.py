"""Deterministic algorithms, with which a run repeats the same bytes on one machine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from qlora.errors import ModelError

# cuBLAS sums in a fixed order only with a workspace of a fixed size, which it reads when it starts.
WORKSPACE_VARIABLE, WORKSPACE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Let torch use deterministic algorithms only in the body, if wanted.

    Raises:
        ModelError: An operation has none.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault(WORKSPACE_VARIABLE, WORKSPACE)
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise ModelError(
            f"train.deterministic: {str(error).splitlines()[0]} Set train.deterministic: false, or model.attention: "
            "eager if the operation is attention."
        ) from error
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warned)


def describe_determinism(wanted: bool, device: torch.device) -> str | None:
    """Describe which parts of a run are deterministic; None if the config does not ask for it."""
    if not wanted:
        return None
    description = "torch uses deterministic algorithms only"
    if device.type == "cpu":
        return description
    return f"{description}; the kernels of bitsandbytes and Triton are not checked"
