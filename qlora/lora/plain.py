"""Which modules are linear layers: subclasses of `nn.Linear` may compute anything, so they are tried."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

TRIED_IN, TRIED_OUT, TRIED_ROWS = 8, 6, 3


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer that can be quantized and adapted.

    It is an `nn.Linear`, a subclass that computes the same (Falcon's), or one with 4-bit weights. A subclass is tried
    with small random weights on the CPU, so a module without values is enough.
    """
    if type(module) is nn.Linear:
        return True
    if isinstance(module, nn.Linear):
        return _computes_linear(module)
    # A transformers model has `dequantize` too, but no sizes.
    return hasattr(module, "dequantize") and hasattr(module, "in_features")


def _computes_linear(module: nn.Linear) -> bool:
    parameters = dict(module.named_parameters(recurse=False))
    if not {"weight"} <= {*parameters} <= {"weight", "bias"} or list(module.children()):
        return False
    generator = torch.Generator().manual_seed(0)
    shapes = {"weight": (TRIED_OUT, TRIED_IN), "bias": (TRIED_OUT,)}
    values = {name: torch.randn(shapes[name], generator=generator, device="cpu") for name in parameters}
    x = torch.randn(TRIED_ROWS, TRIED_IN, generator=generator, device="cpu")
    small = copy.copy(module)  # whose parameters are replaced, not those that it shares with the module
    small._parameters = {"bias": None, **{name: nn.Parameter(value) for name, value in values.items()}}
    small.in_features, small.out_features = TRIED_IN, TRIED_OUT
    try:
        with torch.device("cpu"), torch.no_grad():
            found = small(x)
    except Exception:  # another class may need other inputs or sizes, and raise anything
        return False
    expected = F.linear(x, values["weight"], values.get("bias"))
    return isinstance(found, torch.Tensor) and found.shape == expected.shape and torch.allclose(found, expected)
