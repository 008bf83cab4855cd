"""GEARS behind our door: what needs no package is tested everywhere, the rest where `.envs/gears` was made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from planted_cells import plant

from perturbed.data.cards import load_card
from perturbed.errors import DataError, MethodError, UnseenPerturbationError
from perturbed.models.base import FitRun, build, load_method_spec
from perturbed.models.gears import Gears, _as_the_package_needs, _seeded
from perturbed.models.gears_inputs import gears_label, graph_tensors, read_gene_graph

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".envs" / "gears" / "bin" / "python"
needs_package = pytest.mark.skipif(
    not (PYTHON.parents[1] / ".ready").is_file(), reason="no .envs/gears; make it with envs/environment.sh gears"
)


def write_graph(path: Path, edges: list[tuple[str, str, float]]) -> Path:
    pd.DataFrame(edges, columns=["source", "target", "importance"]).to_csv(path, index=False)
    return path


# --- labels -----------------------------------------------------------------------------------------------------------


def test_a_condition_has_one_label_whatever_the_order_of_its_genes():
    assert gears_label("control") == "ctrl"
    assert gears_label("KLF1") == "KLF1+ctrl"
    assert gears_label("KLF1+BAK1") == gears_label("BAK1+KLF1") == "BAK1+KLF1"


def test_labels_that_gears_would_misread_are_refused():
    with pytest.raises(MethodError, match="A\\+B\\+C has 3"):
        gears_label("A+B+C")
    with pytest.raises(MethodError, match="'ctrlA'"):
        gears_label("ctrlA+B")


# --- graph ------------------------------------------------------------------------------------------------------------


def test_the_strongest_edges_into_each_gene_are_kept(tmp_path):
    edges = [("A", "T", 0.5), ("B", "T", 0.9), ("C", "T", 0.5), ("T", "T", 1.0), ("B", "A", 0.1), ("B", "T", 0.2)]
    graph = read_gene_graph(write_graph(tmp_path / "graph.csv", edges), 2)
    assert list(graph.itertuples(index=False, name=None)) == [("B", "A", 0.1), ("B", "T", 0.9), ("A", "T", 0.5)]
    index, weight = graph_tensors(graph, ("A", "B", "C", "T"))
    assert index.tolist() == [[1, 1, 0], [0, 3, 3]] and weight.tolist() == pytest.approx([0.1, 0.9, 0.5])


def test_the_order_of_rows_and_compression_do_not_matter(tmp_path):
    rng = np.random.default_rng(0)
    genes = [f"G{i}" for i in range(12)]
    edges = [(a, b, float(rng.integers(1, 4))) for a in genes for b in genes if a != b]
    one = read_gene_graph(write_graph(tmp_path / "a.csv", edges), 4)
    shuffled = [edges[i] for i in rng.permutation(len(edges))]
    pd.testing.assert_frame_equal(one, read_gene_graph(write_graph(tmp_path / "b.csv.gz", shuffled), 4))


def test_gene_names_that_look_like_missing_values_stay_names(tmp_path):
    graph = read_gene_graph(write_graph(tmp_path / "graph.csv", [("NA", "A", 1.0)]), 2)
    assert graph["source"].tolist() == ["NA"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("source,target\nA,B\n", "'importance' is missing"),
        ("source,target,importance\nA,B,0.5\nB,A,x\n", "row 2"),
        ("source,target,importance\nA,B,-1\n", "row 1"),
        ("source,target,importance\nA,A,1\n", "no edge"),
        ("", "cannot be read"),
    ],
)
def test_broken_graphs_are_refused(tmp_path, text, message):
    path = tmp_path / "graph.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_gene_graph(path, 2)


# --- the door ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    genes = [f"G{i:02d}" for i in range(50)]
    edges = [(a, b, 0.5) for a in genes[:12] for b in genes[:12] if a != b and a != "G07" and b != "G07"]
    cells = plant(n_single=8, n_cells=12, n_control=30, combos=("G00+G01",)).data
    return replace(cells, files={"gene_graph": write_graph(tmp_path / "graph.csv", edges)})


def test_data_that_gears_cannot_take_are_refused_before_any_work(data):
    method = Gears()
    method.check(data)
    with pytest.raises(MethodError, match="gene_graph"):
        method.check(replace(data, files={}))
    with pytest.raises(MethodError, match="one context"):
        method.check(plant(contexts=("a", "b")).data)
    with pytest.raises(MethodError, match="has 3"):
        method.check(plant(combos=("G00+G01+G02",)).data)


def test_without_the_package_the_error_says_how_to_make_the_environment(data, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gears", None)
    with pytest.raises(MethodError, match=r"envs/environment\.sh gears"):
        Gears().fit(data, FitRun())


def test_a_graph_without_any_perturbed_gene_is_refused(data, tmp_path):
    other = write_graph(tmp_path / "other.csv", [("X", "Y", 1.0)])
    with pytest.raises(MethodError, match="holds no perturbed gene"):
        Gears().fit(replace(data, files={"gene_graph": other}), FitRun())


def test_predictions_refuse_three_genes_and_genes_off_the_graph():
    method = Gears()
    meta = {"genes": ["A", "B"], "nodes": ["A", "C", "D"], "contexts": ["all"]}
    method.load_state({"control": torch.tensor([1.0, 2.0])}, meta)
    with pytest.raises(UnseenPerturbationError, match="has 3"):
        method.predict_one("A+C+D", "all")
    with pytest.raises(UnseenPerturbationError, match="B: not in the gene graph"):
        method.predict_one("A+B", "all")
    with pytest.raises(MethodError, match="'other'"):
        method.predict_one("A", "other")
    assert method.predict_one("control", "all")["mean"].tolist() == [1.0, 2.0]


def test_the_method_file_and_the_card_say_what_is_needed():
    spec = load_method_spec("gears", [ROOT / "config" / "methods"])
    assert spec.environment == "gears" and set(spec.requires) == {"gene_names", "gene_graph"}
    assert isinstance(build(spec), Gears)
    assert (ROOT / "envs" / "gears.lock").is_file()
    assert "gene_graph" in load_card("norman2019_hvg500", [ROOT / "config" / "datasets"]).provides
    assert "gene_graph" not in load_card("norman2019_combo1000", [ROOT / "config" / "datasets"]).provides


def test_what_the_package_needs_of_the_process_is_put_back():
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    expected = np.random.default_rng(0), np.random.random(), torch.rand(1)  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    torch.manual_seed(3)
    with _seeded(1), _as_the_package_needs():
        assert pd.Series([True, False]).nonzero()[0].tolist() == [0]
        np.random.random(5), torch.rand(5)  # noqa: NPY002
    assert np.random.random() == expected[1] and torch.rand(1) == expected[2]  # noqa: NPY002
    assert not hasattr(pd.Series, "nonzero")


# --- with the package -------------------------------------------------------------------------------------------------

SCRIPT = """
import json, sys, tempfile
from dataclasses import replace
from pathlib import Path

