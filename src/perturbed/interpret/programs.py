"""Programs of PerturbedVAE: which response latent each perturbed gene hits, how latents drive each other, what they do.

Everything is read off the fitted causal model at the mean background, without sampling, and every finding that could be
an accident of the method stands beside a permutation null.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from perturbed.data.contracts import open_prepared, read_features, read_h5ad
from perturbed.errors import DataError, MethodError
from perturbed.files import atomic
from perturbed.interpret.agreement import assign, compare
from perturbed.interpret.gene_lists import COLUMNS as ENRICHMENT_COLUMNS
from perturbed.interpret.gene_lists import enrich_lists, read_gene_sets
from perturbed.interpret.spec import ProgramSpec
from perturbed.models.base import load_model
from perturbed.models.perturbedvae import PerturbedVAE
from perturbed.names import CONTROL

TABLES = {
    "hits": ("seed", "perturbation", "latent", "effect", "standardised_effect", "strongest"),
    "graph": ("seed", "source", "target", "weight", "standardised_weight", "kept"),
    "names": ("seed", "program", "n_targets", "targets", "intervention", "effect", "affected", "change", "name"),
    "enrichment": ("seed", *ENRICHMENT_COLUMNS),
    "stability": ("kind", "first", "second", "metric", "value", "null_mean", "null_high", "p_value", "n"),
}
"""Columns of the tables, by name."""
PLANTED = "planted"


@dataclass(frozen=True)
class Programs:
    """What one fitted model says, per unit of its control cells' spread.

    Parameters
    ----------
    seed
        Training seed.
    perturbed, genes
        Perturbed genes and genes of the expression.
    effects
        `E[z_ν | u] − E[z_ν | 0]` at the mean background, in standard deviations over control cells
        (n_perturbed, n_nu).
    sd
        Those standard deviations (n_nu,).
    edges
        Λ_νν of control, each weight times sd of its source over sd of its target (n_nu, n_nu), row = target.
    signature
        Change of decoded expression per standard deviation of each latent, the others held (n_nu, n_genes).
    leading
        Change of decoded expression by the strongest intervention on each latent, through this latent alone
        (n_nu, n_genes).
    """

    seed: int
    perturbed: tuple[str, ...]
    genes: tuple[str, ...]
    effects: np.ndarray
    sd: np.ndarray
    edges: np.ndarray
    signature: np.ndarray
    leading: np.ndarray

    @property
    def strongest(self) -> np.ndarray:
        """Latent that each perturbed gene moves most, in standard deviations (n_perturbed,)."""
        return assign(self.effects)

    @property
    def latents(self) -> list[str]:
        """Names of the latents, in causal order."""
        return [f"z{i + 1}" for i in range(len(self.sd))]


def write_programs(
    models: Sequence[Path],
    prepared: Path,
    features: Path,
    gene_sets: Path | None,
    truth: Path | None,
    spec: ProgramSpec,
    out: Path,
) -> None:
    """Write the tables of `TABLES` as csv files into the folder `out`.

    Parameters
    ----------
    models
        Fitted PerturbedVAE models of one split, several seeds.
    prepared
        For the genes' symbols, by which affected genes are named.
    features
        For the mean expression of the training cells, within bins of which random gene lists are drawn.
    gene_sets
        GMT file with gene names as in `var_names`; None leaves the enrichment empty.
    truth
        `truth.h5ad` of a simulation, whose planted latents and effects the fits are compared with; None for real data.
    spec
        Options.
    out
        Folder, written whole or not at all.

    Raises
    ------
    MethodError
        If a model is no PerturbedVAE, or two models differ in their perturbed genes.
    DataError
        If features or truth lack a gene or condition of the models.
    """
    fits = [read_programs(path) for path in models]
    if len({fit.perturbed for fit in fits}) != 1:
        raise MethodError("programs: needs models of one split, these differ in their perturbed genes")
    symbols = open_prepared(prepared).var["symbol"].astype(str)
    expression = read_features(features).table["mean"].reindex(list(fits[0].genes))
    if expression.isna().any():
        raise DataError(f"{features}: lacks gene {expression.index[expression.isna()][0]!r} of {models[0]}")
    tables = {
        "hits": pd.concat([tabulate_hits(fit) for fit in fits]),
        "graph": pd.concat([tabulate_graph(fit, spec) for fit in fits]),
        "names": pd.concat([name_programs(fit, symbols.to_dict()) for fit in fits]),
        "enrichment": pd.DataFrame(columns=list(TABLES["enrichment"])),
        "stability": tabulate_stability(fits, None if truth is None else read_planted(truth, fits[0].perturbed), spec),
    }
    if gene_sets is not None:
        sets = read_gene_sets(gene_sets, fits[0].genes, spec)
        found = [enrich_lists(list_genes(fit, spec), sets, fit.genes, expression.to_numpy(), spec) for fit in fits]
        tables["enrichment"] = pd.concat([t.assign(seed=fit.seed) for fit, t in zip(fits, found)])
    with atomic(out) as part:
        part.mkdir()
        for name, table in tables.items():
            chosen = table[list(TABLES[name])]
            chosen.to_csv(part / f"{name}.csv", index=False, lineterminator="\n", float_format="%.9g")


# --- reading a model --------------------------------------------------------------------------------------------------


def read_programs(path: Path) -> Programs:
    """Read programs off a saved model.

    Raises
    ------
    MethodError
        If it is no PerturbedVAE.
    """
    method = load_model(path)
    if not isinstance(method, PerturbedVAE):
        raise MethodError(f"{path}: {type(method).__name__} has no graph of response latents; give a PerturbedVAE")
    return extract(method, int(json.loads((path / "config.json").read_text())["extra"].get("seed", 0)))


@torch.no_grad()
def extract(method: PerturbedVAE, seed: int = 0) -> Programs:
    """Effects, graph and signatures of a fitted model.

    The effect of a gene is total: what its changed μ and edges bring about in all latents downstream,
    `(I − Λ_νν(u))⁻¹ (Λ_νι(u) z̄_ι + μ(u))` less the same at u = 0, with z̄_ι the mean background of the control cells. A
    latent's scale is its standard deviation over control cells under the model,
    `(I − Λ)⁻¹ (Λ_νι Cov(z_ι) Λ_νιᵀ + diag β) (I − Λ)⁻ᵀ` on the diagonal, where `Cov(z_ι)` is that of posterior means
    plus the mean posterior variance; latents are identified up to order and scale only, so nothing else compares them.

    Parameters
    ----------
    method
        A fitted model.
    seed
        Its training seed, for the tables.
    """
    state, meta = method.state(), method.meta()
    perturbed = tuple(meta["perturbed"])
    background = state["control.mean"].mean(dim=0, keepdim=True)
    conditions = torch.cat([torch.zeros(1, len(perturbed)), torch.eye(len(perturbed))])
    mechanisms = method.module.scm(conditions)
    which = torch.arange(len(conditions))
    silent = torch.zeros(len(conditions), mechanisms.shift.shape[1])
    z = method.module.scm.respond(mechanisms, which, background.expand(len(conditions), -1), silent).double().numpy()
    rest = state["control.mean"].double().numpy()
    covariance = np.cov(rest, rowvar=False, bias=True).reshape(rest.shape[1], rest.shape[1])
    covariance = covariance + np.diag(np.square(state["control.sd"].double().numpy()).mean(axis=0))
    edges, inputs, log_variance = (part[0].double().numpy() for part in (mechanisms[0], mechanisms[1], mechanisms[3]))
    sd = control_spread(edges, inputs, log_variance, covariance)
    raw = z[1:] - z[0]

    def decode(shift: np.ndarray) -> np.ndarray:
        latents = torch.from_numpy((z[0] + shift).astype(np.float32))
        return method.module.decode(latents, background.expand(len(latents), -1)).double().numpy()

    effects = raw / sd
    leader = np.abs(effects).argmax(axis=0)
    return Programs(
        seed=seed,
        perturbed=perturbed,
        genes=method.genes,
        effects=effects,
        sd=sd,
        edges=edges * sd[None, :] / sd[:, None],
        signature=(decode(np.diag(sd)) - decode(-np.diag(sd))) / 2,
        leading=decode(np.diag(raw[leader, np.arange(len(sd))])) - decode(np.zeros_like(edges)),
    )


def control_spread(
    edges: np.ndarray, inputs: np.ndarray, log_variance: np.ndarray, covariance: np.ndarray
) -> np.ndarray:
    """Standard deviation of each response latent over control cells, from the structural equations (n_nu,).

    Parameters
    ----------
    edges, inputs, log_variance
        Λ_νν (n_nu, n_nu), Λ_νι (n_nu, n_iota) and log β (n_nu,) of control.
    covariance
        Of the background over control cells (n_iota, n_iota).
    """
    solved = np.linalg.inv(np.eye(len(edges)) - edges)
    right = inputs @ covariance @ inputs.T + np.diag(np.exp(log_variance))
    return np.sqrt(np.diag(solved @ right @ solved.T))


# --- tables -----------------------------------------------------------------------------------------------------------


def tabulate_hits(fit: Programs) -> pd.DataFrame:
    """The hit map, long: effect of every perturbed gene on every latent, and which is its strongest."""
    n_perturbed, n_nu = fit.effects.shape
    return pd.DataFrame(
        {
            "seed": fit.seed,
            "perturbation": np.repeat(np.array(fit.perturbed, dtype=object), n_nu),
            "latent": np.tile(np.array(fit.latents, dtype=object), n_perturbed),
            "effect": (fit.effects * fit.sd).ravel(),
            "standardised_effect": fit.effects.ravel(),
            "strongest": (fit.strongest[:, None] == np.arange(n_nu)).ravel(),
        }
    )


def tabulate_graph(fit: Programs, spec: ProgramSpec) -> pd.DataFrame:
    """Every possible edge of control's latent graph, from source to target, and whether pruning keeps it."""
    target, source = np.tril_indices(len(fit.sd), -1)
    weight = fit.edges[target, source]
    return pd.DataFrame(
        {
            "seed": fit.seed,
            "source": [fit.latents[i] for i in source],
            "target": [fit.latents[i] for i in target],
            "weight": weight * fit.sd[target] / fit.sd[source],
            "standardised_weight": weight,
            "kept": np.abs(weight) > spec.prune,
        }
    )


