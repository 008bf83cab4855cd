"""Files that can be read but must not be used, and configurations with mistakes: refused by name, with the mend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from breaking import Break, as_csv, as_h5ad, as_json, as_parquet, binary, replaced, written
from fault_world import ROOT, STAGES, invoke
from fault_world import as_json as spell
from test_bad_inputs import MEND, broken, refused


def cell(value: float) -> Break:
    """One value of `X` replaced."""

    def change(adata: Any) -> None:
        X = np.asarray(adata.X.todense() if hasattr(adata.X, "todense") else adata.X)
        X[0, 5] = value
        adata.X = X

    return as_h5ad(change)


def twice(axis: str) -> Break:
    """The first name of cells or genes given to the second, too."""

    def change(adata: Any) -> None:
        names = getattr(adata, f"{axis}_names").to_numpy(dtype=object).copy()
        names[1] = names[0]
        setattr(adata, f"{axis}_names", names)

    return as_h5ad(change)


def without(table: str, column: str) -> Break:
    return as_h5ad(lambda adata: getattr(adata, table).drop(columns=column, inplace=True))


def lacks_column(column: str, by: Any = as_csv) -> Break:
    return by(lambda table: table.drop(columns=column))


def other_genes(adata: Any) -> None:
    adata.var_names = [f"other{i}" for i in range(adata.n_vars)]


def relabel(adata: Any) -> None:
    adata.obs["perturbation"] = "UNHEARD"


def fails(value: Any) -> None:
    value["checks"][0]["ok"] = False


def doubled(table: Any) -> Any:
    return pd.concat([table, table.assign(value=0.123)])


def other(key: str) -> Any:
    return lambda value: value.update({key: "0" * 64})


def named(implementation: str) -> Break:
    return replaced("perturbedvae:PerturbedVAE", implementation)


NO_LABEL = r"obs\['perturbation'\] is missing"
CONTENT: list[tuple[str, str, str, Break, str]] = [
    # what, verb, file, how it is changed, what the line says
    ("NaN among counts", "prepare", "raw.h5ad", cell(np.nan), "NaN|missing|finite"),
    ("inf among counts", "prepare", "raw.h5ad", cell(np.inf), "inf|finite"),
    ("negative counts", "prepare", "raw.h5ad", cell(-1.0), "negative"),
    ("fractions as counts", "prepare", "raw.h5ad", cell(0.5), "whole|integer|counts"),
    ("two cells of one name", "prepare", "raw.h5ad", twice("obs"), "twice|repeat|cell"),
    ("no cell", "prepare", "raw.h5ad", as_h5ad(lambda a: a[:0].copy()), "no cell|empty|0 cells"),
    ("no label", "prepare", "raw.h5ad", without("obs", "perturbation"), "perturbation"),
    ("no control", "prepare", "raw.h5ad", as_h5ad(relabel), "control"),
    ("prepared twice", "prepare", "raw.h5ad", as_h5ad(lambda a: a.__setattr__("X", np.log1p(a.X.toarray()))), "counts"),
    ("two cells of one name", "split", "prepared.h5ad", twice("obs"), "cell names repeat"),
    ("two genes of one name", "features", "prepared.h5ad", twice("var"), "gene names repeat"),
    ("no perturbation", "split", "prepared.h5ad", without("obs", "perturbation"), "perturbation"),
    ("raw for prepared", "split", "prepared.h5ad", as_h5ad(lambda a: a.uns.clear()), "not a prepared file"),
    ("cells of other data", "fit", "prepared.h5ad",
     as_h5ad(lambda a: a.__setattr__("obs_names", [f"other{i}" for i in range(a.n_obs)])), "cell|rerun"),
    ("labels of other data", "evaluate", "prepared.h5ad", as_h5ad(relabel), "another perturbation"),
    ("genes of other data", "fit", "prepared.h5ad", as_h5ad(other_genes), "is not in"),
    ("edited by hand", "features", "split.csv", replaced(",train,", ",test,"), "sha256 does not match"),
    ("edited by hand", "fit", "features.csv", replaced("G001,4", "G001,5"), "sha256 does not match"),
    ("no header", "evaluate", "split.csv", replaced("# ", ""), "sha256 does not match|header"),
    ("a check failed", "fit", "leakage.json", as_json(fails), "failed"),
    ("of another split", "fit", "leakage.json", as_json(other("split_sha256")), "another split"),
    ("of other features", "fit", "leakage.json", as_json(other("features_sha256")), "other features"),
    ("a list", "fit", "leakage.json", replaced("{", "["), "cannot be read"),
    ("another method", "predict", "model/config.json", named("nb_vae:NBVAE"), "unknown key"),
    ("no such method", "predict", "model/config.json", named("gone:Gone"), "gone"),
    ("no decoder", "flow case", "decoder/config.json", replaced("nb_vae:NBVAE", "baselines:Additive"), "decoder|model"),
    ("another gene set", "evaluate", "own/prediction.h5ad", as_h5ad(other_genes), "gene"),
    ("half of the genes", "evaluate", "own/prediction.h5ad", as_h5ad(lambda a: a[:, :30].copy()), "gene"),
    ("NaN predicted", "evaluate", "own/prediction.h5ad", cell(np.nan), "NaN or inf"),
    ("inf predicted", "evaluate", "own/prediction.h5ad", cell(np.inf), "NaN or inf"),
    ("no labels", "evaluate", "own/prediction.h5ad", without("obs", "perturbation"), NO_LABEL),
    ("a gene twice", "evaluate", "own/prediction.h5ad", twice("var"), "occurs twice"),
    ("a label twice", "evaluate", "own/prediction.h5ad", as_h5ad(relabel), "predicted twice"),
    ("no method", "summarise", "scores.parquet", lacks_column("method", as_parquet), "method"),
    ("a score twice", "summarise", "scores.parquet", as_parquet(doubled), "twice|two|differ"),
    ("no dataset", "figure", "tables/summary.csv", lacks_column("dataset"), "dataset"),
    ("no symbol", "enrich", "axis/rankings.csv", lacks_column("symbol"), "symbol"),
    ("a rank that is none", "enrich", "axis/rankings.csv",
     as_csv(lambda t: t.assign(rank=t["rank"].map(lambda r: f"no{r}"))), "rank"),
    ("a line without tabs", "enrich", "sets.gmt", written("one line\n"), "line 1|sets.gmt"),
    ("no gene of the data", "enrich", "sets.gmt", written("A\t\tX1\tX2\tX3\tX4\tX5\tX6\n"), "gene"),
    ("no pathway", "judge", "enrichment/top.csv", lacks_column("pathway"), "pathway"),
    ("a line that is no JSON", "judge", "answers.jsonl", written("{]\n"), "line 1"),
    ("answers to other questions", "judge", "answers.jsonl",
     replaced('"key": "', '"key": "x'), "lacks"),
    ("another disease column", "score-genes", "cells.h5ad", without("obs", "disease"), "disease"),
    ("genes the model lacks", "score-genes", "cells.h5ad", as_h5ad(other_genes), "gene"),
    ("cells without counts", "census model", "cells.h5ad", as_h5ad(lambda a: a.__setattr__("X", a.X * 0.3)), "count"),
    ("one seed in a file not named so", "flow gather", "flows/all/seed0", lambda path: None, "not called GROUP/seedN"),
]  # fmt: skip


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("stage", "name", "change", "says"), [row[1:] for row in CONTENT], ids=[f"{r[1]}-{r[0]}" for r in CONTENT]
)
def test_wrong_content_is_refused(stage: str, name: str, change: Break, says: str, world: Path, tmp_path: Path):
    import re

    if name == "flows/all/seed0":
        files: dict[str, Path | str] = {name: world / "tables"}
    else:
        files = broken(world, name, change, tmp_path / "in")
    line = refused(stage, world, tmp_path, files)
    assert re.search(says, line), line
    assert MEND.search(line), line


TINY = yaml.safe_load((ROOT / "tests/configs/tiny.yaml").read_text())


def tiny(**changes: Any) -> str:
    return spell(**{**TINY, **changes})


CONFIGS: list[tuple[str, str, str]] = [
    ("a misspelt key", tiny(seedz=[1]), "did you mean 'seeds'"),
    ("a misspelt method", tiny(methods=["no_change", "aditive"]), "did you mean 'additive'"),
    ("a misspelt dataset", tiny(dataset="tinyy"), "did you mean 'tiny'"),
    ("a misspelt kind of split", tiny(splits={"a": {"kind": "unseen_comb"}}), "kind"),
    ("a misspelt metric", tiny(evaluation={"metrics": ["rmsee"]}), "rmse"),
    ("a negative seed", tiny(seeds=[-1]), "seeds"),
    ("a seed that is a word", tiny(seeds=["one"]), "seeds"),
    ("no seed", tiny(seeds=[]), "seeds"),
    ("one seed twice", tiny(seeds=[1, 1]), "seeds"),
    ("parameters of a method not run", tiny(method_params={"perturbedvea": {}}), "perturbedvea"),
    (
        "a variant of nothing",
        tiny(variants={"x": {"method": "nothing"}}, studies={}, method_seeds={}, methods=["x"]),
        "nothing",
    ),
    ("a study of a split not run", tiny(studies={"s": {**TINY["studies"]["double"], "splits": ["other"]}}), "other"),
    ("no such kind of study", tiny(studies={"s": {"kind": "tabel", "title": "t"}}), "kind"),
    ("more bootstrap than none", tiny(statistics={"n_bootstrap": -1}), "n_bootstrap"),
    ("no YAML", "{a: [", "not valid YAML"),
    ("a list", "{a}\n- b", "YAML|mapping"),
]


@pytest.mark.bad_input
@pytest.mark.parametrize(("text", "says"), [row[1:] for row in CONFIGS], ids=[row[0] for row in CONFIGS])
def test_a_mistake_in_the_configuration(text: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    done = invoke(["config", "--resolve", text, "--out", str(tmp_path / "config.yaml")])
    assert done.exit_code == 1, (done.exception, done.output)
    assert done.stderr.startswith("perturbed: ") and len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert says in done.stderr or any(part in done.stderr for part in says.split("|")), done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.bad_input
def test_a_configuration_that_is_no_text(tmp_path: Path):
    binary(tmp_path / "config.yaml")
    done = invoke(["config", "--resolve", str(tmp_path / "config.yaml"), "--out", str(tmp_path / "out.yaml")])
    assert done.exit_code == 1 and "config.yaml: holds no text; correct the path" in done.stderr, done.output


@pytest.mark.bad_input
@pytest.mark.parametrize("stage", ["split", "fit additive", "evaluate", "summarise", "study gather", "enrich", "judge"])
def test_an_output_below_a_file(stage: str, world: Path, tmp_path: Path):
    """`--out` whose folder is a file."""
    (tmp_path / "out").write_text("a file")
    done = invoke(STAGES[stage].arguments(world, tmp_path / "out"))
    assert done.exit_code == 1, (done.exception, done.output)
    assert "out" in done.stderr and MEND.search(done.stderr), done.stderr
    assert (tmp_path / "out").read_text() == "a file"
