"""AdamW (arXiv:1711.05101, algorithm 2) in fp32, a line per line of the paper."""

import torch


class AdamW:
    """Updates one fp32 tensor in place."""

    def __init__(
        self,
        parameter: torch.Tensor,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.parameter, self.betas, self.eps, self.weight_decay = parameter, betas, eps, weight_decay
        self.m = torch.zeros_like(parameter)
        self.v = torch.zeros_like(parameter)
        self.t = 0

    def step(self, grad: torch.Tensor, learning_rate: float) -> None:
        """One update."""
        beta1, beta2 = self.betas
        self.t += 1
        self.m = beta1 * self.m + (1 - beta1) * grad
        self.v = beta2 * self.v + (1 - beta2) * grad**2
        m_hat = self.m / (1 - beta1**self.t)
        v_hat = self.v / (1 - beta2**self.t)
        self.parameter *= 1 - learning_rate * self.weight_decay
        self.parameter -= learning_rate * m_hat / (v_hat.sqrt() + self.eps)