def name_programs(fit: Programs, symbols: dict[str, str]) -> pd.DataFrame:
    """The latents that are some gene's strongest, with these genes and a name.

    A program is named by the intervention that moves its latent most, and by the gene whose decoded expression this
    changes most through this latent alone, other than the perturbed one: `TGFBR2 → SNAI1`, or `⊣` where it falls.
    """
    rows: list[dict[str, Any]] = []
    for k, latent in enumerate(fit.latents):
        members = np.flatnonzero(fit.strongest == k)
        if not len(members):
            continue
        leader = int(np.abs(fit.effects[:, k]).argmax())
        change = np.where(np.array(fit.genes) == fit.perturbed[leader], 0.0, fit.leading[k])
        best = int(np.abs(change).argmax())
        affected = symbols.get(fit.genes[best], fit.genes[best])
        rows.append(
            {
                "seed": fit.seed,
                "program": latent,
                "n_targets": len(members),
                "targets": " ".join(fit.perturbed[i] for i in members),
                "intervention": fit.perturbed[leader],
                "effect": fit.effects[leader, k],
                "affected": affected,
                "change": change[best],
                "name": f"{fit.perturbed[leader]} {'→' if change[best] > 0 else '⊣'} {affected}",
            }
        )
    return pd.DataFrame(rows, columns=list(TABLES["names"]))


