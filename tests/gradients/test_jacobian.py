from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toy_decoders import Linear, Toy

from perturbed.decoders.base import take
from perturbed.errors import DataError
from perturbed.gradients import jacobian
from perturbed.gradients.gene_scores import score_genes
from perturbed.gradients.jacobian import along, gradients, gradients_of, jacobians, tangents

LINKS = ["identity", "softplus", "exp", "softmax"]
Z = torch.randn(11, 3, generator=torch.Generator().manual_seed(1))
CONTEXT = {"batch": torch.tensor([0, 1] * 5 + [1])}


def naive_jacobian(decoder, z, context):
    """One reverse pass per cell and output: slow and obvious."""
    rows = []
    for i in range(len(z)):
        inside = z[i : i + 1].clone().requires_grad_(True)
        out = decoder.outputs(inside, take(context, slice(i, i + 1)))[0]
        rows.append(torch.stack([torch.autograd.grad(y, inside, retain_graph=True)[0][0] for y in out]))
    return torch.stack(rows)  # cells, outputs, latents


def whole_jacobian(decoder, z, context, **options):
    parts = [c.values * c.slope[:, :, None] for c in jacobians(decoder, z, context, **options)]
    return torch.cat(parts, dim=1).permute(1, 0, 2)


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("fast", [True, False])
def test_jacobian_equals_naive_autograd(link, fast):
    decoder = Toy(link, fast=fast, scale=2.5)
    expected = naive_jacobian(decoder, Z, CONTEXT)
    torch.testing.assert_close(whole_jacobian(decoder, Z, CONTEXT), expected, rtol=1e-5, atol=5e-6)


