"""Which errors mean that a device's memory ran out."""

import torch

# Parts of messages of plain errors. cuBLAS, cuDNN and NCCL allocate memory of their own, Triton and the driver load
# kernels into the device's memory, and CUDA's own calls report its error by name; torch raises its OutOfMemoryError for
# none of these. The last one is the allocator of a CPU.
MESSAGES = (
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    # cuDNN 9's names for it.
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    # What NCCL warned of last, which torch appends; CUDA's error has its number since NCCL 2.19.
    "Cuda failure 2 'out of memory'",
    "Cuda failure 'out of memory'",
    "Failed to CUDA calloc",
    "Failed to CUDA malloc",
    "DefaultCPUAllocator: can't allocate memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, so that less memory is the remedy.

    A kernel that needs more shared memory than a multiprocessor has (Triton's `OutOfResources`) is none of these: it
    fails with any amount of free memory.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in MESSAGES)