def list_genes(fit: Programs, spec: ProgramSpec) -> dict[str, list[str]]:
    """The `n_top_genes` genes that move most with each program's latent, either way."""
    order = np.argsort(-np.abs(fit.signature), axis=1, kind="stable")[:, : spec.n_top_genes]
    return {fit.latents[k]: [fit.genes[i] for i in order[k]] for k in sorted(set(fit.strongest.tolist()))}


# --- stability and truth ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planted:
    """Planted latents of a simulation.

    Parameters
    ----------
    effects
        Mean of each latent under each single perturbation less that of control (n_perturbed, d_nu); planted latents
        share one scale.
    graph
        Planted edges of control (d_nu, d_nu), row = target; None where the simulator has none.
    """

    effects: np.ndarray
    graph: np.ndarray | None


def read_planted(path: Path, perturbed: Sequence[str]) -> Planted:
    """Planted effects of the `perturbed` genes, and the planted graph.

    Raises
    ------
    DataError
        If a condition is missing.
    """
    truth = read_h5ad(path)
    rows = truth.obs_names.get_indexer([CONTROL, *perturbed])
    if (rows < 0).any():
        missing = [CONTROL, *perturbed][int(np.flatnonzero(rows < 0)[0])]
        raise DataError(f"{path}: has no condition {missing!r}; it is of another simulation than the models")
    z = np.asarray(truth.obsm["z_nu"])[rows]
    graph = np.asarray(truth.obsm["lambda_nn"])[rows[0]] != 0 if "lambda_nn" in truth.obsm else None
    return Planted(z[1:] - z[0], graph)


def tabulate_stability(fits: Sequence[Programs], planted: Planted | None, spec: ProgramSpec) -> pd.DataFrame:
    """Agreement of every two seeds, and of every seed with what was planted; see `perturbed.interpret.agreement`."""
    rng = np.random.default_rng([spec.seed, 61])
    rows: list[dict[str, Any]] = []
    for one, two in combinations(fits, 2):
        graphs = (np.abs(one.edges) > spec.prune, np.abs(two.edges) > spec.prune)
        found = compare(one.effects, two.effects, graphs, spec.n_permutations, rng)
        rows += [{"kind": "seeds", "first": str(one.seed), "second": str(two.seed), **row} for row in found]
    for fit in fits if planted is not None else ():
        assert planted is not None
        graph = None if planted.graph is None else (np.abs(fit.edges) > spec.prune, planted.graph)
        found = compare(fit.effects, planted.effects, graph, spec.n_permutations, rng)
        rows += [{"kind": PLANTED, "first": str(fit.seed), "second": PLANTED, **row} for row in found]
    return pd.DataFrame(rows, columns=list(TABLES["stability"]))
