"""Rows of a product filled up to sizes that recur.

oneDNN compiles code for each new number of rows of each product and keeps it, half a megabyte or more each, until it
has a thousand. Packed documents have another number of tokens in nearly every step.
"""

import torch
import torch.nn.functional as F

MULTIPLE = 32


def filled_up(rows: torch.Tensor) -> torch.Tensor:
    """Return rows with zeros after them, up to a multiple of `MULTIPLE`; as they are if they are few, or not on a CPU.

    Args:
        rows: (rows, features).
    """
    missing = -len(rows) % MULTIPLE
    if not missing or len(rows) < MULTIPLE or rows.device.type != "cpu":
        return rows
    return F.pad(rows, (0, 0, 0, missing))
