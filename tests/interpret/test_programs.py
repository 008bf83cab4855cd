"""Programs of a hand-made causal model are read off exactly, planted ones are recovered, and nulls are null."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse, stats

from perturbed.data.contracts import Features, write_features, write_h5ad
from perturbed.errors import DataError, MethodError
from perturbed.figures.programs import draw
from perturbed.figures.style import save
from perturbed.interpret.agreement import assign, compare, match_latents
from perturbed.interpret.gene_lists import enrich_lists, read_gene_sets
from perturbed.interpret.programs import (
    TABLES,
    control_spread,
    extract,
    list_genes,
    name_programs,
    read_programs,
    tabulate_graph,
    write_programs,
)
from perturbed.interpret.spec import ProgramSpec
from perturbed.models.base import FitRun, TrainingData, build, load_method_spec, save_model
from perturbed.models.perturbedvae import PerturbedVAE, PerturbedVAEParams
from perturbed.models.perturbedvae_module import PerturbedVAEModule
from perturbed.names import CONTROL

METHODS = [Path(__file__).parents[2] / "config" / "methods"]
QUICK = ProgramSpec(n_permutations=60, n_top_genes=12, min_set=3)
N_NU, N_IOTA, N_GENES, N_PERTURBED = 4, 3, 80, 24
GENES = tuple(f"G{i:02d}" for i in range(N_GENES))
PERTURBED = GENES[:N_PERTURBED]
SETS = np.arange(20, 20 + 12 * N_NU).reshape(N_NU, 12)
"""Genes that each planted latent drives."""


def planted_mechanisms() -> dict[str, np.ndarray]:
    """Gene i shifts latent i % 4, and takes away the parents of it; latents drive each other along a chain."""
    rng = np.random.default_rng(2)
    edges = np.zeros((N_NU, N_NU))
    edges[1, 0], edges[2, 1], edges[3, 0], edges[3, 2] = 0.8, -0.6, 0.05, 0.7
    mu = np.zeros((N_PERTURBED, N_NU))
    mu[np.arange(N_PERTURBED), np.arange(N_PERTURBED) % N_NU] = 3 * np.sign(rng.normal(size=N_PERTURBED))
    mu += 0.2 * rng.normal(size=mu.shape)
    loadings = np.zeros((N_GENES, N_NU))
    for k, members in enumerate(SETS):
        loadings[members, k] = rng.uniform(0.5, 1.5, len(members)) * rng.choice([-1, 1], len(members))
    inputs = rng.normal(0, 0.3, (N_NU, N_IOTA))
    return {"edges": edges, "mu": mu, "loadings": loadings, "inputs": inputs, "scale": np.array([1.0, 4.0, 0.3, 1.0])}


def make_model(order: np.ndarray | None = None, noise: float = 0.0, seed: int = 0) -> PerturbedVAE:
    """A PerturbedVAE that holds the planted mechanisms; its latents are rescaled, for scale is not identified.

    `order` permutes which latent of the model is which planted one (edges are left out then, as they are only
    triangular in one order); `noise` disturbs the effects.
    """
    world, rng = planted_mechanisms(), np.random.default_rng(seed)
    params = PerturbedVAEParams(n_nu=N_NU, n_iota=N_IOTA, n_hidden=2 * (N_NU + N_IOTA))
    method = PerturbedVAE(params)
    method._genes, method._perturbed, method._contexts = GENES, PERTURBED, ("all",)
    with torch.random.fork_rng():
        method.module = module = PerturbedVAEModule(N_GENES, N_PERTURBED, params)
    scale = world["scale"]
    edges = world["edges"] * scale[:, None] / scale[None, :]
    mu = (world["mu"] + noise * rng.normal(size=world["mu"].shape)) * scale
    inputs, loadings = world["inputs"] * scale[:, None], world["loadings"] / scale
    if order is not None:
        edges, mu, inputs, loadings = np.zeros_like(edges), mu[:, order], inputs[order], loadings[:, order]
    lower = np.tril_indices(N_NU, -1)
    probe = module.scm(torch.eye(N_PERTURBED))
    with torch.no_grad():
        for parameter in module.scm.parameters():
            parameter.zero_()
        module.scm.base.copy_(torch.from_numpy(np.concatenate([edges[lower], inputs.ravel()])))
        n_edges = len(module.scm.base)
        module.scm.linear.weight[n_edges : n_edges + N_NU] = 1.0
        gain = module.scm(torch.eye(N_PERTURBED)).shift[0, 0].item()
        module.scm.linear.weight[n_edges : n_edges + N_NU] = torch.from_numpy(mu.T / gain).float()
        first, last = module.decoder[0], module.decoder[-1]
        d = N_NU + N_IOTA  # f(z) − f(−z) of a leaky ReLU is linear, so that the decoder is, too
        first.weight.copy_(torch.cat([torch.eye(d), -torch.eye(d)]))
        first.bias.zero_()
        both = np.hstack([loadings, 0.2 * rng.normal(size=(N_GENES, N_IOTA))]) / 1.2
        last.weight.copy_(torch.from_numpy(np.hstack([both, -both])))
        last.bias.fill_(2.0)
        slope = module.decode(torch.eye(1, N_NU), torch.zeros(1, N_IOTA))[0] - 2.0
        last.weight.mul_(float(np.abs(loadings[:, 0]).sum() / slope.abs().sum()))
    assert probe.edges.shape == (N_PERTURBED, N_NU, N_NU)
    control = rng.normal(0, 1, (50, N_IOTA)) + 0.5
    kept = {"mean": control, "sd": np.full((50, N_IOTA), 0.4), "expression": np.full((1, N_GENES), 2.0)}
    method._control = {key: torch.from_numpy(value).float() for key, value in kept.items()}
    method._control["context"] = torch.zeros(50, dtype=torch.long)
    module.eval()
    return method


def test_effects_are_total_and_in_spreads_of_the_control():
    method, world = make_model(), planted_mechanisms()
    fit = extract(method, 3)
    reach = np.linalg.inv(np.eye(N_NU) - world["edges"])
    total = world["mu"] @ reach.T  # in planted units: scales must cancel
    background = method._control["mean"].double().numpy()
    rng = np.random.default_rng(0)
    n = 200_000
    z_iota = background[rng.integers(50, size=n)] + 0.4 * rng.normal(size=(n, N_IOTA))
    scale = world["scale"]
    noise = rng.normal(size=(n, N_NU)) / scale  # β = 1 in the model's units
    cells = (noise + z_iota @ world["inputs"].T) @ reach.T
    np.testing.assert_allclose(fit.effects, total / cells.std(axis=0), rtol=0.02, atol=0.02)
    np.testing.assert_allclose(fit.sd, cells.std(axis=0) * scale, rtol=0.01)
    assert (fit.strongest == np.abs(fit.effects).argmax(axis=1)).all() and fit.seed == 3


def test_the_spread_is_the_one_of_the_formula_without_edges():
    sd = control_spread(np.zeros((2, 2)), np.array([[2.0], [0.0]]), np.log([5.0, 9.0]), np.array([[1.0]]))
    np.testing.assert_allclose(sd, [3.0, 3.0])


def test_pruning_keeps_the_strong_edges_of_control():
    fit, world = extract(make_model()), planted_mechanisms()
    table = tabulate_graph(fit, QUICK)
    kept = {(row.source, row.target) for row in table[table["kept"]].itertuples()}
    assert ("z1", "z4") not in kept and len(table) == 6
    strong = {(f"z{j + 1}", f"z{i + 1}") for i, j in zip(*np.nonzero(np.abs(fit.edges) > 0.25))}
    assert kept == strong and kept <= {(f"z{j + 1}", f"z{i + 1}") for i, j in zip(*np.nonzero(world["edges"]))}
    weight = table.set_index(["source", "target"])["weight"]
    assert weight["z1", "z2"] == pytest.approx(0.8 * 4.0, rel=1e-5)


def test_signatures_are_the_decoders_and_lists_are_the_planted_sets():
    fit, world = extract(make_model()), planted_mechanisms()
    np.testing.assert_allclose(fit.signature, (world["loadings"] / world["scale"] * fit.sd).T, atol=1e-4)
    for latent, members in list_genes(fit, QUICK).items():
        assert set(members) == {GENES[i] for i in SETS[int(latent[1:]) - 1]}


def test_names_are_the_strongest_intervention_and_what_it_changes_most():
    fit = extract(make_model())
    table = name_programs(fit, {gene: gene.lower() for gene in GENES}).set_index("program")
    assert table["n_targets"].sum() == N_PERTURBED
    for k in range(N_NU):
        row = table.loc[f"z{k + 1}"]
        leader = PERTURBED[np.abs(fit.effects[:, k]).argmax()]
        change = fit.effects[PERTURBED.index(leader), k] * fit.signature[k]
        change[GENES.index(leader)] = 0
        best = np.abs(change).argmax()
        assert (row["intervention"], row["affected"]) == (leader, GENES[best].lower())
        assert row["change"] == pytest.approx(change[best], rel=1e-3)
        assert row["name"].split()[1] == ("→" if change[best] > 0 else "⊣")


# --- agreement --------------------------------------------------------------------------------------------------------


def test_latents_are_matched_whatever_their_order_and_sign():
    rng = np.random.default_rng(0)
    effects = rng.normal(size=(20, 5))
    order = np.array([3, 0, 4, 2, 1])
    rows, columns = match_latents(effects, -2 * effects[:, order])
    np.testing.assert_array_equal(order[columns], rows)


def test_the_same_programs_agree_beyond_permutation_and_others_do_not():
    order = np.array([2, 0, 3, 1])
    one, two = extract(make_model(order=np.arange(4))).effects, extract(make_model(order, noise=0.3, seed=1)).effects
    found = {row["metric"]: row for row in compare(one, two, None, 99, np.random.default_rng(0))}
    for row in found.values():
        assert row["value"] > row["null_high"] and row["p_value"] == pytest.approx(0.01)
    assert found["adjusted_rand"]["null_mean"] == pytest.approx(0, abs=0.05)
    assert found["jaccard"]["value"] > 0.8 and found["effect_correlation"]["value"] > 0.9


def test_p_values_of_unrelated_fits_are_uniform():
    rng = np.random.default_rng(1)
    p = []
    for _ in range(30):
        rows = compare(rng.normal(size=(15, 4)), rng.normal(size=(15, 4)), None, 29, rng)
        p.append([row["p_value"] for row in rows])
    for column in np.array(p).T:
        assert stats.kstest(column, "uniform").pvalue > 1e-3
        assert 0.3 < column.mean() < 0.75


def test_graphs_agree_under_the_matching_and_empty_ones_are_undefined():
    rng = np.random.default_rng(0)
    effects = rng.normal(size=(30, 8))
    order = rng.permutation(8)
    graph = np.tril(rng.random((8, 8)) < 0.3, -1)
    turned = graph[np.ix_(order, order)]
    row = compare(effects, effects[:, order], (graph, turned), 99, np.random.default_rng(0))[-1]
    assert row["metric"] == "edge_jaccard" and row["value"] == 1 and row["p_value"] < 0.05
    empty = np.zeros((8, 8), dtype=bool)
    assert np.isnan(compare(effects, effects, (empty, empty), 20, rng)[-1]["p_value"])


def test_strongest_is_by_size_not_sign():
    assert assign(np.array([[1.0, -3.0], [2.0, 0.5]])).tolist() == [1, 0]


# --- gene lists -------------------------------------------------------------------------------------------------------


def test_hypergeometric_against_counting():
    rng = np.random.default_rng(0)
    sets = {"a": GENES[20:32], "b": GENES[5:50]}
    lists = {"z1": [*GENES[20:28], *GENES[60:64]]}
    table = enrich_lists(lists, sets, GENES, rng.normal(size=N_GENES), QUICK).set_index("gene_set")
    for name in sets:
        draws = np.array([len(set(rng.choice(GENES, 12, replace=False)) & set(sets[name])) for _ in range(4000)])
        assert table.loc[name, "p_value"] == pytest.approx((draws >= table.loc[name, "n_overlap"]).mean(), abs=0.02)
        assert table.loc[name, "expected"] == pytest.approx(draws.mean(), rel=0.05)
    assert table.loc["a", "fdr"] < 1e-3 and table.loc["a", "p_random_lists"] == pytest.approx(1 / 61)


def test_random_lists_are_not_enriched_but_expressed_ones_would_seem_so():
    """Lists of expressed genes hit a set of expressed genes; random lists as expressed show that this is no finding."""
    rng = np.random.default_rng(4)
    expression = np.arange(N_GENES, dtype=float)
    sets = {"expressed": GENES[60:], **{f"s{i}": tuple(rng.choice(GENES, 10, replace=False)) for i in range(10)}}
    lists = {f"z{i}": list(rng.choice(GENES[56:], 12, replace=False)) for i in range(1, 9)}
    table = enrich_lists(lists, sets, GENES, expression, QUICK)
    best = table[table["gene_set"] == "expressed"]
    assert (best["fdr"] < 0.05).all()
    assert (best["p_random_lists"] > 0.05).mean() >= 0.75


def test_gene_sets_are_cut_to_the_genes_and_to_size(tmp_path):
    path = tmp_path / "sets.gmt"
    path.write_text("one\tx\tG00\tG01\tG02\tFOREIGN\ntwo\tx\tG00,1.0\tG05\nthree\tx\tG03\tG04\tG05\n")
    assert read_gene_sets(path, GENES, QUICK) == {"one": ("G00", "G01", "G02"), "three": ("G03", "G04", "G05")}
    with pytest.raises(DataError, match="same gene names"):
        read_gene_sets(path, ("A", "B"), QUICK)
    path.write_text("one G00 G01\n")
    with pytest.raises(DataError, match="line 1"):
        read_gene_sets(path, GENES, QUICK)


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("programs")
    spec = load_method_spec("perturbedvae", METHODS)
    for seed, order in ((0, None), (1, np.array([1, 3, 0, 2]))):
        save_model(where / f"model{seed}", make_model(order, noise=0.2, seed=seed), spec, {"seed": seed})
    var = pd.DataFrame({"gene_id": GENES, "symbol": [gene.lower() for gene in GENES]}, list(GENES))
    obs = pd.DataFrame({"perturbation": [CONTROL], "n_perturbed": [0], "context": ["all"]}, ["c"])
    cells = AnnData(sparse.csr_matrix(np.ones((1, N_GENES), dtype=np.float32)), obs=obs, var=var)
    cells.uns["perturbed"] = {"values": "log1p"}
    write_h5ad(where / "prepared.h5ad", cells)
    mean = np.random.default_rng(0).normal(2, 1, N_GENES)
    table = pd.DataFrame({"mean": mean, "sd": 1.0, "pc1": 0.1}, pd.Index(GENES, name="gene"))
    write_features(where / "features.csv", Features(table, {"split_sha256": "x", "upstream": False, "spec": {}}))
    world = planted_mechanisms()
    names = [CONTROL, *PERTURBED]
    truth = AnnData(np.zeros((len(names), 2), dtype=np.float32), obs=pd.DataFrame(index=names))
    truth.obsm["z_nu"] = np.vstack([np.zeros(N_NU), world["mu"] @ np.linalg.inv(np.eye(N_NU) - world["edges"]).T])
    truth.obsm["lambda_nn"] = np.repeat(world["edges"][None], len(names), axis=0)
    write_h5ad(where / "truth.h5ad", truth)
    lines = [f"program{k}\tplanted\t" + "\t".join(GENES[i] for i in members) for k, members in enumerate(SETS)]
    lines += ["other\tx\t" + "\t".join(GENES[i] for i in range(0, 80, 7))]
    (where / "sets.gmt").write_text("\n".join(lines) + "\n")
    return where


def write(folder: Path, out: Path, **other) -> dict[str, pd.DataFrame]:
    files = {"gene_sets": folder / "sets.gmt", "truth": folder / "truth.h5ad", "spec": QUICK, **other}
    models = [folder / "model0", folder / "model1"]
    write_programs(models, folder / "prepared.h5ad", folder / "features.csv", **files, out=out)
    return {name: pd.read_csv(out / f"{name}.csv") for name in TABLES}


def test_planted_programs_are_recovered_in_files_and_figure(folder, tmp_path):
    tables = write(folder, tmp_path / "programs")
    for name, table in tables.items():
        assert tuple(table.columns) == TABLES[name]
    assert tables["hits"].groupby(["seed", "perturbation"])["strongest"].sum().eq(1).all()
    stability = tables["stability"].set_index(["kind", "first", "metric"])
    for metric in ("adjusted_rand", "jaccard", "effect_correlation"):
        row = stability.loc[("seeds", 0, metric)]
        assert row["value"] > row["null_high"]
        assert (stability.loc[("planted", 0, metric), "p_value"]) < 0.05
    assert stability.loc[("planted", 0, "edge_jaccard"), "value"] >= 0.5
    best = tables["enrichment"].sort_values("p_value").drop_duplicates(["seed", "program"])
    assert (best["gene_set"] != "other").all() and (best["fdr"] < 0.01).all() and (best["p_random_lists"] < 0.05).all()
    assert best[best["seed"] == 0].set_index("program")["gene_set"].to_dict() == {
        f"z{k + 1}": f"program{k}" for k in range(4)
    }
    write(folder, tmp_path / "again")
    for name in TABLES:
        assert (tmp_path / "programs" / f"{name}.csv").read_bytes() == (tmp_path / "again" / f"{name}.csv").read_bytes()
    save(draw(tmp_path / "programs"), tables["hits"], tmp_path / "figure")
    svg = (tmp_path / "figure.svg").read_text()
    assert "Hit map" in svg and "between seeds" in svg and "against planted truth" in svg


def test_without_gene_sets_and_truth_the_tables_say_less(folder, tmp_path):
    tables = write(folder, tmp_path / "programs", gene_sets=None, truth=None)
    assert tables["enrichment"].empty and set(tables["stability"]["kind"]) == {"seeds"}
    save(draw(tmp_path / "programs"), tables["hits"], tmp_path / "figure")
    assert "no gene sets were given" in (tmp_path / "figure.svg").read_text()


def test_other_methods_and_other_simulations_are_refused(folder, tmp_path):
    with pytest.raises(DataError, match="another simulation"):
        bad = tmp_path / "truth.h5ad"
        write_h5ad(bad, AnnData(np.zeros((1, 2), dtype=np.float32), obs=pd.DataFrame(index=[CONTROL])))
        write(folder, tmp_path / "programs", truth=bad)
    assert not (tmp_path / "programs").exists()
    spec = load_method_spec("no_change", METHODS)
    X, labels = sparse.csr_matrix(np.ones((2, 3), dtype=np.float32)), np.array([CONTROL, "A"])
    data = TrainingData(X, labels, np.array(["all", "all"]), np.zeros(2, bool), ("A", "B", "C"), np.ones(3), np.eye(3))
    method = build(spec)
    method.fit(data, FitRun())
    save_model(tmp_path / "no_change", method, spec, {"seed": 0})
    with pytest.raises(MethodError, match="NoChange has no graph of response latents"):
        read_programs(tmp_path / "no_change")


def test_a_folder_without_tables_is_not_drawn(tmp_path):
    with pytest.raises(DataError, match=r"holds no hits\.csv"):
        draw(tmp_path)
