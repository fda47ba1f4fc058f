"""Formats of published weights, encoded and decoded one element at a time from their descriptions."""

import math

import torch

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def to_fp8(weight, block):
    """Return FP8 values and a scale for each block of a matrix, as DeepSeek-V3 publishes them."""
    rows, columns = (math.ceil(size / of) for size, of in zip(weight.shape, block, strict=True))
    scales = torch.zeros(rows, columns)
    values = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn)
    for i in range(rows):
        for j in range(columns):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = weight[part].float().abs().max() / 448
            values[part] = (weight[part].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return values, scales


def from_fp8(values, scales, block):
    """Return a matrix in fp32: each FP8 value times the scale of its block."""
    result = torch.zeros(values.shape)
    for i, row in enumerate(values.float()):
        for j, value in enumerate(row):
            result[i, j] = value * scales[i // block[0], j // block[1]]
    return result


def from_mxfp4(blocks, scales):
    """Return experts' weights, (experts, in, out), from (experts, out, groups, bytes) and their exponents."""
    experts, out, groups, num_bytes = blocks.shape
    result = torch.zeros(experts, groups * num_bytes * 2, out)
    for e in range(experts):
        for o in range(out):
            for g in range(groups):
                for b, byte in enumerate(blocks[e, o, g].tolist()):
                    for half, code in enumerate((byte & 0xF, byte >> 4)):
                        sign = -1 if code & 8 else 1
                        value = sign * E2M1[code & 7] * 2.0 ** (int(scales[e, o, g]) - 127)
                        result[e, (g * num_bytes + b) * 2 + half, o] = value
    return result
