"""GGUF files in llama.cpp's K-quants, written by its own quantizer."""

import ctypes
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from qlora.errors import ExportError
from qlora.export.gguf.model import import_gguf

# Types by llama.cpp's number of a file type (llama.h); and the bits per weight that disk space is checked for. Matrices
# in other types may take more, such as F16 for rows that are not a multiple of 32.
K_QUANTS = {"q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18}
BITS = 8
PROGRAM = "llama-quantize"
# Writes the second file from the first, in a type.
Quantizer = Callable[[Path, Path, str], None]


def find_quantizer(dtype: str) -> Quantizer:
    """Return llama.cpp's quantizer: its program if that is on the PATH, else the library in llama-cpp-python.

    Args:
        dtype: The type that is asked for.

    Raises:
        ExportError: Neither is installed.
    """
    if (program := shutil.which(PROGRAM)) is not None:
        return lambda source, target, kind: _run(program, source, target, kind)
    try:
        import llama_cpp  # noqa: F401
    except ImportError:
        raise ExportError(
            f"{dtype} is written by llama.cpp's own quantizer, and neither {PROGRAM} is on the PATH nor "
            f"llama-cpp-python is installed: pip install llama-cpp-python; or use q8_0, q5_0 or q4_0."
        ) from None
    return _call


def quantize(source: Path, target: Path, dtype: str, quantizer: Quantizer) -> list[str]:
    """Write a GGUF file in a K-quant from one in 16 bits.

    Args:
        source: The file in 16 bits.
        target: The file to write.
        dtype: One of `K_QUANTS`.
        quantizer: Result of :func:`find_quantizer`.

    Returns:
        Notes on the types of its matrices, which llama.cpp chooses by tensor and by size.

    Raises:
        ExportError: llama.cpp failed.
    """
    if dtype not in K_QUANTS:
        raise ExportError(f"dtype: {dtype!r} should be one of {', '.join(K_QUANTS)}.")
    quantizer(source, target, dtype)
    if not target.is_file():
        raise ExportError(f"llama.cpp's quantizer wrote no file in {dtype}; see its output.")
    kinds = Counter(
        tensor.tensor_type.name for tensor in import_gguf().GGUFReader(target).tensors if len(tensor.shape) > 1
    )
    return ["llama.cpp chose the types of the matrices: " + ", ".join(f"{n} in {kind}" for kind, n in kinds.items())]


def _run(program: str, source: Path, target: Path, dtype: str) -> None:
    """Run llama.cpp's program."""
    done = subprocess.run([program, str(source), str(target), dtype.upper()], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise ExportError(f"{program} failed with exit code {done.returncode}: {' / '.join(last)}")


def _call(source: Path, target: Path, dtype: str) -> None:
    """Call llama.cpp's library."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = K_QUANTS[dtype]
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options))
    if failed:
        raise ExportError(f"llama.cpp's quantizer failed on {source.name} in {dtype}; its message is above.")
