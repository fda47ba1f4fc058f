"""Hooks of every kind are found."""

import pytest
from torch import nn

from qlora.hooks import has_hooks


@pytest.mark.parametrize(
    "register",
    [
        "register_forward_pre_hook",
        "register_forward_hook",
        "register_full_backward_pre_hook",
        "register_full_backward_hook",
    ],
)
def test_a_module_has_hooks_until_they_are_removed(register):
    module = nn.SiLU()
    assert not has_hooks(module)
    handle = getattr(module, register)(lambda *_: None)
    assert has_hooks(module)
    handle.remove()
    assert not has_hooks(module)
