"""Multilayer perceptrons by their widths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from perturbed.errors import MethodError, suggest

Activation = Literal["leaky_relu", "relu", "silu", "gelu", "tanh"]

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "tanh": nn.Tanh,
}
"""Activations by name; `leaky_relu` has the slope 0.2 that the discrepancy-VAE uses."""


class MLP(nn.Sequential):
    """Layers whose result has the dtype of what entered, also under autocast.

    Inside, autocast may multiply in bfloat16; softplus, logarithms, KL terms and triangular solves behind it stay in
    the precision of the data.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layers in turn."""
        return super().forward(x).to(x.dtype)


def build_mlp(widths: Sequence[int], activation: Activation = "leaky_relu", *, last: bool = False) -> MLP:
    """Build linear layers of the given widths with activations between them.

    Parameters
    ----------
    widths
        Width of the input, of every hidden layer and of the output; at least two. `(n, m)` is one linear map.
    activation
        A key of `ACTIVATIONS`.
    last
        Put an activation behind the last layer too, as a trunk that heads stand on needs.

    Raises
    ------
    MethodError
        If the activation is unknown.
    """
    if activation not in ACTIVATIONS:
        raise MethodError(f"activation: unknown {activation!r}; {suggest(activation, ACTIVATIONS)}")
    layers: list[nn.Module] = []
    for i, (n_in, n_out) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(n_in, n_out))
        if last or i < len(widths) - 2:
            layers.append(ACTIVATIONS[activation]())
    return MLP(*layers)
