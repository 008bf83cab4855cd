from __future__ import annotations

import numpy as np
import pytest
import torch
from toy_decoders import Linear, Toy

from perturbed.gradients.flow import Manifold, Move, follow, map_flow, velocity

Z = torch.randn(9, 3, generator=torch.Generator().manual_seed(5))
WEIGHTS = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, -1.0]])


def test_velocity_of_a_linear_decoder_is_its_row():
    over = velocity(Linear(WEIGHTS), Z, {}, [Move(("g1",))])
    torch.testing.assert_close(over, torch.tensor([0.0, 2.0, 0.0]).expand(9, 3))
    down = velocity(Linear(WEIGHTS), Z, {}, [Move(("g1",), -1)])
    torch.testing.assert_close(down, -over)


def test_lists_average_and_moves_add():
    mean = velocity(Linear(WEIGHTS), Z, {}, [Move(("g0", "g1"))])
    torch.testing.assert_close(mean, torch.tensor([0.5, 1.0, 0.0]).expand(9, 3))
    both = velocity(Linear(WEIGHTS), Z, {}, [Move(("g0",)), Move(("g2",), -1)])
    torch.testing.assert_close(both, torch.tensor([1.0, 0.0, 1.0]).expand(9, 3))
    unit = velocity(Linear(WEIGHTS), Z, {}, [Move(("g0",)), Move(("g2",), -1)], unit=True)
    torch.testing.assert_close(torch.linalg.vector_norm(unit, dim=1), torch.ones(9))


def test_velocity_equals_finite_differences_of_a_head():
    decoder = Toy(n_heads=1)
    got, eps = velocity(decoder, Z, {}, [Move(("head0",))]), 1e-2
    for k in range(3):
        e = eps * torch.eye(3)[k]
        numeric = (decoder.decode(Z + e, {}).heads - decoder.decode(Z - e, {}).heads)[:, 0] / (2 * eps)
        torch.testing.assert_close(got[:, k], numeric, rtol=2e-2, atol=2e-3)


def test_each_cell_flows_alone():
    decoder, context = Toy(), {"batch": torch.tensor([0, 1, 1, 0, 1, 0, 1, 0, 0])}
    together = velocity(decoder, Z, context, [Move(("g2",))])
    alone = torch.cat(
        [velocity(decoder, Z[i : i + 1], {"batch": context["batch"][i : i + 1]}, [Move(("g2",))]) for i in range(9)]
    )
    torch.testing.assert_close(together, alone)


def test_over_expression_raises_the_gene_and_knock_down_lowers_it():
    for sign in (1, -1):
        path = follow(Toy("softplus"), Z, {}, [Move(("g3",), sign)], n_steps=5, delta=0.02, record=["g3", "g0"])
        assert path.z.shape == (6, 9, 3) and path.outputs.shape == (6, 9, 2) and path.names == ("g3", "g0")
        assert (sign * np.diff(path.outputs[:, :, 0], axis=0) >= -1e-7).all()
    np.testing.assert_array_equal(path.z[0], Z.numpy())


def test_a_step_is_delta_times_the_gradient():
    path = follow(Linear(WEIGHTS), Z, {}, [Move(("g1",))], n_steps=3, delta=0.05)
    np.testing.assert_allclose(path.z[3] - path.z[0], np.tile([0, 0.3, 0], (9, 1)), atol=1e-6)


def test_the_manifold_stops_cells_at_its_edge():
    rng = np.random.default_rng(0)
    cells = rng.uniform(-1, 1, (400, 3)).astype(np.float32)
    manifold = Manifold(cells, k=5)
    free = follow(Linear(WEIGHTS), cells[:20], {}, [Move(("g1",))], n_steps=40, delta=0.05)
    kept = follow(Linear(WEIGHTS), cells[:20], {}, [Move(("g1",))], n_steps=40, delta=0.05, manifold=manifold)
    assert free.z[-1, :, 1].max() > 4 and kept.z[-1, :, 1].max() < 1 + manifold.radius + 1e-6
    assert kept.stopped.all() and not free.stopped.any()
    assert manifold.holds(torch.from_numpy(kept.z[-1])).all()


def test_a_flow_map_is_masked_to_where_cells_are():
    rng = np.random.default_rng(0)
    left = rng.normal([-3, 0], 0.2, (200, 2))
    right = rng.normal([3, 0], 0.2, (200, 2))
    cells = np.vstack([left, right]).astype(np.float32)
    field = map_flow(Linear(torch.tensor([[1.0, -1.0]])), cells, {}, [Move(("g0",))])
    assert field.u.shape == field.inside.shape == (35, 35)
    assert np.isnan(field.u[~field.inside]).all()
    np.testing.assert_allclose(field.u[field.inside], 1.0)
    np.testing.assert_allclose(field.v[field.inside], -1.0)
    np.testing.assert_allclose(field.speed[field.inside], np.sqrt(2), rtol=1e-6)
    middle = np.abs(field.x) < 1.5
    assert not field.inside[:, middle].any() and field.inside.any()


def test_grid_points_take_the_context_of_their_nearest_cell():
    cells = np.array([[-1.0, 0.0], [1.0, 0.0], [-1.0, 1.0], [1.0, 1.0]], dtype=np.float32)
    decoder = Toy(n_latent=2)
    context = {"batch": torch.tensor([0, 1, 0, 1])}
    field = map_flow(decoder, cells, context, [Move(("g1",))], n_grid=4, quantile=0.0)
    iy, ix = np.argwhere(field.inside)[0]
    point = np.array([[field.x[ix], field.y[iy]]], dtype=np.float32)
    batch = torch.tensor([int(point[0, 0] > 0)])
    expected = velocity(decoder, point, {"batch": batch}, [Move(("g1",))]).numpy()[0]
    np.testing.assert_allclose([field.u[iy, ix], field.v[iy, ix]], expected, rtol=1e-5)


def test_flow_maps_are_for_two_dimensions():
    with pytest.raises(ValueError, match="2 latent dimensions"):
        map_flow(Linear(WEIGHTS), Z.numpy(), {}, [Move(("g0",))])
