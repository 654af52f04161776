"""3 × 3 convolutions with 2.25 times fewer multiplications, where one thread of a CPU gains by it.

Winograd's F(2×2, 3×3): each 2 × 2 tile of the output comes from the 4 × 4 tile d of the input around it,

    Y = Aᵀ [ Σ_c (G w_c Gᵀ) ⊙ (Bᵀ d_c B) ] A,        16 products where the sum as written takes 36,

and the sum over channels is one matrix product for each of the 16 places. With zero padding of 1, the gradient by
data is a convolution of the same kind, with the kernel turned by 180° and its channels swapped.
Source: Lavin & Gray 2016, arXiv 1509.09308, §4.1. Coefficients are 0, ±1, ±½, so rounding stays that of fp32.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

LEAST_CHANNELS = 128  # below, the matrices are too narrow to pay for the transforms (measured: 64 gains nothing)
ROWS = 256  # tiles that are transformed together: few enough that they stay in the cache

G = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]])


def quicken(model: nn.Module) -> list[str]:
    """Let the model's wide 3 × 3 convolutions be computed this way: same function, weights frozen as they are now.

    Returns their names; none on a GPU, whose own library chooses such things itself, and none where several threads
    share the work: the many small steps then wait for each other, which takes what they save (measured on two).
    """
    if torch.get_num_threads() > 1:
        return []
    chosen = {name: m for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and _suits(m)}
    for conv in chosen.values():
        weight = conv.weight.detach()
        there, back = _transformed(weight), _transformed(weight.flip(2, 3).transpose(0, 1))
        conv.forward = partial(_forward, conv, there, back)  # type: ignore[method-assign]
    return list(chosen)


def _suits(conv: nn.Conv2d) -> bool:
    return (
        conv.weight.device.type == "cpu" and conv.weight.dtype == torch.float32
        and not conv.weight.requires_grad
        and (conv.kernel_size, conv.stride, conv.dilation) == ((3, 3), (1, 1), (1, 1))
        and (conv.padding, conv.padding_mode, conv.groups) == ((1, 1), "zeros", 1)
        and min(conv.in_channels, conv.out_channels) >= LEAST_CHANNELS
    )  # fmt: skip


def _transformed(weight: Float[Tensor, "o c 3 3"]) -> Float[Tensor, "16 c o"]:
    """G w Gᵀ, a matrix for each of the 16 places."""
    g = G.to(weight)
    return torch.einsum("ia,jb,ocab->ijco", g, g, weight).flatten(0, 1).contiguous()


def _forward(conv: nn.Conv2d, there: Tensor, back: Tensor, x: Tensor) -> Tensor:
    # odd sizes would compute a row and a column for nothing; under autocast the products are bf16, which this is not
    if x.dtype != torch.float32 or x.ndim != 4 or x.shape[2] % 2 or x.shape[3] % 2 or torch.is_autocast_enabled("cpu"):
        return type(conv).forward(conv, x)
    y = _Convolution.apply(x, there, back)
    return y if conv.bias is None else y + conv.bias[:, None, None]


class _Convolution(torch.autograd.Function):
    """The convolution and its gradient by data; the kernel has none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Tensor, back: Tensor) -> Tensor:
        ctx.back = back
        return convolve(x, there)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return convolve(gradient, ctx.back), None, None


def convolve(x: Float[Tensor, "b c h w"], kernel: Float[Tensor, "16 c o"]) -> Float[Tensor, "b o h w"]:
    """x, zero-padded by 1, with a kernel that `_transformed` made; h and w even, the result in NHWC."""
    (b, c, h, w), out = x.shape, kernel.shape[2]
    rows, columns = h // 2, w // 2
    step = min(b, max(1, ROWS // (rows * columns)))
    y = x.new_empty(b, rows, 2, columns, 2, out)
    padded = x.new_zeros(step, h + 2, w + 2, c)
    tiles, products = x.new_empty(16 * step * rows * columns * c), x.new_empty(16 * step * rows * columns * out)
    for k in range(0, b, step):
        n = min(step, b - k)
        shape = (4, 4, n, rows, columns)
        padded[:n, 1:-1, 1:-1] = x[k : k + n].permute(0, 2, 3, 1)
        v = tiles[: 16 * n * rows * columns * c].view(*shape, c)
        m = products[: 16 * n * rows * columns * out].view(*shape, out)
        d = [padded[:n, i : i + h - 1 : 2] for i in range(4)]
        for i, d_i in enumerate((d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3])):  # Bᵀ d, then times B
            e = [d_i[:, :, j : j + w - 1 : 2] for j in range(4)]
            torch.sub(e[0], e[2], out=v[i, 0])
            torch.add(e[1], e[2], out=v[i, 1])
            torch.sub(e[2], e[1], out=v[i, 2])
            torch.sub(e[1], e[3], out=v[i, 3])
        torch.bmm(v.view(16, -1, c), kernel, out=m.view(16, -1, out))
        for i, m_i in enumerate((m[0] + m[1] + m[2], m[1] - m[2] - m[3])):  # Aᵀ m, then times A
            torch.add(m_i[1], m_i[2], out=y[k : k + n, :, i, :, 0]).add_(m_i[0])
            torch.sub(m_i[1], m_i[2], out=y[k : k + n, :, i, :, 1]).sub_(m_i[3])
    return y.view(b, h, w, out).permute(0, 3, 1, 2)
