"""Scores from sums of unit gradients equal those by the definition, for any axis and any weighting of donors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gradients.toy_decoders import Linear, Toy
from perturbed.axis.axes import (
    Weights,
    bootstrap_weights,
    make_axes,
    observed_weights,
    sum_donors,
    unit,
)
from perturbed.axis.groups import keep_genes
from perturbed.axis.unit_gradients import Scores, score_along, sum_gradients
from perturbed.decoders.base import Decoded, Decoder, LastLayer
from perturbed.gradients.gene_scores import score_genes

DONOR = np.array([0, 0, 1, 2, 2, 2, 3, 3, 4, 1, 4, 4, 0])
ARM = np.array([0, 0, 0, 1, 1])


def draw_cells(n_latent=3):
    rng = np.random.default_rng(0)
    z = rng.normal(size=(len(DONOR), n_latent)).astype(np.float32)
    return z, {"batch": torch.from_numpy(rng.integers(0, 2, len(DONOR)))}


def literal_scores(decoder, z, context, axis, logits=False):
    """Cosines by definition: every cell and gene apart, by autograd."""
    found = np.zeros((len(z), len(decoder.genes)))
    for i in range(len(z)):
        inside = {key: value[i : i + 1] for key, value in context.items()}
        for g in range(len(decoder.genes)):
            x = torch.from_numpy(z[i : i + 1]).requires_grad_(True)
            if logits:
                last = decoder.last_layer()
                y = (decoder.hidden(x, inside) @ last.weight.T + last.bias)[0, g]
            else:
                y = decoder.decode(x, inside).expression[0, g]
            gradient = torch.autograd.grad(y, x)[0][0].numpy()
            found[i, g] = gradient @ axis / np.linalg.norm(gradient) / np.linalg.norm(axis)
    return found


def score(decoder, z, context, weights, axes, **options) -> Scores:
    sums = sum_gradients(decoder, z, context, DONOR, axes[0], **options)
    return score_along(sums, unit(axes), weights, ARM, len(decoder.genes))


@pytest.mark.parametrize("logits", [False, True])
def test_scores_equal_the_definition(logits):
    decoder, (z, context) = Toy("softmax"), draw_cells()
    axis = np.array([0.3, -2.0, 0.7])
    scores = score(decoder, z, context, observed_weights(ARM), axis[None], logits=logits, memory_mb=1e-4)
    literal = literal_scores(decoder, z, context, axis, logits)
    for k in (0, 1):
        np.testing.assert_allclose(scores.cosine[k][:, 0], literal[ARM[DONOR] == k].mean(axis=0), atol=2e-6)
    assert scores.n_cells == (8, 5)


def test_norms_and_projections_equal_those_of_gene_scores():
    decoder, (z, context) = Toy("softplus"), draw_cells()
    axis = np.array([1.0, 1.0, -1.0])
    scores = score(decoder, z, context, observed_weights(ARM), axis[None])
    slow = score_genes(decoder, z, context, axis, groups=ARM[DONOR])
    for k in (0, 1):
        np.testing.assert_allclose(scores.norm[k], slow.norm[k], rtol=1e-5)
        np.testing.assert_allclose(scores.projection[k], slow.projection[k], atol=1e-6)


@pytest.mark.parametrize("kind", ["means", "donors", "discriminant"])
def test_bootstrap_draws_equal_resampled_cells_scored_from_scratch(kind):
    """The axis moves with the donors, too: every draw is recomputed on cells that are repeated as drawn."""
    decoder, (z, context) = Toy("softmax"), draw_cells()
    weights = bootstrap_weights(ARM, 12, seed=3)
    sums = sum_donors(z, DONOR, ARM[DONOR], 5, second=True)._replace(shrinkage=0.2)
    axes = make_axes(kind, sums, weights)
    scores = score(decoder, z, context, weights, axes)
    assert len({tuple(w) for w in weights.perturbed.T}) > 2
    for b in range(12):
        rows, donors = [], []
        for k, weight in enumerate(weights):
            names = np.repeat(np.arange(5), weight[:, b].astype(int))
            rows.append(np.concatenate([np.flatnonzero(d == DONOR) for d in names]))
            donors.append([z[d == DONOR].mean(axis=0) for d in names])
            assert (ARM[names] == k).all() and len(names) == (k == ARM).sum()
        means = [np.mean(d, axis=0) if kind == "donors" else z[r].mean(axis=0) for d, r in zip(donors, rows)]
        axis = (means[1] - means[0]).astype(np.float64)
        if kind == "discriminant":
            within = np.vstack([z[r] - z[r].mean(axis=0) for r in rows]).astype(np.float64)
            covariance = within.T @ within / len(within)
            covariance = 0.8 * covariance + 0.2 * np.trace(covariance) / 3 * np.eye(3)
            axis = np.linalg.inv(covariance) @ axis
        np.testing.assert_allclose(axes[b], axis, rtol=1e-4, atol=1e-6)
        for k in (0, 1):
            literal = literal_scores(decoder, z[rows[k]], {"batch": context["batch"][rows[k]]}, axis)
            np.testing.assert_allclose(scores.cosine[k][:, b], literal.mean(axis=0), atol=1e-5)


def test_cells_without_a_gradient_do_not_count():
    decoder, (z, _) = Linear(torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 1, 0]])), draw_cells()
    scores = score(decoder, z, {}, observed_weights(ARM), np.array([[1.0, 0, 0]]))
    np.testing.assert_allclose(scores.cosine[0][:, 0], [1.0, np.nan, 2**-0.5], rtol=1e-6)


def test_draws_without_an_axis_are_undefined():
    decoder, (z, context) = Toy(), draw_cells()
    weights = Weights(np.ones((5, 2)), np.ones((5, 2)))
    axes = np.array([[1.0, 0, 0], [0, 0, 0]])
    scores = score(decoder, z, context, weights, axes)
    assert np.isfinite(scores.cosine[0][:, 0]).all() and np.isnan(scores.cosine[0][:, 1]).all()


class Share(Decoder):
    """Shares of counts where the genes of one programme rise along the first latent and the others stand still."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        weight = np.zeros((60, 6))
        weight[:12, 0] = 1.0
        weight[12:, 1:] = rng.normal(size=(48, 5))  # at right angles to the programme
        self.weight = torch.from_numpy(weight).float()
        self.genes, self.n_latent = tuple(f"g{i}" for i in range(60)), 6

    def hidden(self, z, context):
        return z

    def last_layer(self) -> LastLayer:
        return LastLayer(self.weight, torch.zeros(60), "softmax")

    def decode(self, z, context) -> Decoded:
        return Decoded(torch.softmax(z @ self.weight.T, dim=1), z[:, :0])


