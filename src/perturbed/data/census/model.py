"""Models of Census cells: fitted by the published recipe, or fetched, and checked against the cells."""

from __future__ import annotations

import json
import logging
import random
import shutil
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from perturbed.data.census.cells import open_cells
from perturbed.data.census.spec import (
    GENE_IDS,
    FittedModel,
    ModelCard,
    PublishedModel,
    SavedModel,
)
from perturbed.data.contracts import read_h5ad
from perturbed.device import choose_device, one_process
from perturbed.errors import DataError, MethodError
from perturbed.files import atomic, hash_file, sha256_text, write_json

if TYPE_CHECKING:
    from anndata import AnnData

    from perturbed.decoders.scvi import SCVIDecoder

MODEL, RECORD = "model.pt", "model.json"
HVG_BATCH = ("suspension_type", "assay")
"""Columns within whose values the published models chose their genes."""
MIN_SHARE = 0.5
"""Smallest share of a model's genes that the cells must have."""


# --- fitting ------------------------------------------------------------------------------------------------------


def fit_model(
    cells: str | Path, card: ModelCard, out: str | Path, *, name: str = "model", device: str = "auto"
) -> None:
    """Fit SCVI to cells as the published models were fitted, and save it as they were.

    Parameters
    ----------
    cells
        `cells.h5ad` with counts.
    card
        Of kind `fit`.
    out
        Folder to write: `model.pt` as scvi-tools saves it, with Ensembl ids as genes and `batch` as batch, and
        `model.json` with its hash and what made it.
    name
        Of the card, for messages.
    device
        `auto`, `cpu` or `cuda`.

    Raises
    ------
    DataError
        If no cell has enough genes, the cells hold no counts, or all cells of a batch had too few genes.
    MethodError
        If training fails, or a GPU is asked for and there is none.
    """
    recipe = card.model
    assert isinstance(recipe, FittedModel)
    adata = _training_cells(read_h5ad(cells), recipe, str(cells))
    with atomic(out) as part:
        _train(adata, recipe, part, choose_device(device).name)
        _settle(part / MODEL, sha256_text(f"{hash_file(cells)} {recipe.model_dump_json()}"))
        made_by = {"card": name, "cells": hash_file(cells), "recipe": recipe.model_dump(mode="json")}
        _record(part, {"kind": "fit", **made_by, "n_cells": adata.n_obs})
        check_model(part, card, name)
        check_model_fits(load_model(part), open_cells(cells), str(cells))


def _training_cells(adata: AnnData, recipe: FittedModel, where: str) -> AnnData:
    """The cells and genes that the model is trained on."""
    if adata.n_vars == 0 or adata.X is None:
        raise DataError(f"{where}: holds no counts to fit a model to; minified cells belong to a published model")
    if (adata.X.data % 1 != 0).any() or (adata.X.data < 0).any():
        raise DataError(f"{where}: X holds values that are no counts (fractions, or below 0); give raw counts")
    enough = np.diff(adata.X.indptr) >= recipe.min_genes
    if not enough.any():
        raise DataError(f"{where}: no cell has {recipe.min_genes} detected genes; lower model.min_genes in the card")
    adata = adata[enough].copy()
    if recipe.n_top_genes is not None and recipe.n_top_genes < adata.n_vars:
        adata = adata[:, _variable_genes(adata, recipe.n_top_genes)].copy()
    return adata


