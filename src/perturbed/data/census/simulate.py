"""Simulated mouse islets with a planted disease programme, laid out as the Census has its cells.

The log rate of gene g in cell c is

    b_g + type_{t(c),g} + dataset_{s(c),g} + assay_{a(c),g} + donor_{d(c),g} + p_c·e_g + o_c·age_g + n_c·nuisance_g

and counts are negative binomial around the cell's depth. `e` is what is planted: genes that rise or fall along the
disease programme p. p differs between the groups, and from cell to cell within each of them, so that a model can learn
its direction. What a naive comparison of the groups meets beside it is built in as well: other shares of cell types in
disease, old healthy donors, treated donors with the label of the untreated ones, donors, assays and datasets.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse

from perturbed.data.census.islet_genes import CELL_TYPES, DOWN, MARKERS, OLD, UP, gene_ids, symbols
from perturbed.data.census.spec import IsletParams, SimulationCells
from perturbed.files import atomic, write_text

TYPES = tuple(CELL_TYPES)
NORMAL, DISEASE = "normal", "type 2 diabetes mellitus"
DATASETS = {name: f"51a70000-0000-4000-8000-00000000000{i + 1}" for i, name in enumerate(("STZ", "VSG", "copies"))}
"""Ids of the datasets: two experiments, and a third that holds copies of some of their cells."""
SHARES = {NORMAL: (0.52, 0.20, 0.10, 0.06, 0.12), DISEASE: (0.38, 0.30, 0.12, 0.08, 0.12)}
"""Share of each cell type: a confounder of every comparison that does not look within cell types."""
DISPERSION = 5.0
"""The negative binomial's inverse dispersion θ: variance = mean + mean²/θ."""
BLOCK = 1000
"""Cells simulated at once; part of the result."""
_WORLD, _CELLS, _COUNTS, _SETS = range(4)


class Arm(NamedTuple):
    """Donors that are kept alike."""

    dataset: str
    name: str
    disease: str
    shift: float
    """Part of the disease programme's shift that the arm undergoes."""
    age: float
    extra: int
    """Donors of the arm, beside the matched ones, that a share of `n_donors` does not set; 0 for matched arms."""


ARMS = (
    Arm("STZ", "G1_control", NORMAL, 0.0, 0.0, 0),
    Arm("STZ", "G2_mSTZ", DISEASE, 1.0, 0.0, 0),
    Arm("STZ", "G4_GLP1", DISEASE, 0.5, 0.0, 2),
    Arm("VSG", "chow_WT", NORMAL, 0.0, 0.0, 0),
    Arm("VSG", "Lepr_sham", DISEASE, 1.0, 0.0, 0),
    Arm("VSG", "old_WT", NORMAL, 0.0, 1.0, 2),
)
"""Arms of both experiments; the first two of each are matched. Donors are named `simulated_islets__DATASET__ARM_N`."""


@dataclass(frozen=True)
class IsletWorld:
    """What is drawn before any cell."""

    genes: pd.DataFrame
    """Indexed by `gene_id`: `symbol`, `effect` (log rate per unit of the programme), `age`, `set`."""
    base: np.ndarray
    """Log rate (n_genes,)."""
    types: np.ndarray
    """(n_types, n_genes)."""
    donors: pd.DataFrame
    """`donor_id`, `dataset`, `assay`, `sex`, `disease`, `arm`, `age`, `programme` (mean in β cells)."""
    donor_shift: np.ndarray
    """(n_donors, n_genes): dataset, assay and donor."""
    nuisance: np.ndarray
    """Loadings of a programme that has nothing to do with disease (n_genes,)."""


class Islets(NamedTuple):
    """Simulated cells and their truth."""

    obs: pd.DataFrame
    var: pd.DataFrame
    counts: sparse.csr_matrix
    programme: np.ndarray
    """The disease programme of each cell (n_cells,)."""
    truth: pd.DataFrame
    gene_sets: list[tuple[str, str, list[str]]]
    """Name, kind (planted, trap, decoy) and symbols."""


