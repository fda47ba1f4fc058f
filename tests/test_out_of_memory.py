"""Errors that mean that memory ran out, from torch, the libraries that it calls, and Triton."""

import pytest
import torch

from qlora.errors import ModelError
from qlora.out_of_memory import is_out_of_memory
from qlora.processes import Processes

RAN_OUT = {
    "torch's allocator": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "CUDA": torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    "CUDA's driver": RuntimeError("CUDA driver error: out of memory"),
    "cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cuDNN": RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cuDNN 9": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "cuDNN 9 on the host": RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
    "Triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "NCCL": torch.distributed.DistBackendError(
        "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version "
        "2.27.5\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
    ),
    "NCCL's buffers": torch.distributed.DistBackendError(
        "NCCL error in: NCCLUtils.cpp:76, unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version "
        "2.20.5\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nFailed to CUDA calloc 64 bytes"
    ),
    "the host": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
}
OTHERS = {
    "an illegal access": torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    "shared memory": RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376"),
    "cuBLAS otherwise": RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    "NCCL otherwise": torch.distributed.DistBackendError(
        "NCCL error in: NCCLUtils.hpp:275, unhandled cuda error, NCCL version 2.20.5\nncclUnhandledCudaError: Call to "
        "CUDA function failed.\nLast error:\nCuda failure 1 'invalid argument'"
    ),
    "an error of ours": ModelError("Step 3: memory ran out: CUBLAS_STATUS_ALLOC_FAILED"),
    "Ctrl-C": KeyboardInterrupt(),
}


@pytest.mark.parametrize("error", RAN_OUT.values(), ids=RAN_OUT)
def test_each_error_of_exhausted_memory_is_recognized(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHERS.values(), ids=OTHERS)
def test_errors_that_less_memory_does_not_cure_are_not(error):
    assert not is_out_of_memory(error)


def test_an_exchange_that_lacks_memory_is_not_taken_for_the_end_of_another_process():
    processes = Processes(world_size=2)
    with (
        pytest.raises(ModelError, match=r"^NCCL ran out of memory for its own buffers.* lower train\.micro_batch_size"),
        processes.raise_together(),  # which asks the other processes nothing any more
        processes.watching_others(),
    ):
        raise RAN_OUT["NCCL"]
    with pytest.raises(ModelError, match="Another process of the run has ended"), Processes().watching_others():
        raise OTHERS["NCCL otherwise"]
