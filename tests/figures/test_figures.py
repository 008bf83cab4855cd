"""Every figure writes picture and numbers, the same bytes twice, says what is undefined and names what is missing."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from perturbed.config import StatisticsSpec, parse
from perturbed.data.contracts import SCORE_COLUMNS, write_scores
from perturbed.errors import ConfigError, DataError
from perturbed.evaluation.summarise import summarise
from perturbed.figures import FIGURES, FigureInputs, draw_figure
from perturbed.figures.study import draw_study
from perturbed.figures.style import look_of, title_of
from perturbed.study_config import Comparison, Denoising

SPEC = StatisticsSpec(primary_metric="pearson_delta_pert", primary_method="perturbedvae", n_bootstrap=100)
DIRECTIONS = {"pearson_delta_pert": 1, "l2_delta": -1}
LEVELS = {
    "no_change": 0.1, "mean_effect": 0.4, "additive": 0.6, "perturbedvae": 0.7, "technical_duplicate": 0.85,
    "interpolated_duplicate": 0.9, "truth": 1.0,
}  # fmt: skip
NAMES = [f"A{i}+B{j}" for i in range(3) for j in range(3)]
TITLES = {"perturbedvae": "PerturbedVAE", "additive": "Additive"}


def make_scores() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = []
    for method, level in LEVELS.items():
        for i, name in enumerate(NAMES):
            quality = level + (method != "truth") * rng.normal(0, 0.03)
            lost = method == "mean_effect" or (method == "additive" and i == 0)
            scores = {"pearson_delta_pert": np.nan if lost else quality, "l2_delta": 3 * (1 - quality)}
            for metric, value in scores.items():
                reason = "no direction" if np.isnan(value) else ""
                key = ("sim", "zero", 0, method, 0, "all", name, f"combo_seen{1 + i % 2}", 40, 1.0 + i)
                rows.append((*key, metric, value, reason))
    return pd.DataFrame(rows, columns=SCORE_COLUMNS)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> FigureInputs:
    folder = tmp_path_factory.mktemp("figures")
    write_scores(folder / "scores.parquet", make_scores())
    summarise([folder / "scores.parquet"], SPEC, folder / "tables", DIRECTIONS)
    rng = np.random.default_rng(1)
    key = {"dataset": "sim", "split": "zero", "fold": 0, "seed": 0}
    genes = ["A0", "B0", "NA", *(f"G{i}" for i in range(30))]
    for method in ("perturbedvae", "additive"):
        details = folder / "details" / method
        details.mkdir(parents=True)
        deltas, means = [], [{"perturbation": "control", "kind": "control", "pc1": 0.0, "pc2": 0.0}]
        for name in NAMES:
            observed = rng.normal(size=len(genes))
            block = {"perturbation": name, "context": "all", "gene": genes, "observed": observed}
            deltas.append(pd.DataFrame({**block, "predicted": 0.7 * observed + rng.normal(0, 0.2, len(genes))}))
            for kind in ("observed", "predicted"):
                means.append({"perturbation": name, "kind": kind, "pc1": rng.normal(), "pc2": rng.normal()})
        pd.concat(deltas).assign(method=method, **key).to_parquet(details / "deltas.parquet")
        pd.DataFrame(means).assign(context="all", method=method, **key).to_csv(details / "embedding.csv", index=False)
    epochs = pd.DataFrame({"epoch": np.arange(1, 6), "value": np.linspace(2, 1, 5)})
    terms = [
        epochs.assign(term=term, method="perturbedvae", **{**key, "seed": s})
        for term in ("loss", "val_loss", "kl")
        for s in (0, 1)
    ]
    silent = {**key, "method": "perturbedvae", "value": 0.0}
    terms += [epochs.assign(**{**silent, "term": term}) for term in ("mmd", "val_mmd")]
    pd.concat(terms).to_csv(folder / "training.csv", index=False)
    return FigureInputs.from_files(
        folder / "tables", [*sorted((folder / "details").iterdir()), folder / "training.csv"]
    )


def draw(name: str, inputs: FigureInputs, stem: Path, **other) -> str:
    where = {"dataset": "sim", "split": "zero", **other}
    draw_figure(name, inputs, stem, spec=SPEC, titles=TITLES, **where)
    return stem.with_name(f"{stem.name}.svg").read_text()


@pytest.mark.parametrize("name", FIGURES)
def test_figure_writes_three_files_and_the_same_bytes_again(name, inputs, tmp_path):
    for run in ("one", "two"):
        svg = draw(name, inputs, tmp_path / run / name)
        assert svg.startswith("<?xml") and "<text" in svg  # text stays text
    for suffix in (".svg", ".png", ".csv"):
        first, second = ((tmp_path / run / f"{name}{suffix}").read_bytes() for run in ("one", "two"))
        assert first == second, suffix
    assert len(list((tmp_path / "one").iterdir())) == 3
    assert len(pd.read_csv(tmp_path / "one" / f"{name}.csv")) > 3
    assert (tmp_path / "one" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["overview", "calibration"])
def test_figures_of_the_whole_run_need_no_dataset(name, inputs, tmp_path):
    assert "sim · zero" in draw(name, inputs, tmp_path / name, dataset="", split="")


def words(svg: str) -> str:
    return " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg))


def test_undefined_scores_are_shown(inputs, tmp_path):
    assert "undefined" in words(draw("overview", inputs, tmp_path / "a"))
    assert "undefined" in words(draw("contrasts", inputs, tmp_path / "b"))
    assert "undefined" in words(draw("strata", inputs, tmp_path / "c"))
    scatter = words(draw("scatter", inputs, tmp_path / "d"))
    assert "not compared, because undefined for one or both: 1" in scatter
    assert "PerturbedVAE better" in scatter


def test_source_data_hold_what_is_drawn(inputs, tmp_path):
    draw("scatter", inputs, tmp_path / "s")
    drawn = pd.read_csv(tmp_path / "s.csv").query("method == 'perturbedvae'").set_index("perturbation")["value"]
    scores = make_scores().query("method == 'perturbedvae' and metric == 'pearson_delta_pert'")
    np.testing.assert_allclose(drawn[NAMES], scores.set_index("perturbation")["value"][NAMES], rtol=1e-5)
    draw("hardest_easiest", inputs, tmp_path / "h")
    order = scores.sort_values("value")["perturbation"]
    named = pd.read_csv(tmp_path / "h.csv", keep_default_na=False).groupby("which")["perturbation"].first()
    assert (named["hardest"], named["easiest"]) == (order.iloc[0], order.iloc[-1])
    assert "NA" in set(pd.read_csv(tmp_path / "h.csv", keep_default_na=False)["gene"])  # a gene of this name is a gene


MISSING = [
    ("overview", FigureInputs(), "needs the folder of summary tables"),
    ("overview", FigureInputs(Path("nowhere")), "no such file; make it with `perturbed summarise`"),
    ("training_curves", FigureInputs(), "needs at least one training.csv"),
    ("embedding", FigureInputs(), "needs at least one embedding.csv"),
    (
        "hardest_easiest",
        FigureInputs(deltas=(Path("nowhere.parquet"),)),
        "no such file; make it with `perturbed evaluate`",
    ),
]


@pytest.mark.parametrize(("name", "given", "message"), MISSING)
def test_missing_input_is_one_line(name, given, message, tmp_path):
    with pytest.raises(DataError, match=message) as caught:
        draw(name, given, tmp_path / "x")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_wrong_names_are_refused(inputs, tmp_path):
    with pytest.raises(ConfigError, match="unknown figure 'overviw'; did you mean 'overview'"):
        draw("overviw", inputs, tmp_path / "x")
    for name in FIGURES:
        with pytest.raises(DataError, match="no row for dataset 'other'"):
            draw(name, inputs, tmp_path / "x", dataset="other")
    with pytest.raises(DataError, match="no such folder"):
        FigureInputs.from_files(None, [tmp_path / "details"])


def test_a_run_that_has_nothing_for_a_figure_gets_a_figure_that_says_so(inputs, tmp_path):
    empty = tmp_path / "training.csv"
    empty.write_text("dataset,split,fold,method,seed,epoch,term,value\n")
    svg = draw("training_curves", FigureInputs(inputs.tables, histories=(empty,)), tmp_path / "t")
    assert "training.csv holds no row" in words(svg)


def test_a_term_that_is_zero_throughout_is_named_but_gets_no_panel(inputs, tmp_path):
    text = words(draw("training_curves", inputs, tmp_path / "t"))
    assert "0 throughout, no panel: mmd" in text and text.count("mmd") == 1
    assert set(pd.read_csv(tmp_path / "t.csv")["term"]) == {"loss", "val_loss", "kl"}
    late = pd.read_csv(inputs.histories[0])
    late.loc[late["term"].eq("mmd") & late["epoch"].eq(5), "value"] = 1.0  # a weight that sets in late
    late.to_csv(tmp_path / "training.csv", index=False)
    text = words(draw("training_curves", FigureInputs(histories=(tmp_path / "training.csv",)), tmp_path / "u"))
    assert "0 throughout" not in text and text.count("mmd") == 1
    assert "val_mmd" in set(pd.read_csv(tmp_path / "u.csv")["term"])


def test_the_gain_over_the_reference_has_panels_of_its_own(tmp_path):
    rows = []
    for dataset, baselines in (("real", ["additive"]), ("sim", ["additive", "noise_free_additive"])):
        for baseline in baselines:
            for method in sorted({"shrunk_interaction", "additive", *baselines} - {baseline}):
                for cells in (40, 4000):
                    is_reference = method == "noise_free_additive"
                    key = (dataset, f"n{cells}", cells, method, is_reference, baseline, "l2_delta", -1)
                    rows.append((*key, 0.2, 0.1, 0.3))
    columns = ["dataset", "split", "cells", "method", "reference", "baseline", "metric", "direction", "gain", "ci_low",
               "ci_high"]  # fmt: skip
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "table.csv", index=False)
    keys = {"levels": {"n40": 40, "n4000": 4000}, "methods": ["shrunk_interaction"], "metrics": ["l2_delta"]}
    study = parse(Denoising, {"kind": "denoising", "title": "Gain by cells", **keys}, "study")
    draw_study(tmp_path / "table.csv", study, tmp_path / "d", TITLES)
    text = words((tmp_path / "d.svg").read_text())
    assert text.count("gain over Additive") == 2 and text.count("gain over Noise-free additive") == 1
    assert (
        "at 4,000 cells" in text
        and "+0.200 [0.100, 0.300]" in text
        and len(pd.read_csv(tmp_path / "d.csv")) == len(rows)
    )


def test_what_lies_far_from_all_others_is_written_at_the_edge(tmp_path):
    methods = {"no_change": 9.0, "mean_effect": 8.0, "additive": 5.0, "perturbedvae": 4.0, "gears": 60.0}
    rows = [
        {"method": name, "mean": mean, "ci_low": mean - 0.2, "ci_high": mean + 0.2, "n_perturbations": 15,
         "n_undefined": 0, "published": {"additive": 4.5, "perturbedvae": 30.0}.get(name)}
        for name, mean in methods.items()
    ]  # fmt: skip
    rows[2] |= {"n_perturbations": 5, "n_undefined": 10}
    key = {"dataset": "d", "split": "s", "reference": False, "metric": "l2_delta", "direction": -1, "floor": 8.0}
    pd.DataFrame(rows).assign(**key).to_csv(tmp_path / "table.csv", index=False)
    keys = {"splits": ["s"], "methods": list(methods), "metrics": ["l2_delta"], "title": "t"}
    study = parse(Comparison, {"kind": "comparison", **keys}, "study")
    draw_study(tmp_path / "table.csv", study, tmp_path / "c", TITLES)
    text = words((tmp_path / "c.svg").read_text())
    assert "60 →" in text and "◇ 30 →" in text and "4.5" not in text  # the last is a diamond
    assert "Additive (5 of 15)" in text and "PerturbedVAE (" not in text
    ticks = [float(word) for word in re.findall(r"<text[^>]*>([\d.]+)</text>", (tmp_path / "c.svg").read_text())]
    assert max(ticks) < 20


def test_a_method_looks_the_same_whatever_else_is_drawn():
    assert look_of("additive", ["zzz"]) == look_of("additive", ["aaa", "bbb"])
    looks = {(look.colour, look.marker) for look in map(look_of, ("perturbedvae", "additive", "gears", "knn", "sena"))}
    assert len(looks) == 5
    assert title_of("technical_duplicate", {}) == "Technical duplicate"
    assert title_of("my_own", {"my_own": "Mine"}) == "Mine"


def test_pictures_do_not_depend_on_the_users_matplotlib_settings(inputs, tmp_path):
    import matplotlib as mpl

    plain = draw("calibration", inputs, tmp_path / "a")
    with mpl.rc_context({"font.size": 20, "svg.fonttype": "path"}):
        assert draw("calibration", inputs, tmp_path / "b") == plain