tests, folder, methods = map(Path, sys.argv[1:])
sys.path.insert(0, str(tests))
tempfile.tempdir = str(folder / "tmp")
Path(tempfile.tempdir).mkdir()

import numpy as np, pandas as pd, torch
from planted_cells import plant
from perturbed.models.base import FitRun, build, load_method_spec, load_model, save_model
from perturbed.names import CONTROL

torch.set_num_threads(1)
nodes = [f"G{i:02d}" for i in range(12) if i != 7]
edges = [(a, b, 0.5) for a in nodes for b in nodes if a != b]
pd.DataFrame(edges, columns=["source", "target", "importance"]).to_csv(folder / "graph.csv", index=False)
data = plant(n_single=8, n_cells=20, n_control=40, combos=("G00+G01",)).data
data = replace(data, files={"gene_graph": folder / "graph.csv"})
spec = load_method_spec("gears", [methods])

def fit(seed, epochs):
    torch.manual_seed(seed + 100)
    np.random.seed(seed + 100)
    method = build(spec, {"epochs": epochs, "hidden_size": 16, "batch_size": 16, "lr": 0.01})
    method.fit(data, FitRun(seed=seed, progress=False))
    return method

found = {}
for name, seed in (("one", 1), ("same", 1), ("other", 2)):
    save_model(folder / name, fit(seed, 1), spec)
read = lambda name: [(folder / name / file).read_bytes() for file in ("config.json", "state.pt")]
found["same"], found["other"] = read("one") == read("same"), read("one") == read("other")