def simulate_islets(params: IsletParams, seed: int = 0) -> Islets:
    """Draw cells, counts and truth.

    Parameters
    ----------
    params
        Sizes and effects.
    seed
        Of every draw; the same seed gives the same arrays.

    Returns
    -------
    Islets
        `obs` and `var` have the columns of a Census of schema 1.2.
    """
    world = draw_world(params, seed)
    n_primary = params.n_cells - round(params.duplicates * params.n_cells)
    obs, programme, counts = _draw_cells(world, params, seed, n_primary)
    rng = np.random.default_rng([seed, _CELLS, 1])
    copied = np.sort(rng.choice(n_primary, params.n_cells - n_primary, replace=False))
    copies = obs.iloc[copied].assign(dataset_id=DATASETS["copies"], is_primary_data=False)
    obs = pd.concat([obs, copies], ignore_index=True)
    counts = sparse.csr_matrix(sparse.vstack([counts, counts[copied]], format="csr"))
    return Islets(
        _finish_obs(obs, counts),
        _var(world, counts),
        counts,
        np.concatenate([programme, programme[copied]]),
        truth_table(world, params),
        draw_gene_sets(world, params, seed),
    )


def write_simulation(
    cells: SimulationCells, name: str, store: str | Path, truth: str | Path, gene_sets: str | Path
) -> None:
    """Simulate the islets of a card and write the store, `truth.csv` and the gene sets (GMT).

    The sets' second column is `planted` (pathways of the programme), `trap` (markers of cell types, and age, which
    comparisons of the whole groups find) or `decoy`.
    """
    from perturbed.data.census.store import write_store

    islets = simulate_islets(cells.params, cells.seed)
    about = {"name": name, "params": cells.params.model_dump(mode="json"), "seed": cells.seed}
    write_store(
        store, cells.organism, islets.obs, islets.var, islets.counts, census_version=cells.census_version, about=about
    )
    write_text(gene_sets, "".join("\t".join([key, kind, *genes]) + "\n" for key, kind, genes in islets.gene_sets))
    with atomic(truth) as part:
        islets.truth.to_csv(part, index=False, float_format="%.6g", lineterminator="\n")


# --- the world ----------------------------------------------------------------------------------------------------


def draw_world(params: IsletParams, seed: int) -> IsletWorld:
    """Draw genes, cell types and donors."""
    rng = np.random.default_rng([seed, _WORLD])
    n = params.n_genes
    genes = _genes(params, rng)
    names = genes["symbol"].to_numpy()
    base = rng.normal(0.0, 1.0, n)
    base[: _n_known(names)] += 1.0  # known genes are known because they can be seen
    types = rng.normal(0.0, 0.9, (len(TYPES), n)) * (rng.random((len(TYPES), n)) < 0.12)
    for i, name in enumerate(TYPES):
        types[:, np.isin(names, MARKERS[name].split())] = -1.0
        types[i, np.isin(names, MARKERS[name].split())] = rng.uniform(1.0, 2.2)
    for hormone, kind in (("Ins1", 0), ("Ins2", 0), ("Gcg", 1), ("Sst", 2), ("Ppy", 3)):
        types[kind, names == hormone] += 1.2
    donors = _donors(params, rng)
    batches = {key: rng.normal(0.0, params.batch_sd, n) for key in ("STZ", "VSG", "10x 3' v2", "10x 3' v3")}
    own = rng.normal(0.0, params.donor_gene_sd, (len(donors), n))
    shift = np.array([batches[s] + batches[a] for s, a in zip(donors["dataset"], donors["assay"])]) + own
    nuisance = rng.normal(0.0, 0.5, n) * (rng.random(n) < 0.15) * (genes["effect"] == 0).to_numpy()
    return IsletWorld(genes, base, types, donors, shift, nuisance)


def _n_known(names: np.ndarray) -> int:
    return sum(not name.startswith("Simg") for name in names)


def _genes(params: IsletParams, rng: np.random.Generator) -> pd.DataFrame:
    names = symbols(params.n_genes)
    table = pd.DataFrame({"symbol": names, "effect": 0.0, "age": 0.0, "set": "none"}, index=gene_ids(params.n_genes))
    table.index.name = "gene_id"
    invented = [name for name in names if name.startswith("Simg")]
    spare = list(rng.permutation(invented))
    for sign, modules, size in ((1, UP, params.n_up), (-1, DOWN, params.n_down)):
        chosen = [(gene, module) for module, text in modules.items() for gene in text.split()][:size]
        chosen += [(spare.pop(), "unnamed") for _ in range(size - len(chosen))]
        sizes = rng.uniform(0.6, 1.4, size) * params.effect
        for (gene, module), value in zip(chosen, sizes):
            table.loc[table["symbol"] == gene, ["effect", "set"]] = [sign * value, module]
    old = [*OLD.split(), *(spare.pop() for _ in range(30))]
    table.loc[table["symbol"].isin(old), "age"] = rng.choice([-1.0, 1.0], len(old)) * params.age_effect
    return table


