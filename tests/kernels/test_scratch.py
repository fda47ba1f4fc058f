"""Memory that successive products share, and that is freed for something larger."""

import weakref

import torch

from qlora.kernels import free_scratch, scratch


def test_memory_is_shared_until_it_is_freed():
    device = torch.device("cpu")
    first = scratch((3, 1 << 20), torch.float32, device)
    assert scratch((2, 5), torch.float32, device).data_ptr() == first.data_ptr()
    memory = weakref.ref(first.untyped_storage())
    del first
    free_scratch(torch.device("meta"))
    assert scratch((7,), torch.float32, device).untyped_storage().nbytes() == 3 << 22
    free_scratch(device)
    assert memory() is None
    assert scratch((7,), torch.float32, device).untyped_storage().nbytes() == 7 * 4