def test_softmax_moves_unaffected_genes_and_logits_do_not():
    decoder = Share()
    z = np.random.default_rng(1).normal(0, 0.2, (len(DONOR), 6)).astype(np.float32)
    axis = np.eye(6)[:1]
    share = score(decoder, z, {}, observed_weights(ARM), axis).cosine[0][:, 0]
    logits = score(decoder, z, {}, observed_weights(ARM), axis, logits=True).cosine[0][:, 0]
    np.testing.assert_allclose(logits[:12], 1, atol=1e-6)
    np.testing.assert_allclose(logits[12:], 0, atol=1e-6)
    assert (share[12:] < -0.02).all() and np.median(share[12:]) < -0.05
    mean = torch.softmax(torch.from_numpy(z[:1]) @ decoder.weight.T, dim=1).numpy() @ decoder.weight.numpy()
    by_hand = decoder.weight.numpy()[20] - mean[0]
    literal = literal_scores(decoder, z[:1], {}, axis[0])[0, 20]
    np.testing.assert_allclose(literal, by_hand[0] / np.linalg.norm(by_hand), rtol=1e-4)


def test_genes_with_short_gradients_before_the_link_are_dropped():
    norm = np.array([1.0, 1.0, 0.7, 0.76, 5.0, 0.0])
    logits = Scores((norm[:, None], norm[:, None]), (norm, norm), (norm, norm), (1, 1))
    np.testing.assert_array_equal(keep_genes(logits, 0.75 / 0.88), [True, True, False, True, True, False])
    assert keep_genes(logits, 0.0).sum() == 5