def _donors(params: IsletParams, rng: np.random.Generator) -> pd.DataFrame:
    rows = []
    for arm in ARMS:
        for i in range(arm.extra or params.n_donors):
            programme = arm.shift * params.disease_shift + rng.normal(0.0, params.donor_sd)
            rows.append(
                {
                    "donor_id": f"simulated_islets__{arm.dataset}__{arm.name}_{i + 1}",
                    "dataset": arm.dataset,
                    "assay": "10x 3' v3" if (arm.dataset == "VSG") != (i == 0) else "10x 3' v2",
                    "sex": ("male", "female")[i % 2],
                    "disease": arm.disease,
                    "arm": arm.name,
                    "age": arm.age,
                    "programme": programme,
                }
            )
    return pd.DataFrame(rows)


# --- cells --------------------------------------------------------------------------------------------------------


def _draw_cells(
    world: IsletWorld, params: IsletParams, seed: int, n_cells: int
) -> tuple[pd.DataFrame, np.ndarray, sparse.csr_matrix]:
    rng = np.random.default_rng([seed, _CELLS])
    donor = np.sort(np.arange(n_cells) % len(world.donors))
    donors = world.donors.iloc[donor].reset_index(drop=True)
    shares = np.array([SHARES[disease] for disease in donors["disease"]]).cumsum(axis=1)
    kind = (rng.random(n_cells)[:, None] > shares).sum(axis=1).clip(max=len(TYPES) - 1)
    part = np.array([1.0, params.alpha_share, *[params.alpha_share / 4] * (len(TYPES) - 2)])[kind]
    programme = donors["programme"].to_numpy() * part + rng.normal(0.0, params.programme_sd, n_cells)
    nuisance = rng.normal(0.0, 1.0, n_cells)
    depth = params.depth * np.exp(rng.normal(0.0, 0.35, n_cells))
    depth[rng.random(n_cells) < params.poor_cells] *= 0.05
    age = donors["age"].to_numpy()
    effect, old = world.genes["effect"].to_numpy(), world.genes["age"].to_numpy()
    blocks = []
    for block, start in enumerate(range(0, n_cells, BLOCK)):
        rows = slice(start, min(start + BLOCK, n_cells))
        log_rate = world.base + world.types[kind[rows]] + world.donor_shift[donor[rows]]
        log_rate += (
            np.outer(programme[rows], effect) + np.outer(age[rows], old) + np.outer(nuisance[rows], world.nuisance)
        )
        share = np.exp(log_rate)
        rate = share / share.sum(axis=1, keepdims=True) * depth[rows, None]
        drawn = np.random.default_rng([seed, _COUNTS, block])
        counts = drawn.poisson(rate * drawn.gamma(DISPERSION, 1 / DISPERSION, rate.shape))
        blocks.append(sparse.csr_matrix(counts.astype(np.float32)))
    obs = pd.DataFrame(
        {
            "dataset_id": [DATASETS[name] for name in donors["dataset"]],
            "assay": donors["assay"],
            "cell_type": [TYPES[k] for k in kind],
            "development_stage": np.where(age > 0, "20-month-old and over stage", "2-month-old stage"),
            "disease": donors["disease"],
            "donor_id": donors["donor_id"],
            "is_primary_data": True,
            "sex": donors["sex"],
        }
    )
    return obs, programme, sparse.csr_matrix(sparse.vstack(blocks, format="csr"))


_TERMS = {
    "assay": {"10x 3' v2": "EFO:0009899", "10x 3' v3": "EFO:0009922"},
    "cell_type": CELL_TYPES,
    "development_stage": {"20-month-old and over stage": "MmusDv:0000091", "2-month-old stage": "MmusDv:0000062"},
    "disease": {NORMAL: "PATO:0000461", DISEASE: "MONDO:0005148"},
    "self_reported_ethnicity": {"na": "na"},
    "sex": {"male": "PATO:0000384", "female": "PATO:0000383"},
    "tissue": {"islet of Langerhans": "UBERON:0000006"},
    "tissue_general": {"pancreas": "UBERON:0001264"},
}
_SCHEMA = """
soma_joinid dataset_id assay assay_ontology_term_id cell_type cell_type_ontology_term_id development_stage
development_stage_ontology_term_id disease disease_ontology_term_id donor_id is_primary_data self_reported_ethnicity
self_reported_ethnicity_ontology_term_id sex sex_ontology_term_id suspension_type tissue tissue_ontology_term_id
tissue_general tissue_general_ontology_term_id raw_sum nnz raw_mean_nnz raw_variance_nnz n_measured_vars
"""


