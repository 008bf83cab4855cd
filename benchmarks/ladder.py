"""What helped by how much on combinations: every rung from the additive baseline to `shrunk_interaction`.

python benchmarks/ladder.py [norman] [cells] [simulation] [--cells 40 400] [--screens simulation] [--out ladder.csv]

norman      rungs on the Norman cells, zero-shot and with half of the doubles, and γ chosen on other doubles
cells       additive and the winner against training cells per condition, on the Norman cells
simulation  the same in both simulators, beside the noise-free additive; with fewer rungs, a figure and a table it
            is a study: config/paper_denoising.yaml
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perturbed.config import EvaluationSpec, FeatureSpec, StatisticsSpec, UnseenCombo, parse, read_yaml
from perturbed.data.cards import Card, PathSource, SimulationSource
from perturbed.data.contracts import read_prepared, read_split, write_features, write_h5ad, write_split
from perturbed.data.features import compute_features
from perturbed.data.prepare import prepare
from perturbed.data.simulate import write_simulation
from perturbed.data.split import make_split
from perturbed.evaluation.evaluate import evaluate
from perturbed.evaluation.references import score_references
from perturbed.evaluation.statistics import arrange, contrast
from perturbed.models.base import FitRun, build
from perturbed.models.inputs import load_training_data
from perturbed.models.spec import load_method_spec
from perturbed.names import CONTROL, genes_of

ROOT = Path(__file__).parents[1]
METRICS = {"l2_delta": -1, "pearson_delta_pert": 1, "pearson_delta_ctrl": 1}
DISJOINT = {"pearson_delta_ctrl_disjoint": 1}
GAMMAS = (0.0, 0.1, 0.2, 0.3, 0.4)
N_HALVINGS = 20
WINNER = "shrunk_interaction"
PLAIN: dict[str, Any] = {
    "saturation": 0.0,
    "link_offset": 1.0,
    "n_noise_factors": 0,
    "noise_levels": (1.0,),
    "denoise_control": False,
    "learn_interaction": False,
}
RUNGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mean_effect": ("mean_effect", {}),
    "additive": ("additive", {}),
    "shrunk_saturating": ("shrunk_saturating", {}),
    "low rank + sparse": (WINNER, PLAIN),
    "+ control denoised": (WINNER, PLAIN | {"denoise_control": True}),
    "+ correlated noise": (WINNER, PLAIN | {"denoise_control": True, "n_noise_factors": 20}),
    "+ noise levels": (WINNER, {"saturation": 0.0, "link_offset": 1.0, "learn_interaction": False}),
    "+ link": (WINNER, {"saturation": 0.0, "learn_interaction": False}),
    "+ sub-additive prior": (WINNER, {"learn_interaction": False}),
    WINNER: (WINNER, {}),
}
CURVE = {name: RUNGS[name] for name in ("additive", "shrunk_saturating", "+ noise levels", WINNER)}


@dataclass(frozen=True)
class Screen:
    """Prepared cells of one dataset."""

    name: str
    folder: Path
    truth: Path | None = None

    def score(self, split: UnseenCombo, name: str, rungs: dict[str, tuple[str, dict[str, Any]]]) -> pd.DataFrame:
        """Scores of all rungs on all folds of a split."""
        prepared = read_prepared(self.folder / "prepared.h5ad")
        metrics = METRICS if split.control_test_fraction == 0 else METRICS | DISJOINT
        spec = EvaluationSpec(metrics=tuple(metrics), n_halves=2)
        tables = []
        for fold in range(split.n_folds):
            paths = {key: self.folder / f"{name}{fold}.{key}" for key in ("split", "features")}
            write_split(paths["split"], make_split(prepared.obs, split, fold, dataset=self.name, name=name))
            features = compute_features(prepared, read_split(paths["split"]), FeatureSpec(n_hvg="all", n_pcs=5))
            write_features(paths["features"], features)
            data = load_training_data(self.folder / "prepared.h5ad", *paths.values())
            table = read_split(paths["split"]).table
            tested = sorted(
                set(table.loc[(table["part"] == "test") & (table["perturbation"] != CONTROL), "perturbation"])
            )
            files = {"prepared": self.folder / "prepared.h5ad", **paths, "spec": spec}
            meta = {"dataset": self.name, "split": name, "fold": fold, "seed": 0}
            for rung, (method, params) in rungs.items():
                model = build(load_method_spec(method, [ROOT / "config/methods"]), params)
                model.fit(data, FitRun(progress=False))
                prediction = model.predict([(perturbation, "all") for perturbation in tested])
                tables.append(evaluate(**files, prediction=prediction, meta=meta | {"method": rung}))
            if self.truth is not None:
                reference = score_references(**files, truth=self.truth, meta=meta)
                tables.append(reference[reference["method"].isin(["noise_free", "noise_free_additive"])])
        return pd.concat(tables, ignore_index=True)


def norman(folder: Path) -> Screen:
    """The shared Norman cells."""
    path = ROOT / "config/datasets/norman2019_combo1000.yaml"
    card = parse(Card, read_yaml(path), str(path))
    assert isinstance(card.source, PathSource)
    raw = ROOT / card.source.path
    write_h5ad(folder / "prepared.h5ad", prepare(raw, card, "norman2019_combo1000"))
    return Screen("norman2019_combo1000", folder)


def simulated(name: str, n_cells: int, folder: Path) -> Screen:
    """A simulated screen with another number of cells per perturbation, and as many control cells at least."""
    content = read_yaml(ROOT / f"config/datasets/{name}.yaml")
    content["expect"] = {}
    # A noise-free reference of fewer cells than the test's would carry more noise than the test.
    sizes = {"n_control": max(600, n_cells), "n_truth_cells": max(2000, 5 * n_cells)}
    content["source"]["params"] |= {"n_cells_per_perturbation": n_cells} | sizes
    card = parse(Card, content, name)
    assert isinstance(card.source, SimulationSource)
    write_simulation(card.source, name, folder / "raw.h5ad", folder / "truth.h5ad")
    write_h5ad(folder / "prepared.h5ad", prepare(folder / "raw.h5ad", card, name))
    (folder / "raw.h5ad").unlink()
    return Screen(name, folder, folder / "truth.h5ad")


def show(title: str, scores: pd.DataFrame, baselines: tuple[str, ...]) -> None:
    """Means of every rung, and paired gains with 95 % intervals over perturbations."""
    (grid,) = arrange(scores, StatisticsSpec(n_bootstrap=2000))
    metrics = {k: v for k, v in (METRICS | DISJOINT).items() if k in grid.metrics}
    print(f"\n## {title}\n\n{'':<24}" + "".join(f"{metric:>30}" for metric in metrics))
    rungs = list(dict.fromkeys(scores["method"]))
    for rung in rungs:
        means = scores[scores["method"] == rung].groupby("metric")["value"].mean()
        print(f"{rung:<24}" + "".join(f"{means.get(metric, np.nan):>30.3f}" for metric in metrics))
    contestants = [
        rung for rung in rungs if rung not in (*baselines, "mean_effect", "noise_free", "noise_free_additive")
    ]
    for rung, baseline in ((r, b) for r in contestants for b in baselines):
        cells = []
        for metric, direction in metrics.items():
            gain = contrast(grid, rung, baseline, metric, direction).difference
            cells.append(f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]")
        print(f"{f'{rung} − {baseline}':<48}" + "".join(f"{cell:>28}" for cell in cells))


def cross_fit(screen: Screen, split: UnseenCombo) -> pd.DataFrame:
    """γ chosen on a random half of the doubles by L2, reported on the other, over many halvings.

    The score of a double is its mean over the halvings in which it was reported.
    """
    rungs = {f"γ = {gamma}": (WINNER, {"saturation": gamma}) for gamma in GAMMAS}
    scores = screen.score(split, "cross_fit", rungs | {k: RUNGS[k] for k in ("additive", "shrunk_saturating")})
    wide = scores.pivot_table(index=["method", "perturbation"], columns="metric", values="value")
    names = sorted(set(scores["perturbation"]) - {""})
    rng = np.random.default_rng(0)
    total = {name: np.zeros(len(METRICS)) for name in names}
    times = dict.fromkeys(names, 0)
    chosen = dict.fromkeys(rungs, 0)
    for _ in range(N_HALVINGS):
        order = rng.permutation(names)
        for choose, report in ((order[::2], order[1::2]), (order[1::2], order[::2])):
            best = min(rungs, key=lambda rung: wide.loc[rung].loc[list(choose), "l2_delta"].mean())
            chosen[best] += 1
            for name in report:
                total[name] += wide.loc[(best, name), list(METRICS)].to_numpy(float)
                times[name] += 1
    print("\nγ chosen by the other half:", chosen)
    template = scores[scores["method"] == "additive"]
    found = [total[row.perturbation][list(METRICS).index(row.metric)] / times[row.perturbation]
             for row in template.itertuples()]  # fmt: skip
    return pd.concat([scores, template.assign(method="γ by the other half", value=found)], ignore_index=True)


def zero_shot(**options: Any) -> UnseenCombo:
    """All controls and singles train, without validation cells."""
    return UnseenCombo(**{"kind": "unseen_combo", "control_test_fraction": 0.0, "val_fraction": 0.0} | options)


def run_norman(folder: Path) -> Iterator[pd.DataFrame]:
    """Rungs zero-shot, against disjoint controls, and with half of the doubles."""
    screen = norman(folder)
    both = ("additive", "shrunk_saturating")
    rungs = {name: rung for name, rung in RUNGS.items() if name != "+ sub-additive prior"}
    scores = screen.score(zero_shot(), "zero_shot", rungs)
    show("Norman, zero-shot", scores, both)
    yield scores
    scores = screen.score(zero_shot(control_test_fraction=0.5, folds=4), "disjoint_controls", CURVE)
    show("Norman, zero-shot, half of the controls", scores, both)
    yield scores
    scores = screen.score(zero_shot(train_fraction=0.5, folds=5), "half", RUNGS)
    show("Norman, half of the doubles, five splits", scores, both)
    yield scores
    scores = cross_fit(screen, zero_shot())
    show("Norman, zero-shot, γ chosen on other doubles", scores, both)
    yield scores


def noise_free_additive(screen: Screen) -> np.ndarray:
    """L2 that the sum of noise-free singles would have on each double, estimated (n_doubles,).

    The squared distance of the additive prediction from a double's mean, less what the sampling noise of both singles
    and of control adds to it (the trace of each covariance over its number of cells); unbiased before the root.
    """
    prepared = read_prepared(screen.folder / "prepared.h5ad")
    label = prepared.obs["perturbation"].to_numpy()
    mean, noise = {}, {}
    for name in np.unique(label):
        cells = prepared.X[np.flatnonzero(label == name)].toarray().astype(np.float64)
        mean[name], noise[name] = cells.mean(axis=0), cells.var(axis=0, ddof=1).sum() / len(cells)
    squares = []
    for name in (name for name in mean if len(genes_of(name)) == 2):
        first, second = genes_of(name)
        gap = mean[first] + mean[second] - mean[CONTROL] - mean[name]
        squares.append(gap @ gap - noise[first] - noise[second] - noise[CONTROL])
    return np.sqrt(np.maximum(squares, 0.0))


def run_cells(folder: Path) -> Iterator[pd.DataFrame]:
    """Norman with fewer training cells, beside an estimate of what noise-free singles would give."""
    screen = norman(folder)
    reference = noise_free_additive(screen)
    print(f"\nNorman, noise-free additive, estimated: L2 {reference.mean():.3f} over {len(reference)} doubles")
    for n in (5, 10, 20, 40):
        for name, fraction, folds in (("zero_shot", 0.0, 1), ("half", 0.5, 5)):
            split = zero_shot(train_cells=n, train_controls=n, train_fraction=fraction, folds=folds)
            scores = screen.score(split, f"{name}_{n}", CURVE)
            show(f"Norman, {name}, {n} cells per condition", scores, ("additive",))
            yield scores


def run_simulation(folder: Path, numbers: list[int], screens: list[str]) -> Iterator[pd.DataFrame]:
    """Simulated screens over the number of cells."""
    for name in screens:
        for n in numbers:
            screen = simulated(name, n, folder)
            for split, fraction, folds in (("zero_shot", 0.0, 1), ("half", 0.5, 5)):
                scores = screen.score(zero_shot(train_fraction=fraction, folds=folds), f"{split}_{n}", CURVE)
                show(f"{name}, {split}, {n} cells per condition", scores, ("additive", "noise_free_additive"))
                yield scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["norman", "cells", "simulation"])
    parser.add_argument("--cells", nargs="+", type=int, default=[40, 400, 4000], help="cells of a simulated condition")
    parser.add_argument(
        "--screens", nargs="+", default=["simulation", "simulation_epistasis"], help="simulated screens"
    )
    parser.add_argument("--out", type=Path, help="write all scores to this csv")
    arguments = parser.parse_args()
    tables: list[pd.DataFrame] = []
    with tempfile.TemporaryDirectory() as name:
        for part in arguments.parts:
            folder = Path(name) / part
            folder.mkdir()
            if part == "simulation":
                tables += run_simulation(folder, arguments.cells, arguments.screens)
            else:
                tables += {"norman": run_norman, "cells": run_cells}[part](folder)
    if arguments.out:
        pd.concat(tables).to_csv(arguments.out, index=False)


if __name__ == "__main__":
    main()
