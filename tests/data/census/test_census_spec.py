"""Cards of Census cells and models: every shipped one loads, and wrong ones are told in one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from census_world import model_card, query_card

from perturbed.data.census.filters import as_text, columns_of
from perturbed.data.census.spec import BATCH, Clause, QueryCells, load_census_card, load_model_card
from perturbed.errors import ConfigError

CONFIG = Path(__file__).parents[3] / "config"


@pytest.mark.parametrize("path", sorted((CONFIG / "census").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_cards_of_cells_load(path):
    card = load_census_card(path.stem, [CONFIG / "census"])
    assert card.about.title
    for clause in card.cells.obs_filter:
        assert columns_of(clause)


@pytest.mark.parametrize("path", sorted((CONFIG / "models").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_cards_of_models_load(path):
    assert load_model_card(path.stem, [CONFIG / "models"]).about.title


def test_the_published_recipe_is_the_default():
    fit = model_card(kind="fit").model
    assert (fit.n_layers, fit.n_hidden, fit.n_latent, fit.n_top_genes, fit.min_genes) == (2, 128, 50, 8000, 300)
    assert BATCH == ("dataset_id", "assay", "suspension_type", "donor_id")


def test_an_unquoted_date_is_a_date(tmp_path):
    (tmp_path / "x.yaml").write_text("cells: {kind: query, organism: mus_musculus, census_version: 2023-12-15}\n")
    cells = load_census_card("x", [tmp_path]).cells
    assert isinstance(cells, QueryCells) and cells.census_version == "2023-12-15"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"census_version": "stable"}, "'stable' names another release every half year; name one by its date"),
        ({"census_version": "latest"}, "'latest' names another release"),
        ({"census_version": "2023-13-01"}, "no date of the form yyyy-mm-dd"),
        ({"genes": ["Ins1"]}, "'Ins1' is no Ensembl id; give ids such as ENSMUSG00000000001"),
        ({"genes": ["ENSG00000000003"]}, "'ENSG00000000003' is a gene of homo_sapiens, the cells are those of mus_m"),
        ({"obs_filter": [{"column": "disease"}]}, "give `values`, or `at_least` and `at_most`"),
        ({"obs_filter": [{"column": "disease", "values": []}]}, "`values` is empty"),
        ({"organism": "danio_rerio"}, "organism"),
        ({"clauses": []}, "unknown key"),
    ],
)
def test_wrong_cards_are_told_in_one_line(keys, message):
    with pytest.raises(ConfigError) as error:
        query_card(**keys)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_missing_card_names_the_nearest(tmp_path):
    (tmp_path / "islets.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"no card for 'islet'.*did you mean 'islets'"):
        load_census_card("islet", [tmp_path])
    with pytest.raises(ConfigError, match="model: no card for 'islet'"):
        load_model_card("islet", [tmp_path])


def test_clauses_in_the_language_of_soma():
    assert as_text(Clause(column="disease", values=("a'b",))) == 'disease == "a\'b"'
    assert as_text(Clause(column="disease", values=("a", "b"))) == "disease in ['a', 'b']"
    assert as_text(Clause(column="nnz", at_least=300)) == "nnz >= 300"
    assert as_text(Clause(column="x", at_least=0.5, at_most=2)) == "x >= 0.5 and x <= 2"
    assert as_text(Clause(column="is_primary_data", values=(True,))) == "is_primary_data == True"
    assert columns_of("attr('nnz') > 3 and disease in ['x'] or nnz == 2") == ["nnz", "disease"]


def test_the_planner_imports_nothing_heavy():
    heavy = ("torch", "scvi", "tiledbsoma", "scanpy", "pandas")
    code = f"import sys, perturbed.data.census.spec; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
