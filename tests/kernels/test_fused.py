"""Where norms, gated products and rotations are computed by kernels."""

import torch

from qlora.kernels import unfused_reason


def test_they_are_for_cuda_and_triton(monkeypatch):
    assert unfused_reason(torch.device("cpu")) == "the fused kernels are for CUDA"
    monkeypatch.setattr("qlora.kernels.fused.HAS_TRITON", False)
    assert unfused_reason(torch.device("cuda")) == "Triton is not installed"
    monkeypatch.setattr("qlora.kernels.fused.HAS_TRITON", True)
    assert unfused_reason(torch.device("cuda")) is None