@pytest.mark.parametrize("link", LINKS)
def test_jacobian_equals_finite_differences(link):
    decoder = Toy(link)
    for name in ("first", "second", "out", "bias", "batch_shift"):
        setattr(decoder, name, getattr(decoder, name).double())
    z, eps = Z.double(), 1e-6
    numeric = torch.stack(
        [
            (decoder.outputs(z + eps * e, CONTEXT) - decoder.outputs(z - eps * e, CONTEXT)) / (2 * eps)
            for e in torch.eye(3, dtype=torch.float64)
        ],
        dim=2,
    )
    torch.testing.assert_close(whole_jacobian(decoder, z, CONTEXT), numeric, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(naive_jacobian(decoder, z, CONTEXT), numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("link", LINKS)
def test_forward_and_reverse_agree_with_the_jacobian(link):
    decoder = Toy(link, n_heads=2)
    full = naive_jacobian(decoder, Z, CONTEXT)
    direction = torch.randn(11, 3, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(along(decoder, Z, CONTEXT, direction), torch.einsum("cgk,ck->cg", full, direction))
    readout = torch.randn(4, 9, generator=torch.Generator().manual_seed(3))
    expected = torch.einsum("rg,cgk->crk", readout, full)
    torch.testing.assert_close(gradients_of(decoder, Z, CONTEXT, readout), expected)
    torch.testing.assert_close(gradients_of(decoder, Z, CONTEXT, readout[0]), expected[:, 0])


@pytest.mark.parametrize("n_outputs", [1, 3, 4, 9])
def test_the_cheaper_mode_is_taken_and_equals_the_other(n_outputs, monkeypatch):
    """Reverse for at most as many outputs as latents (3), forward for more."""
    decoder, modes = Toy("softmax", n_heads=2), []
    monkeypatch.setattr(jacobian, "gradients_of", lambda *a, **k: modes.append("reverse") or gradients_of(*a, **k))
    monkeypatch.setattr(jacobian, "tangents", lambda *a: modes.append("forward") or tangents(*a))
    names = ("head1", "g3", "g0", "g1", "g2", "head0", "g6", "g5", "g4")[:n_outputs]
    found = gradients(decoder, Z, CONTEXT, names, memory_mb=2e-4)
    assert set(modes) == {"reverse" if n_outputs <= 3 else "forward"}
    full = naive_jacobian(decoder, Z, CONTEXT)
    torch.testing.assert_close(found, full[:, decoder.find(names)], rtol=1e-5, atol=1e-6)
    weights = torch.randn(n_outputs, 9, generator=torch.Generator().manual_seed(4))
    expected = torch.einsum("rg,cgk->crk", weights, full)
    torch.testing.assert_close(gradients(decoder, Z, CONTEXT, weights), expected, rtol=1e-5, atol=5e-6)


def test_derivatives_along_a_direction_hold_heads_too():
    decoder, direction = Toy(n_heads=2), torch.tensor([1.0, -1.0, 0.5])
    found = along(decoder, Z, CONTEXT, direction)
    each = gradients(decoder, Z, CONTEXT, [*decoder.genes, *decoder.heads])
    torch.testing.assert_close(found, each @ direction, rtol=1e-5, atol=1e-6)


class Spy(Toy):
    """Records how many cells are decoded at a time."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.sizes: list[int] = []

    def hidden(self, z, context):
        self.sizes.append(len(z))
        assert all(len(value) == len(z) for value in context.values())
        return super().hidden(z, context)


@pytest.mark.parametrize("fast", [True, False])
def test_chunks_fit_the_budget_and_pass_every_cell_once(fast):
    n, n_genes, n_latent = 500, 64, 4
    z = torch.randn(n, n_latent, generator=torch.Generator().manual_seed(0))
    context = {"batch": torch.zeros(n, dtype=torch.long)}
    for budget in (0.02, 0.1):
        decoder = Spy(n_genes=n_genes, n_latent=n_latent, fast=fast)
        largest = 0
        cells = []
        for chunk in jacobians(decoder, z, context, memory_mb=budget):
            largest = max(largest, chunk.values.numel() * 4)
            cells += range(n)[chunk.cells]
        assert cells == list(range(n))
        assert budget / 8 * 2**20 < largest <= budget * 2**20
        assert max(decoder.sizes) * n_genes * n_latent * 4 <= budget * 2**20


def test_other_modes_fit_the_budget_too():
    z = torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    context = {"batch": torch.zeros(500, dtype=torch.long)}
    for call in (
        lambda d: along(d, z, context, torch.ones(4), memory_mb=0.02),
        lambda d: gradients(d, z, context, ["g1"], memory_mb=0.02),
        lambda d: gradients(d, z, context, list(d.genes[:10]), memory_mb=0.02),
    ):
        decoder = Spy(n_genes=64, n_latent=4)
        assert len(call(decoder)) == 500
        assert max(decoder.sizes) * 64 * 4 <= 0.02 * 2**20


@pytest.mark.parametrize("fast", [True, False])
def test_memory_does_not_grow_with_cells(fast):
    """No tensor that scoring makes is larger than a few chunks, however many cells there are."""
    largest = []
    for n in (2_000, 20_000):
        z, context = torch.ones(n, 4), {"batch": torch.zeros(n, dtype=torch.long)}
        with Largest() as seen:
            score_genes(Toy(n_genes=64, n_latent=4, fast=fast), z, context, np.ones(4), memory_mb=0.2)
        largest.append(seen.n_bytes)
    assert largest[0] == largest[1] <= 0.2 * 2**20  # 2 % of cells × genes × latents


class Largest(TorchDispatchMode):
    """Sees every tensor that is made."""

    n_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple | list) else (out,)
        sizes = [
            x.numel() * x.itemsize
            for x in made
            if isinstance(x, torch.Tensor) and 2_000 not in x.shape and 20_000 not in x.shape
        ]
        self.n_bytes = max([self.n_bytes, *sizes])
        return out


def test_a_linear_decoder_gives_its_weights():
    weights = torch.tensor([[1.0, 2.0, 0.0], [0.0, -1.0, 3.0]])
    for chunk in jacobians(Linear(weights), Z, {}):
        torch.testing.assert_close(chunk.values, weights[:, None].expand(-1, 11, -1))


@pytest.mark.parametrize("fast", [True, False])
def test_chunks_change_nothing(fast):
    decoder = Toy(fast=fast)
    one_by_one = whole_jacobian(decoder, Z, CONTEXT, memory_mb=1e-6)
    torch.testing.assert_close(one_by_one, whole_jacobian(decoder, Z, CONTEXT), rtol=1e-5, atol=1e-7)


def test_logits_are_not_coupled_by_softmax():
    decoder = Toy("softmax")
    logits = Toy("identity")
    expected = naive_jacobian(logits, Z, CONTEXT)
    torch.testing.assert_close(whole_jacobian(decoder, Z, CONTEXT, logits=True), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="linear layer"):
        next(jacobians(Toy(fast=False), Z, CONTEXT, logits=True))


def slow_scores(decoder, z, context, axis):
    """Mean cosine per gene, one cell and gene at a time, in float64."""
    full = naive_jacobian(decoder, z, context).double().numpy()
    total = np.zeros(full.shape[1])
    for i in range(len(z)):
        for g in range(full.shape[1]):
            row = full[i, g]
            total[g] += row @ axis / (np.linalg.norm(row) * np.linalg.norm(axis)) / len(z)
    return total


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("fast", [True, False])
def test_scores_equal_the_slow_reference(link, fast):
    axis = np.array([1.0, -2.0, 0.5])
    decoder = Toy(link, fast=fast)
    scores = score_genes(decoder, Z, CONTEXT, axis)
    np.testing.assert_allclose(scores.cosine[0], slow_scores(decoder, Z, CONTEXT, axis), rtol=1e-4, atol=1e-6)
    assert scores.n_cells.tolist() == [11]


def test_the_sign_of_the_axis_is_the_sign_of_the_score():
    axis = np.array([1.0, 0.0, 0.0])
    weights = torch.tensor([[2.0, 0.0, 0.0], [-0.1, 0.0, 0.0], [0.0, 1.0, 0.0], [3.0, 3.0, 0.0]])
    scores = score_genes(Linear(weights), Z, {}, axis)
    np.testing.assert_allclose(scores.cosine[0], [1, -1, 0, np.sqrt(0.5)], atol=1e-6)
    np.testing.assert_allclose(score_genes(Linear(weights), Z, {}, -axis).cosine, -scores.cosine, atol=1e-6)


def test_scores_do_not_depend_on_units_of_the_output_or_the_axis():
    axis = np.array([1.0, -2.0, 0.5])
    one = score_genes(Toy(scale=1.0), Z, CONTEXT, axis)
    other = score_genes(Toy(scale=1e4), Z, CONTEXT, 7 * axis)
    np.testing.assert_allclose(one.cosine, other.cosine, atol=1e-6)
    np.testing.assert_allclose(one.norm * 1e4, other.norm, rtol=1e-5)


def test_groups_pool_to_the_whole_and_an_axis_per_cell_is_taken():
    axis, groups = np.array([0.3, 1.0, -1.0]), np.array([0, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2])
    scores = score_genes(Toy(), Z, CONTEXT, axis, groups=groups, n_groups=4)
    assert scores.cosine.shape == (4, 7) and np.isnan(scores.cosine[[1, 3]]).all()
    whole = score_genes(Toy(), Z, CONTEXT, axis)
    np.testing.assert_allclose(scores.pooled(), whole.cosine[0], atol=1e-6)
    by_group = (scores.cosine[0] + scores.cosine[2]) / 2
    np.testing.assert_allclose(scores.pooled(np.ones(4)), by_group, atol=1e-6)
    per_cell = score_genes(Toy(), Z, CONTEXT, np.tile(axis, (11, 1)))
    np.testing.assert_allclose(per_cell.cosine, whole.cosine, atol=1e-6)


def test_a_gene_without_gradient_has_no_score():
    weights = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    scores = score_genes(Linear(weights), Z, {}, np.array([1.0, 0, 0]))
    assert scores.cosine[0, 0] == pytest.approx(1) and np.isnan(scores.cosine[0, 1])
    assert scores.n_defined.tolist() == [[11, 0]]


def test_an_axis_without_direction_is_an_error():
    with pytest.raises(ValueError, match="no direction"):
        score_genes(Toy(), Z, CONTEXT, np.zeros(3))
    with pytest.raises(ValueError, match="dimensions"):
        score_genes(Toy(), Z, CONTEXT, np.ones(2))


def test_unknown_outputs_are_named():
    with pytest.raises(DataError, match="'g99' is no output"):
        Toy().find(["g99"])