def _finish_obs(obs: pd.DataFrame, counts: sparse.csr_matrix) -> pd.DataFrame:
    """All columns that a Census of schema 1.2 has, text as categories."""
    nnz = np.diff(counts.indptr).astype(np.int64)
    total = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    mean = total / np.maximum(nnz, 1)
    squares = np.asarray(counts.multiply(counts).sum(axis=1), dtype=np.float64).ravel() / np.maximum(nnz, 1)
    fixed = {"suspension_type": "cell", "tissue": "islet of Langerhans", "tissue_general": "pancreas"}
    table = obs.assign(
        soma_joinid=np.arange(len(obs), dtype=np.int64),
        self_reported_ethnicity="na",
        raw_sum=total,
        nnz=nnz,
        raw_mean_nnz=mean,
        raw_variance_nnz=squares - mean**2,
        n_measured_vars=np.int64(counts.shape[1]),
        **fixed,
    )
    for column, terms in _TERMS.items():
        table[f"{column}_ontology_term_id"] = table[column].map(terms)
    text = [column for column in table if table[column].dtype == object]
    return table.astype(dict.fromkeys(text, "category"))[_SCHEMA.split()]


def _var(world: IsletWorld, counts: sparse.csr_matrix) -> pd.DataFrame:
    n = counts.shape[1]
    return pd.DataFrame(
        {
            "soma_joinid": np.arange(n, dtype=np.int64),
            "feature_id": world.genes.index.to_numpy(),
            "feature_name": world.genes["symbol"].to_numpy(),
            "feature_length": np.full(n, 1000, dtype=np.int64),
            "nnz": np.bincount(counts.indices, minlength=n).astype(np.int64),
            "n_measured_obs": np.full(n, counts.shape[0], dtype=np.int64),
        }
    )


# --- truth --------------------------------------------------------------------------------------------------------


def truth_table(world: IsletWorld, params: IsletParams) -> pd.DataFrame:
    """What was planted, one row per gene.

    Returns
    -------
    pandas.DataFrame
        `gene_id`, `symbol`, `effect` (change of the log rate per unit of the disease programme), `log_difference_beta`
        and `log_difference_alpha` (expected change of the log rate from normal to untreated disease, before counts are
        made relative to the cell's depth), `direction` (`up`, `down`, `none`), `set` (the module of known genes).
    """
    effect = world.genes["effect"].to_numpy()
    return pd.DataFrame(
        {
            "gene_id": world.genes.index,
            "symbol": world.genes["symbol"].to_numpy(),
            "effect": effect,
            "log_difference_beta": effect * params.disease_shift,
            "log_difference_alpha": effect * params.disease_shift * params.alpha_share,
            "direction": np.select([effect > 0, effect < 0], ["up", "down"], "none"),
            "set": world.genes["set"].to_numpy(),
        }
    )


def draw_gene_sets(world: IsletWorld, params: IsletParams, seed: int) -> list[tuple[str, str, list[str]]]:
    """Planted pathways, traps for comparisons that mix cell types or ages, and decoys.

    Planted pathways are four fifths planted genes of one module. Traps are markers of cell types, as far as they are
    not planted, and the age programme. Decoys are drawn from all genes, so that they hold planted ones by chance, as
    real pathways would.
    """
    rng = np.random.default_rng([seed, _SETS])
    genes = world.genes
    plain = genes.loc[(genes["effect"] == 0) & genes["symbol"].str.startswith("Simg"), "symbol"].to_numpy()
    found = []
    for module in genes.loc[genes["effect"] != 0, "set"].unique():
        inside = genes.loc[(genes["effect"] != 0) & (genes["set"] == module), "symbol"]
        for sign, members in ((1, genes["effect"] > 0), (-1, genes["effect"] < 0)):
            chosen = [name for name in inside if members.to_numpy()[genes["symbol"] == name][0]]
            if len(chosen) >= 5:
                others = rng.choice(plain, max(1, len(chosen) // 4), replace=False)
                label = f"unnamed programme {'up' if sign > 0 else 'down'}" if module == "unnamed" else module
                found.append((label, "planted", sorted([*chosen, *others])))
    unplanted = set(genes.loc[genes["effect"] == 0, "symbol"])
    for kind, text in MARKERS.items():
        found.append((f"markers of {kind}", "trap", sorted(unplanted & set(text.split()))))
    found.append(("age programme", "trap", sorted(genes.loc[genes["age"] != 0, "symbol"])))
    everything = genes["symbol"].to_numpy()
    for i in range(params.n_decoys):
        size = int(rng.integers(8, 45))
        found.append((f"decoy {i + 1:03d}", "decoy", sorted(rng.choice(everything, size, replace=False))))
    return found