def _variable_genes(adata: AnnData, n_top: int) -> np.ndarray:
    """Highly variable genes (Seurat v3, on counts) within each suspension type and assay, as booleans (n_genes,)."""
    import scanpy as sc

    work = adata.copy()
    groups = [work.obs[column].astype(str).to_numpy(dtype=object) for column in HVG_BATCH]
    work.obs["hvg_batch"] = pd.Categorical(sum(groups[1:], groups[0]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table = sc.pp.highly_variable_genes(
            work, n_top_genes=n_top, flavor="seurat_v3", batch_key="hvg_batch", inplace=False
        )
    return np.asarray(table["highly_variable"], dtype=bool)


def _train(adata: AnnData, recipe: FittedModel, out: Path, device: str) -> None:
    import scvi
    import torch

    loggers = [logging.getLogger(key) for key in ("lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    scvi.settings.seed = recipe.seed
    random.seed(recipe.seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
            model = scvi.model.SCVI(
                adata, n_hidden=recipe.n_hidden, n_latent=recipe.n_latent, n_layers=recipe.n_layers,
                dropout_rate=recipe.dropout, gene_likelihood="nb", encode_covariates=False,
            )  # fmt: skip
            with one_process():
                model.train(
                    max_epochs=recipe.epochs, batch_size=recipe.batch_size, train_size=recipe.train_share,
                    accelerator="gpu" if device.startswith("cuda") else "cpu", devices=1,
                    enable_progress_bar=False, logger=False, enable_checkpointing=False,
                    plan_kwargs={"lr": recipe.lr, "n_epochs_kl_warmup": recipe.kl_warmup or None},
                )  # fmt: skip
            model.save(str(out), overwrite=True)
    except ValueError as error:
        raise MethodError(f"SCVI could not be fitted: {' '.join(str(error).split())[:300]}") from None
    finally:
        torch.use_deterministic_algorithms(False)
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def _settle(file: Path, identity: str) -> None:
    """Replace what scvi-tools draws anew in every run, a name with the time and a random id, by what made the model."""
    import torch

    content = torch.load(file, weights_only=False, map_location="cpu")  # written by this process a moment ago
    attributes = content["attr_dict"]
    for holder, key in ((attributes, "run_name_"), (attributes["registry_"], "_scvi_uuid")):
        if key in holder:
            holder[key] = identity[:32]
    torch.save(content, file)


# --- fetching -----------------------------------------------------------------------------------------------------


def fetch_model(
    card: ModelCard,
    out: str | Path,
    *,
    data_dir: str | Path = "data",
    mirror: str | Path | None = None,
    allow_unpinned: bool = False,
    cells: str | Path | None = None,
    name: str = "model",
) -> None:
    """Get a published model, or take a saved one, and lay it out as a folder with `model.pt`.

    Parameters
    ----------
    card
        Of kind `published` or `path`.
    out
        Folder to write: `model.pt` and `model.json`.
    data_dir
        Downloads are kept in `downloads` below it.
    mirror
        Folder looked in first, by name and hash.
    allow_unpinned
        Accept a file whose hash nobody has pinned.
    cells
        `cells.h5ad` that must fit the model.
    name
        Of the card, for messages.

    Raises
    ------
    FetchError
        If the file cannot be had, or is not the pinned one.
    DataError
        If it is no SCVI model, not what the card expects, or does not fit the cells.
    """
    from perturbed.data.fetch import fetch_file

    model = card.model
    if isinstance(model, PublishedModel):
        near = None if mirror is None else Path(mirror)
        file = fetch_file(model.file, Path(data_dir) / "downloads", mirror=near, allow_unpinned=allow_unpinned)
        origin: dict[str, Any] = {"kind": "published", "urls": list(model.file.urls), "organism": model.organism}
        origin["census_version"] = model.census_version
    else:
        assert isinstance(model, SavedModel)
        file = Path(model.folder) / MODEL
        if not file.is_file():
            raise DataError(f"{name}: model.folder: {file}: no such file; give the folder that scvi-tools saved")
        origin = {"kind": "path", "folder": model.folder, "organism": model.organism}
    with atomic(out) as part:
        part.mkdir()
        shutil.copyfile(file, part / MODEL)
        _record(part, {"card": name, **origin}, trusted=_trusted(card))
        check_model(part, card, name)
        if cells is not None:
            check_model_fits(load_model(part), open_cells(cells), str(cells))


def _trusted(card: ModelCard) -> str | None:
    """Hash that the card vouches for."""
    if isinstance(card.model, PublishedModel):
        return card.model.file.sha256
    return card.model.trust_sha256 if isinstance(card.model, SavedModel) else None


def _record(folder: Path, content: dict[str, Any], trusted: str | None = None) -> None:
    packages = {name: version(name) for name in ("scvi-tools", "torch")}
    found = {"sha256": hash_file(folder / MODEL), "trust_sha256": trusted, "versions": packages}
    write_json(folder / RECORD, {**content, **found})


# --- using --------------------------------------------------------------------------------------------------------


def load_model(folder: str | Path, trust_sha256: str | None = None) -> SCVIDecoder:
    """The decoder of a folder that `fit_model` or `fetch_model` wrote, with the trust that its card gives.

    Raises
    ------
    DataError
        If the file cannot be read, is not the one that was recorded, or was saved in a layout that is not supported.
    """
    from perturbed.decoders.scvi import SCVIDecoder, read_checkpoint

    folder = Path(folder)
    record = json.loads((folder / RECORD).read_text(encoding="utf-8")) if (folder / RECORD).is_file() else {}
    return SCVIDecoder(read_checkpoint(folder, trust_sha256 or record.get("trust_sha256")))


def check_model(folder: str | Path, card: ModelCard, name: str) -> None:
    """Refuse a model that cannot be read, or is not what the card expects.

    Raises
    ------
    DataError
        One line with the key of `expect`.
    """
    decoder = load_model(folder)
    found = {"n_genes": len(decoder.genes), "n_latent": decoder.n_latent, "n_batches": len(decoder.batches)}
    for key, value in card.expect.model_dump().items():
        if value is not None and value != found[key]:
            raise DataError(f"{name}: expect.{key}: the card says {value:,}, the model has {found[key]:,}")


def check_model_fits(decoder: SCVIDecoder, cells: AnnData, where: str = "cells") -> None:
    """Refuse cells that the model cannot speak of.

    A batch that was not trained has no weights in the decoder (scvi-tools would draw them at random, which no
    gradient shows), and genes under other names would be taken for zeros.

    Parameters
    ----------
    decoder
        The model.
    cells
        Cells of `cells.h5ad`, with counts or with latents.
    where
        Name of the cells, for messages.

    Raises
    ------
    DataError
        If genes are of another species, are symbols, or are too few of the model's; if a batch was not trained; if
        latents are of another width.
    """
    if cells.n_vars:
        check_genes(decoder.genes, list(map(str, cells.var_names)), where)
    if cells.X is None and "qz_mean" not in cells.obsm:
        raise DataError(f"{where}: has neither counts nor latents (obsm['qz_mean'])")
    width = cells.obsm["qz_mean"].shape[1] if "qz_mean" in cells.obsm else decoder.n_latent
    if width != decoder.n_latent:
        raise DataError(f"{where}: latents have {width} dimensions, the model has {decoder.n_latent}; another model's?")
    if "batch" not in cells.obs:
        raise DataError(f"{where}: obs has no column 'batch'; make the cells with `perturbed census query`")
    check_batches(decoder, cells.obs["batch"].astype(str), where)


def check_batches(decoder: SCVIDecoder, batch: pd.Series, where: str) -> None:
    """Refuse cells of batches that were not trained.

    Raises
    ------
    DataError
        How many there are, and one of them.
    """
    counts = batch.value_counts()
    unknown = counts[~counts.index.isin(decoder.batches)].sort_index()
    if len(unknown):
        raise DataError(
            f"{where}: {len(unknown)} of {len(counts)} batches ({int(unknown.sum()):,} of {len(batch):,} cells) were "
            f"not in the model's training, so its decoder has no weights for them, such as {unknown.index[0]!r}; take "
            "these cells out by cells.obs_filter, or take the model of the cells' release"
        )


def check_genes(model: tuple[str, ...], cells: list[str], where: str) -> None:
    """Refuse cells that lack most of a model's genes, and say why: another species, symbols, or too few.

    Raises
    ------
    DataError
        One line.
    """
    share = len(set(model) & set(cells)) / len(model)
    if share >= MIN_SHARE:
        return
    species = [_species(genes) for genes in (model, cells)]
    if None not in species and species[0] != species[1]:
        raise DataError(f"{where}: genes are those of {species[1]}, the model's those of {species[0]}")
    if species[0] is not None and species[1] is None:
        raise DataError(
            f"{where}: genes are named like {cells[0]!r}, the model's by Ensembl ids such as {model[0]!r}; name the "
            "cells' genes by Ensembl ids"
        )
    raise DataError(
        f"{where}: only {share:.0%} of the model's genes are in the cells; the model names them like {model[0]!r}, the "
        f"cells like {cells[0]!r}"
    )


def _species(genes: tuple[str, ...] | list[str]) -> str | None:
    """Organism by the prefix of most ids; None where they are no Ensembl ids."""
    for organism, prefix in GENE_IDS.items():
        if np.mean([gene.startswith(prefix) and gene[len(prefix) :][:1].isdigit() for gene in genes]) > 0.5:
            return organism
    return None
