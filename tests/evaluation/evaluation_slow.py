"""The definitions of the metrics once more, in loops and library calls, on dense cells."""

from __future__ import annotations

import numpy as np
from evaluation_world import World
from scipy import stats
from sklearn.metrics import average_precision_score, r2_score
from statsmodels.stats.multitest import multipletests

from perturbed.names import CONTROL, genes_of


class Slow:
    """The definitions, in loops and library calls, on dense cells."""

    def __init__(self, world: World, p: str, predicted: np.ndarray) -> None:
        self.world, self.p, self.hat = world, p, predicted
        self.cells = world.cells(p, "test").astype(float)
        self.x = self.cells.mean(axis=0)
        self.c, self.m = world.control(), world.trained_mean()
        self.c_test = world.cells(CONTROL, "test").mean(axis=0, dtype=float)
        self.others = {q: world.cells(q, "test").mean(axis=0, dtype=float) for q in world.tested()}
        t = world.table
        trained = t.part.isin(["train", "val"]) & (t.perturbation != CONTROL)
        score = np.abs(stats.ttest_ind(self.cells, world.X[trained.to_numpy()], equal_var=False).statistic)
        self.w = ((score - score.min()) / (score.max() - score.min())) ** 2
        test = stats.ttest_ind(self.cells, world.cells(CONTROL, "test").astype(float), equal_var=False)
        self.significant = multipletests(test.pvalue, method="fdr_bh")[1] < 0.05
        self.top = np.argsort(-np.abs(test.statistic))[:10]
        self.change = self.x - self.c_test

    def metrics(self) -> dict[str, float]:
        x, hat, c, m = self.x, self.hat, self.c, self.m
        top, w = self.top, self.w
        y, y_hat = x - m, hat - m
        mean_y = np.average(y, weights=w)
        corr = lambda a, b: float(stats.pearsonr(a, b).statistic)  # noqa: E731
        found = [g for g in np.argsort(-np.abs(self.change)) if self.significant[g]][:100]
        best = np.argsort(-np.abs(hat - c))[: len(found)]
        signs = [np.sign(hat[g] - c[g]) == np.sign(self.change[g]) for g in np.flatnonzero(self.significant)]
        batch = [((cell - hat) ** 2).sum() for cell in self.cells]
        return {
            "rmse": np.sqrt(np.mean([(a - b) ** 2 for a, b in zip(x, hat)])),
            "mae": np.mean([abs(a - b) for a, b in zip(x, hat)]),
            "l2_delta": np.linalg.norm((hat - c) - (x - c)),
            "wmse": sum(wi * (a - b) ** 2 for wi, a, b in zip(w, x, hat)) / sum(w),
            "r2": r2_score(x, hat),
            "rmse_top_de": np.sqrt(np.mean((x[top] - hat[top]) ** 2)),
            "r2_top_de": r2_score(x[top], hat[top]),
            "pearson_delta_ctrl": corr(x - c, hat - c),
            "pearson_delta_ctrl_disjoint": corr(x - self.c_test, hat - c),
            "pearson_delta_pert": corr(y, y_hat),
            "pearson_delta_ctrl_top_de": corr((x - c)[top], (hat - c)[top]),
            "cosine": (x - c) @ (hat - c) / np.sqrt(((x - c) ** 2).sum() * ((hat - c) ** 2).sum()),
            "r2_delta_weighted": 1 - (w * (y - y_hat) ** 2).sum() / (w * (y - mean_y) ** 2).sum(),
            "pds_l1": self.discriminate(lambda a, b: np.abs(a - b).sum()),
            "pds_cosine": self.discriminate(lambda a, b: 1 - a @ b / np.sqrt((a @ a) * (b @ b))),
            "centroid_accuracy": np.mean(
                [np.linalg.norm(hat - o) > np.linalg.norm(hat - x) for q, o in self.others.items() if q != self.p]
            ),
            "de_overlap": len(set(found) & set(best)) / len(found),
            "de_direction": np.mean(signs),
            "de_pr_auc": average_precision_score(self.significant, np.abs(hat - c)),
            "rmse_relative": np.sqrt(sum(batch) / (self.cells**2).sum()),
            "r2_published": max(r2_score(hat, x), 0),
            "r2_cells": r2_score(self.cells.ravel(), np.tile(hat, len(self.cells))),
            "effect_size_ratio": np.linalg.norm(hat - c) / np.linalg.norm(x - c),
        }

    def discriminate(self, distance) -> float:  # type: ignore[no-untyped-def]
        keep = [i for i, g in enumerate(self.world.genes) if g not in genes_of(self.p)]
        d = {q: distance((self.hat - self.c)[keep], (o - self.c)[keep]) for q, o in self.others.items()}
        return 1 - sum(d[q] < d[self.p] for q in d) / (len(d) - 1)