method = fit(1, 5)
save_model(folder / "model", method, spec)
names = ["G00", "G03+G05", "G00+G01", "G10", "G07", "G00+G02+G05"]
prediction = method.predict([(name, "all") for name in names])
loaded = load_model(folder / "model")
found |= {"perturbation": prediction.perturbation, "refused": prediction.refused}
found["loaded"] = np.array_equal(loaded.predict([(name, "all") for name in names]).mean, prediction.mean)
found["alone"] = np.array_equal(loaded.predict([("G03+G05", "all")]).mean[0], prediction.mean[1])
found["swapped"] = np.array_equal(method.predict_one("G05+G03", "all")["mean"], prediction.mean[1])

# the package's own way: 300 control cells, drawn with replacement, as one batch
from torch_geometric.data import Batch, Data
rows = data.X.toarray()[data.perturbation == CONTROL]
drawn = rows[np.random.default_rng(0).integers(len(rows), size=300)]
pair = [nodes.index("G03"), nodes.index("G05")]
batch = Batch.from_data_list([Data(x=torch.tensor(x)[:, None], pert_idx=pair) for x in drawn])
with torch.no_grad():
    theirs = method._restored()(batch).numpy().mean(0)
found["package"] = float(np.abs(theirs - (prediction.mean[1] - rows.mean(0) + drawn.mean(0))).max())

means = np.stack([data.X.toarray()[data.perturbation == name].mean(0) for name in ("G00", "G00+G01")])
found["error"] = float(np.square(prediction.mean[[0, 2]] - means).mean())
found["floor"] = float(np.square(rows.mean(0) - means).mean())
left = [*(folder / "tmp").glob("gears*"), *Path.cwd().iterdir(), *folder.rglob("*.pkl")]
found["left"] = [path.name for path in left]
found["shim"] = hasattr(pd.Series, "nonzero")
print(json.dumps(found))
"""


@needs_package
def test_fit_predict_save_and_load_in_its_environment(tmp_path):
    arguments = [Path(__file__).parent, tmp_path, ROOT / "config" / "methods"]
    (tmp_path / "cwd").mkdir()
    done = subprocess.run(
        [PYTHON, "-c", SCRIPT, *map(str, arguments)], capture_output=True, text=True, cwd=tmp_path / "cwd", check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["same"] and not found["other"]
    assert found["loaded"] and found["alone"] and found["swapped"]
    assert found["package"] < 1e-4
    assert found["error"] < 0.7 * found["floor"]
    assert found["perturbation"] == ["G00", "G03+G05", "G00+G01", "G10"]  # G10 was never perturbed, the graph has it
    assert "not in the gene graph" in found["refused"]["G07"] and "has 3" in found["refused"]["G00+G02+G05"]
    assert found["left"] == [] and not found["shim"]


@needs_package
def test_the_environment_is_made_once(tmp_path):
    stamp = PYTHON.parents[1] / ".ready"
    before = (PYTHON.parents[1] / "pyvenv.cfg").stat().st_mtime_ns
    subprocess.run([ROOT / "envs" / "environment.sh", "gears"], check=True, capture_output=True, cwd=ROOT)
    assert (PYTHON.parents[1] / "pyvenv.cfg").stat().st_mtime_ns == before and stamp.is_file()


def test_a_failed_installation_leaves_no_stamp(tmp_path):
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if uv is None:
        pytest.skip("needs uv")
    (tmp_path / "envs").mkdir()
    shutil.copy(ROOT / "envs" / "environment.sh", tmp_path / "envs")
    (tmp_path / "envs" / "broken.lock").write_text("this is no requirement !\n")
    (tmp_path / ".envs" / "broken").mkdir(parents=True)
    (tmp_path / ".envs" / "broken" / ".ready").write_text("an older lock\n")
    command = [tmp_path / "envs" / "environment.sh", "broken"]
    variables = {**os.environ, "UV": uv, "PYTHON": sys.executable}
    done = subprocess.run(command, env=variables, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and not (tmp_path / ".envs" / "broken" / ".ready").exists()


def test_an_environment_without_lock_is_refused_by_name(tmp_path):
    command = [ROOT / "envs" / "environment.sh", "nothing"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "envs/nothing.lock: no such file" in done.stderr
    assert not list(tmp_path.iterdir())
