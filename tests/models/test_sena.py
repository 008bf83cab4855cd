"""SENA: the gene-set mask of its encoder, its scale of the loss, and its gene-set files."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from planted_cells import plant

from perturbed.errors import DataError, MethodError
from perturbed.models.base import FitRun, TrainingData, load_method_spec
from perturbed.models.discrepancy_vae_module import GeneSetLinear
from perturbed.models.sena import Sena, SenaParams, read_gene_sets

SMALL = {"n_latent": 4, "n_hidden": 16, "mmd_width": 20.0, "n_samples": 20, "epochs": 3, "batch_size": 16}
SETS = {"late": [f"G{i}" for i in range(30, 45)], "early": [f"G0{i}" for i in range(8)], "tiny": ["G11", "G12"]}


def gmt(folder: Path, sets=SETS) -> Path:
    path = folder / "sets.gmt"
    path.write_text("".join("\t".join([name, "about", *genes]) + "\n" for name, genes in sets.items()))
    return path


def with_sets(folder: Path, sets=SETS, **options) -> TrainingData:
    return replace(plant(**options).data, files={"gene_sets": gmt(folder, sets)})


def fitted(data, **options) -> Sena:
    method = Sena(SenaParams(**{**SMALL, **options}))
    method.check(data)
    method.fit(data, FitRun(progress=False))
    return method


def test_a_unit_sees_its_set_in_full_and_other_genes_by_lambda():
    mask = torch.tensor([[1.0, 0.1, 0.1], [0.1, 1.0, 1.0]])
    layer, x = GeneSetLinear(mask).requires_grad_(False), torch.randn(4, 3)
    expected = [
        [sum(x[c, g] * layer.weight[s, g] * mask[s, g] for g in range(3)) + layer.bias[s] for s in range(2)]
        for c in range(4)
    ]
    torch.testing.assert_close(layer(x), torch.tensor(expected))


@pytest.mark.parametrize("leak", [0.0, 0.2])
def test_after_training_activity_still_depends_on_the_members_as_the_mask_says(tmp_path, leak):
    data = with_sets(tmp_path)
    method = fitted(data, mask_leak=leak)
    assert method.gene_sets == ("early", "late")
    base = method.activity(data.X)
    changed = data.X.tolil()
    outside = [i for i, gene in enumerate(data.genes) if gene not in SETS["early"]]
    changed[:, outside] = 0
    moved = np.abs(method.activity(changed.tocsr()) - base).max(axis=0)
    assert (moved[0] > 1e-3) == (leak > 0)
    assert moved[1] > 1e-3


def test_small_sets_are_left_out_and_counted(tmp_path, caplog):
    data = with_sets(tmp_path)
    with caplog.at_level(logging.INFO):
        fitted(data)
    assert "2 gene sets used, 1 with fewer than 5 measured genes left out; they hold 23 of 50 genes" in caplog.text
    assert fitted(data, min_set_size=2).gene_sets == ("early", "late", "tiny")


def test_weights_are_on_the_scale_of_the_authors_code(tmp_path):
    """Their KL is a mean over latents divided by the batch size, their graph penalty a mean over edges."""
    method = fitted(with_sets(tmp_path), kl_weight=1.5, edge_penalty=0.6)
    weights = method.weights(None)
    assert weights.kl == pytest.approx(1.5 / (4 * 16))
    assert weights.edges == pytest.approx(0.6 / 6)
    assert (weights.mmd, weights.temperature) == (1.0, 100.0)


def test_the_layer_is_part_of_the_model(tmp_path):
    data = with_sets(tmp_path)
    method = fitted(data)
    loaded = Sena(method.params)
    loaded.load_state(method.state(), method.meta())
    np.testing.assert_array_equal(loaded.activity(data.X), method.activity(data.X))
    assert loaded.gene_sets == method.gene_sets
    np.testing.assert_array_equal(loaded.represent(data.X), method.represent(data.X))
    assert len(loaded.predict_one("G00+G01+G02", "all")["mean"]) == 50


def test_an_interrupted_fit_with_other_gene_sets_is_not_resumed(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("perturbed.training.CHECKPOINT_SECONDS", 0.0)
    data = with_sets(tmp_path)
    Sena(SenaParams(**SMALL)).fit(data, FitRun(progress=False, checkpoint=tmp_path / "checkpoint.pt"))
    other = {**SETS, "early": [f"G0{i}" for i in range(1, 9)]}
    data = replace(data, files={"gene_sets": gmt(tmp_path, other)})
    with caplog.at_level(logging.WARNING):
        Sena(SenaParams(**SMALL)).fit(data, FitRun(progress=False, checkpoint=tmp_path / "checkpoint.pt"))
    assert "starting afresh" in caplog.text


def test_data_without_gene_sets_are_refused_by_name():
    with pytest.raises(MethodError, match=r"Sena needs a gene_sets file.*files\.gene_sets"):
        Sena().check(plant().data)
    spec = load_method_spec("sena", [Path(__file__).parents[2] / "config" / "methods"])
    assert set(spec.requires) == {"gene_sets", "gene_names"}


def test_gene_sets_of_other_names_are_refused(tmp_path):
    with pytest.raises(MethodError, match="none of its 1 gene sets holds a gene of these data"):
        fitted(with_sets(tmp_path, {"human": ["TP53", "KLF1"]}))
    with pytest.raises(MethodError, match=r"largest gene set has 2 genes.*min_set_size"):
        fitted(with_sets(tmp_path, {"tiny": ["G11", "G12"], "none": ["TP53"]}))


def test_gene_set_files_are_read_and_broken_ones_named(tmp_path):
    path = tmp_path / "sets.gmt"
    path.write_text("a\thttp://about\tG1\tG2\t\n\nb\t\tG3\n")
    assert read_gene_sets(path) == {"a": ("G1", "G2"), "b": ("G3",)}
    for content, message in (("a\tabout\n", "line 1"), ("a\tx\tG1\na\tx\tG2\n", "twice")):
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            read_gene_sets(path)
    with pytest.raises(DataError, match="cannot be read"):
        read_gene_sets(tmp_path / "missing.gmt")
