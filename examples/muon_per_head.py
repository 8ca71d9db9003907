"""Muon, head by head, on one fused weight: every head's rows are orthogonalised apart, and no row is copied.

Muon makes the update of a matrix orthogonal. The matrix of a fused projection is no matrix of the model: it is the matrices of
its heads on top of one another, in an order of the modeling code's choosing. `tt.blocks` gives each as a view.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import triptych as tt

LAYOUT, SIZES = "g (q r|k|v) d", {"h": 6, "g": 2, "d": 8}


class MuonPerHead:
    """`torch.optim.Muon` on the head blocks of a fused weight, which stays one parameter."""

    def __init__(self, weight: nn.Parameter, layout: str, lr: float, **sizes: int) -> None:
        self.weight, self.layout, self.sizes = weight, layout, sizes
        self.heads = {name: nn.Parameter(view) for name, view in tt.blocks(weight.detach(), layout, **sizes).items()}
        self.muon = torch.optim.Muon(self.heads.values(), lr=lr, weight_decay=0.0, momentum=0.0, nesterov=False)

    def step(self) -> None:
        assert self.weight.grad is not None
        for name, grad in tt.blocks(self.weight.grad, self.layout, **self.sizes).items():
            self.heads[name].grad = grad
        self.muon.step()


def spectrum(update: Tensor) -> str:
    """Smallest and largest singular value over their mean; the few iterations of Muon bring all to between about 0.7 and 1.2."""
    values = torch.linalg.svdvals(update)
    return f"{float(values.min() / values.mean()):.1f} to {float(values.max() / values.mean()):.1f}"


def updates(per_head: bool) -> dict[str, Tensor]:
    """By how much one step moves the rows of each head, for heads with gradients of very different size."""
    torch.manual_seed(0)
    rows = tt.Layout(LAYOUT).size(**SIZES)
    weight = nn.Parameter(torch.randn(rows, 48))
    before = weight.detach().clone()
    grad = torch.randn(rows, 48)
    for number, block in enumerate(tt.blocks(grad, LAYOUT, **SIZES).values()):
        block *= 4.0**-number
    weight.grad = grad
    if per_head:
        MuonPerHead(weight, LAYOUT, lr=0.02, **SIZES).step()
    else:
        torch.optim.Muon([weight], lr=0.02, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    return tt.blocks(weight.detach() - before, LAYOUT, **SIZES)


def main() -> None:
    whole, apart = updates(per_head=False), updates(per_head=True)
    print("        one fused matrix        head by head")
    print("head    size   singular values  size   singular values")
    for name in whole:
        a, b = whole[name], apart[name]
        print(f"{name}    {float(a.norm()):.3f}  {spectrum(a):<15}  {float(b.norm()):.3f}  {spectrum(b)}")


if __name__ == "__main__":
    main()
