"""Donors that are samples of several studies: what can be said with few of them, and what cannot."""

from __future__ import annotations

import json
import warnings

import anndata
import pytest
from scored_case import BETA, make_case
from scored_case import read_table as read
from typer.testing import CliRunner

from perturbed.axis.run import score_axis
from perturbed.cli import app
from perturbed.errors import DataError


def small(**changes):
    return make_case(judged=(BETA,), n_cells=40, **changes)


ATLAS = "mouse_pancreatic_islet_atlas_Hrovatin"
STUDY = {"column": "donor_id", "pattern": ".+?__(?P<study>.+?)__.+"}
SAMPLES = {
    "STZ__G1_control_1": "STZ__G1", "STZ__G2_mSTZ_1": "STZ__G2",
    "VSG__chow_WT_1": "VSG__MUC13633", "VSG__chow_WT_2": "VSG__MUC13634",
    "VSG__Lepr_sham_1": "VSG__MUC13639", "VSG__Lepr_sham_2": "VSG__MUC13641",
}  # fmt: skip
"""Samples of the matched design, in the atlas' own names: one against one of a study, two against two of another."""


def as_samples(world, path, studies=("STZ", "VSG")):
    """Cells of the matched samples only, all of one dataset, as the atlas is."""
    cells = anndata.read_h5ad(world.cells)
    names = {f"simulated_islets__{donor}": f"{ATLAS}__{sample}" for donor, sample in SAMPLES.items()
             if donor.split("__")[0] in studies}  # fmt: skip
    cells = cells[cells.obs["donor_id"].astype(str).isin(names)].copy()
    cells.obs["donor_id"] = cells.obs["donor_id"].astype(str).map(names)
    cells.obs["dataset_id"] = "49e4ffcc"
    cells.write_h5ad(path)
    return path


def test_the_matched_design_has_twelve_permutations_and_no_p_below_a_twelfth(world, tmp_path):
    """The published design's samples, through the verb itself."""
    cells = as_samples(world, tmp_path / "cells.h5ad")
    case = small(study=STUDY).model_dump(mode="json", exclude={"cells", "model"})
    options = {"--cells": cells, "--model": world.model, "--spec": json.dumps(case), "--out": tmp_path / "t"}
    done = CliRunner().invoke(app, ["score-genes", *(str(word) for pair in options.items() for word in pair)])
    assert done.exit_code == 0, done.output
    table = read(tmp_path / "t", "permutation")
    assert (table["n_possible"] == 12).all() and table["exact"].all() and (table["p"] >= 1 / 12 - 1e-6).all()
    length = table[table["statistic"] == "length"]["p"]
    assert (length >= 1 / 6 - 1e-6).all(), "all labels exchanged, the axis is as long"
    assert (table["exchanged"] == "within studies (2 of 2 have donors in both arms)").all()
    genes = read(tmp_path / "t", "gene_scores")
    assert genes["p"].min() >= 1 / 12 - 1e-6 and genes["low"].notna().all()
    lists = read(tmp_path / "t", "lists").set_index("list")
    assert lists.loc["pseudobulk", "adjusted"] == "for studies" and lists["adjusted"].notna().sum() == 1


def test_one_sample_against_one_has_scores_and_nothing_more(world, tmp_path):
    cells = as_samples(world, tmp_path / "cells.h5ad", studies=("STZ",))
    with pytest.raises(DataError, match="all: 1 unperturbed donors, min_donors is 2"):
        score_axis(small(study=STUDY), cells, world.model, tmp_path / "t")
    flows = [{"gene": "Ins1"}]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        score_axis(small(study=STUDY, min_donors=1, flows=flows), cells, world.model, tmp_path / "t")
    genes = read(tmp_path / "t", "gene_scores")
    assert genes["cosine"].notna().all() and genes[["low", "high", "p", "fdr", "same_sign"]].isna().all(axis=None)
    table = read(tmp_path / "t", "permutation")
    assert table["note"].str.contains("an arm has one donor").all() and table["p"].isna().all()
    assert read(tmp_path / "t", "flow_scores")[["low", "high"]].isna().all(axis=None)
    assert read(tmp_path / "t", "lists").set_index("list").loc["pseudobulk", "note"].startswith("absent: fewer than")


def test_one_study_is_called_one_study(world, tmp_path):
    """The published cells are one dataset: its id says nothing of studies."""
    cells = as_samples(world, tmp_path / "cells.h5ad")
    score_axis(small(study="dataset_id"), cells, world.model, tmp_path / "t")
    assert (read(tmp_path / "t", "permutation")["exchanged"] == "one study: labels exchanged freely").all()
    assert (read(tmp_path / "t", "permutation")["n_possible"] == 20).all()
    assert (read(tmp_path / "t", "axes")["permutation"] == "one study: labels exchanged freely").all()
    assert read(tmp_path / "t", "lists").set_index("list").loc["pseudobulk", "adjusted"] == "no: one study"
    other = small(study={"column": "donor_id", "pattern": "x_(?P<study>.+)"})
    with pytest.raises(DataError, match=r"study: donor_id 'mouse_.*__STZ__G1' is not of the form 'x_"):
        score_axis(other, cells, world.model, tmp_path / "u")
    with pytest.raises(ValueError, match="has no group called study"):
        small(study={"column": "donor_id", "pattern": "(.+)"})
