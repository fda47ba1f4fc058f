"""A layer of experts, token by token."""

import torch


def experts_layer(x, index, scores, up, down, up_bias, down_bias, gate):
    """Return the sum over a token's experts of score · down(gate(up(x))); experts that are not there add nothing.

    The weights are (experts, out, in), and the biases (experts, out).
    """
    rows = []
    for token, experts, of_experts in zip(x, index.tolist(), scores, strict=True):
        row = torch.zeros_like(token)
        for expert, score in zip(experts, of_experts, strict=True):
            if expert < len(up):
                hidden = gate((up[expert] @ token + up_bias[expert])[None])[0]
                row = row + score * (down[expert] @ hidden + down_bias[expert])
        rows.append(row)
    return torch.stack(rows)
