"""Rows added to a product up to numbers that recur.

oneDNN compiles code for each new number of rows of each product and keeps it, half a megabyte or more each, until it
has a thousand. Packed documents have another number of tokens in nearly every step, and so have documents that are
evaluated.
"""

import torch

MULTIPLE = 32


def fill_up_rows(rows: torch.Tensor) -> torch.Tensor:
    """Append zeros up to a multiple of `MULTIPLE` rows on a CPU; fewer rows than that are returned as they are.

    Args:
        rows: (rows, features).
    """
    if rows.device.type != "cpu" or len(rows) < MULTIPLE:
        return rows
    missing = -len(rows) % MULTIPLE
    return torch.cat([rows, rows.new_zeros(missing, rows.shape[1])]) if missing else rows
