"""Small decoders whose derivatives can be checked by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perturbed.decoders.base import Context, Decoded, Decoder, LastLayer


class Toy(Decoder):
    """Two tanh layers, then one linear layer and a link; a batch shifts the input; optionally heads."""

    def __init__(self, link="softmax", *, n_genes=7, n_latent=3, n_heads=0, scale=1.0, fast=True, seed=0) -> None:
        generator = torch.Generator().manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
        self.genes = tuple(f"g{i}" for i in range(n_genes))
        self.heads = tuple(f"head{i}" for i in range(n_heads))
        self.n_latent, self.link, self.scale, self.fast = n_latent, link, scale, fast
        self.first, self.second, self.out = draw(5, n_latent), draw(6, 5), draw(n_genes + n_heads, 6)
        self.bias, self.batch_shift = draw(n_genes + n_heads), draw(2, 5)

    def hidden(self, z: Tensor, context: Context) -> Tensor:
        first = z @ self.first.T
        if "batch" in context:
            first = first + nn.functional.one_hot(context["batch"], 2).to(z.dtype) @ self.batch_shift
        return torch.tanh(torch.tanh(first) @ self.second.T)

    def decode(self, z: Tensor, context: Context) -> Decoded:
        out = self.hidden(z, context) @ self.out.T + self.bias
        genes, heads = out[:, : len(self.genes)], out[:, len(self.genes) :]
        links = {
            "identity": lambda a: a,
            "softplus": nn.functional.softplus,
            "exp": torch.exp,
            "softmax": lambda a: torch.softmax(a, dim=1),
        }
        return Decoded(self.scale * links[self.link](genes), heads)

    def last_layer(self) -> LastLayer | None:
        n = len(self.genes)
        return LastLayer(self.out[:n], self.bias[:n], self.link, self.scale) if self.fast else None  # type: ignore[arg-type]


class Linear(Decoder):
    """y = A z: every derivative is known."""

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights
        self.genes = tuple(f"g{i}" for i in range(len(weights)))
        self.n_latent = weights.shape[1]

    def decode(self, z: Tensor, context: Context) -> Decoded:
        return Decoded(z @ self.weights.T, z[:, :0])
