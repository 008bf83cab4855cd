from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from planted_cells import plant

from perturbed.data.cards import load_card
from perturbed.errors import MethodError
from perturbed.models.base import Method, build
from perturbed.models.capabilities import COLUMNS, tabulate
from perturbed.models.spec import MethodSpec, load_method_spec

ROOT = Path(__file__).parents[2]
METHODS = [ROOT / "config" / "methods"]


def spec(*requires: str, **more) -> MethodSpec:
    return MethodSpec(title="M", implementation="a:B", requires=requires, **more)


@pytest.fixture(scope="module")
def cards():
    names = ("norman2019_combo1000", "norman2019_hvg500", "simulation")
    return {name: load_card(name, [ROOT / "config" / "datasets"]) for name in names}


def test_every_pair_has_a_row_and_every_refusal_a_reason(cards):
    methods = {
        "free": spec(),
        "counted": spec("counts"),
        "named": spec("gene_names", "gene_graph", environment="gears"),
        "sets": spec("gene_sets"),
    }
    table = tabulate(methods, cards)
    assert tuple(table.columns) == COLUMNS and len(table) == 12
    assert ((table["reason"] == "") == table["runs"]).all()
    found = table.set_index(["method", "dataset"])
    assert found.loc["free", "runs"].all()
    assert dict(found.loc["counted", "runs"]) == {
        "norman2019_combo1000": False, "norman2019_hvg500": True, "simulation": True
    }  # fmt: skip
    reason = found["reason"]
    assert reason["counted", "norman2019_combo1000"] == (
        "needs counts; norman2019_combo1000 has none (keys.counts is null)"
    )
    assert reason["named", "norman2019_combo1000"] == (
        "needs gene names; those of norman2019_combo1000 are anonymous; "
        "needs gene graph; the card of norman2019_combo1000 names none (files.gene_graph)"
    )
    assert found.loc[("sets", "simulation"), "runs"]
    assert set(found.loc["named", "environment"]) == {"gears"}


def test_a_file_of_the_methods_own_stands_in_for_the_datasets(cards, tmp_path):
    file = tmp_path / "{dataset}.gmt"
    methods = {"own": spec("gene_sets", files={"gene_sets": str(file)})}
    (tmp_path / "norman2019_combo1000.gmt").touch()
    table = tabulate(methods, cards).set_index("dataset")
    assert dict(table["runs"]) == {"norman2019_combo1000": True, "norman2019_hvg500": False, "simulation": False}
    assert table["reason"]["simulation"] == f"needs gene sets; {tmp_path / 'simulation.gmt'} is not there"


def test_methods_that_need_counts_say_so_in_their_file_and_refuse_data_without():
    """What the planner leaves out by name, the class refuses in one line when it is used directly."""
    data = plant(n_single=2, n_cells=3, n_control=3).data
    checked = []
    for path in sorted(METHODS[0].glob("*.yaml")):
        method_spec = load_method_spec(path.stem, METHODS)
        if method_spec.environment or path.stem == "external":
            continue
        method: Method = build(method_spec)
        assert method.needs_counts == ("counts" in method_spec.requires), path.stem
        if method.needs_counts:
            checked.append(path.stem)
            with pytest.raises(MethodError, match="hold no counts"):
                method.check(data)
    assert "scvi_additive" in checked


def test_it_imports_no_torch():
    code = "import sys; import perturbed.models.capabilities; assert not {'torch', 'anndata'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
