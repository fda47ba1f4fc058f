"""Which modules have hooks, so that they have to be called by themselves."""

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has hooks, which are called with its inputs, its outputs or their gradients."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
