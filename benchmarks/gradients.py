"""Speed of gene scores beside their roofline: the matrix products a Jacobian needs at least, in one run, taking turns.

A scVI decoder as in the Census models: 8,000 genes, 50 latents, two hidden layers of 128, 200 batches; untrained, since
weights do not change the time. `products` is the path for decoders that end in a linear layer, `tangents` the one for
any other decoder, `plain` what a few lines would do: vmap over cells of the forward-mode Jacobian and cosines of it.

    python benchmarks/gradients.py [--threads 2] [--cells 2000] [--rounds 3]
"""

from __future__ import annotations

import argparse
import resource
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from torch.func import jacfwd, vmap

from perturbed.decoders.base import Context, Decoded, Decoder, LastLayer, chunks, take
from perturbed.gradients.gene_scores import score_genes

TARGETS = {"products": 700.0, "tangents": 110.0}
"""Cells a second on two idle cores."""
MEMORY_MB = 1024
N_GENES, N_LATENT, N_BATCH, N_HIDDEN = 8000, 50, 200, 128


class Census(Decoder):
    """scvi-tools' own module behind the protocol."""

    def __init__(self, fast: bool) -> None:
        from scvi.module import VAE

        self.genes = tuple(f"g{i}" for i in range(N_GENES))
        self.n_latent, self.fast = N_LATENT, fast
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = VAE(N_GENES, n_batch=N_BATCH, n_hidden=N_HIDDEN, n_latent=N_LATENT, n_layers=2)
        self.decoder = module.decoder.eval().requires_grad_(False)

    def hidden(self, z: torch.Tensor, context: Context) -> torch.Tensor:
        return self.decoder.px_decoder(z, context["batch"])

    def decode(self, z: torch.Tensor, context: Context) -> Decoded:
        return Decoded(self.decoder.px_scale_decoder(self.hidden(z, context)), z[:, :0])

    def last_layer(self) -> LastLayer | None:
        linear = self.decoder.px_scale_decoder[0]
        return LastLayer(linear.weight, linear.bias, "softmax") if self.fast else None


def plain_scores(decoder: Census, z: torch.Tensor, context: Context, axis: np.ndarray) -> None:
    """Cosines by vmap over cells, eight at a time; batches as one-hot, which vmap can follow."""
    layers = [block[0] for block in decoder.decoder.px_decoder.fc_layers]
    norms = [block[1] for block in decoder.decoder.px_decoder.fc_layers]
    last, a = decoder.decoder.px_scale_decoder[0], torch.from_numpy(axis).float()

    def one(x: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        for linear, norm in zip(layers, norms):
            x = linear(torch.cat([x, batch]))
            scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
            x = torch.relu((x - norm.running_mean) * scale + norm.bias)
        return torch.softmax(last(x), dim=-1)

    for rows in chunks(len(z), 8):
        batch = torch.nn.functional.one_hot(take(context, rows)["batch"][:, 0], N_BATCH).float()
        jacobian = vmap(jacfwd(one))(z[rows], batch)
        torch.nn.functional.cosine_similarity(jacobian, a, dim=2).sum(dim=0)


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cells", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    n, few = options.cells, max(16, options.cells // 10)
    z, context = torch.randn(n, N_LATENT), {"batch": torch.randint(0, N_BATCH, (n, 1))}
    axis = np.random.default_rng(0).normal(size=N_LATENT)
    fast, slow = Census(True), Census(False)
    slow.decoder = fast.decoder
    weight, inner = torch.randn(N_GENES, N_HIDDEN), torch.randn(N_HIDDEN, 20 * N_LATENT)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    some = take(context, slice(0, few))
    work: dict[str, tuple[int, Callable[[], object]]] = {
        "roofline": (few // 20 * 20, lambda: [bool((weight @ inner)[0, 0]) for _ in range(few // 20)]),  # keeps none
        "products": (n, lambda: score_genes(fast, z, context, axis)),
        "tangents": (few, lambda: score_genes(slow, z[:few], some, axis)),
        "plain": (few, lambda: plain_scores(slow, z[:few], some, axis)),
    }
    best = dict.fromkeys(work, np.inf)
    peak = before
    for _ in range(options.rounds):
        for name, (count, call) in work.items():
            best[name] = min(best[name], seconds(call) / count)
            if name == "tangents":  # before `plain`, whose memory is its own affair
                peak = max(peak, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024) if peak == before else peak
    one = score_genes(fast, z[:50], take(context, slice(0, 50)), axis)
    other = score_genes(slow, z[:50], take(context, slice(0, 50)), axis)
    print(f"gradients: {N_GENES} genes, {N_LATENT} latents, {n} cells, {options.threads} threads")
    for name, per_cell in best.items():
        target = f"target {TARGETS[name]:.0f}" if name in TARGETS else ""
        print(f"  {name:9s} {1 / per_cell:7.0f} cells/s  {best['roofline'] / per_cell:5.0%} of the roofline  {target}")
    print(f"  peak memory {peak:.0f} MiB, {peak - before:.0f} of it scoring; target {MEMORY_MB}")
    print(f"  largest difference of the two paths {np.nanmax(np.abs(one.cosine - other.cosine)):.1e}; target 1e-5")


if __name__ == "__main__":
    main()
