"""The text of `docs/metrics.md`."""

from __future__ import annotations

from collections.abc import Mapping

from perturbed.evaluation.registry import Metric, describe

TOPICS = (
    "Error",
    "Direction",
    "Ranking",
    "Differential expression",
    "Distribution",
    "Spread",
    "As published",
)
"""Sections in this order; topics of added metrics follow."""

_HEAD = """\
# Metrics

Generated from the registry (`perturbed.evaluation.registry`) by `perturbed config --write`; do not edit.

## How to read a score

Every metric compares one test condition (a perturbation in a context) with one prediction of it. Symbols, all per gene
`g` of the split and on log-normalised expression:

- `x`: mean of the condition's test cells; `x̂`: its prediction.
- `c`: mean of the training and validation control cells of the context; `c_test`: mean of its held-out control cells.
- `m`: mean over the training perturbations of the context, equal weight each (where the context has none, `c` plus the
  mean effect in the other contexts).
- `Δ = x − c` and `Δ̂ = x̂ − c`: effects, against the same real cells on both sides.
- `w`: weights from the truth; `N`: number of test perturbations of the context.

Rules:

- A score that does not exist is **NaN with its reason**, never 0: no_change has no direction, for one. `reason` may
  hold a note beside a valid score too.
- An effect below 1e-5 of the expression's own size (root mean square) is the rounding of float32; it counts as none.
- A condition with fewer than `min_cells` test cells is not scored. Where cells are drawn (at most `max_cells`), each
  condition has a seeded stream of its own, so that no other condition or method changes them.
- Weights, differential genes and bandwidths come from the truth alone, and are the same for every method.
- Metrics of a whole test set have the perturbation `*`.
- Predictions are matched by gene **name**: missing genes are an error, further ones are ignored, the order is free.

Weights: |t| of Welch's test of the condition's test cells against all perturbed training cells of the context (its own
left out; the other test perturbations where the context has none), min-max scaled over genes and squared.
Differential genes: Welch's t of drawn test cells against equally many drawn control cells (held-out ones where there
are any, else training ones), Benjamini–Hochberg at 5 %; "top" are the `n_top_de` genes with the largest |t|.

## Floors and ceilings

| name | what it predicts | carried to the full n |
|---|---|---|
| `no_change`, `mean_effect` | the control; the training perturbed mean: the uninformed floors | – |
| `additive`, `matching_mean`, `pca_ridge` | simple methods that any model should beat | – |
| `technical_duplicate` | one random half of the cells predicts the other; mean of `n_halves` draws | by entry, below |
| `interpolated_duplicate` | `(1 − q) x_half + q m` per gene, q: adjusted p against other perturbations | no |
| `truth` | the condition's own mean; distribution metrics have their perfect value by definition | – |
| `noise_free` | in a simulation, the population mean: what a perfect method would score | – |
| `noise_free_additive` | in a simulation, noise-free control plus noise-free single effects | – |

Correlations are carried to two samples of the full size by Spearman–Brown, `2r / (1 + r)`, errors by the halved
sampling variance, R² by that and by what the scatter of the truth loses with it; the disjoint-control correlation,
whose controls do not grow with the cells, by `r √(v_A v_B / ((v_A − s²/2)(v_B − s²/2)))` with the variances over
genes of both sides and `s² = Var_g(x_A − x_B) / 2`. A noise-free predictor can score above the technical duplicate: its
correlation is about the square root of the corrected one, its error √½ of it. The interpolated duplicate is scored
against one half of the cells, so its errors hold more sampling noise than those of methods: a conservative ceiling.

The dynamic range fraction `(M_positive − M_negative) / (M_perfect − M_negative)` of a metric on a data set is never
clipped (`calibration.csv`). Look at it before choosing a primary metric: where a duplicate of the
truth does no better than an uninformed floor, the metric cannot tell.
"""

_TAIL = """\
## Where published packages differ

Tests compare with cell-eval and pertpy where the definitions agree, or differ by a known factor.

- **cell-eval `pearson_delta`** differences the prediction against the *predicted* control, here both sides take real
  training control cells; equal when the predicted control is the real one.
- **cell-eval `discrimination_score_l1`, `_cosine`**: `1 − r / N` with ties in the order of a sort, and only a gene of
  the perturbation's own name left out. Here `1 − r / (N − 1)`, ties count half, every perturbed gene of a combination
  is left out. Without ties `1 − here = (1 − there) · N / (N − 1)`.
- **cell-eval `mae`, `mse`** are equal to `mae` and `rmse²`.
- **cell-eval `edistance`** correlates V-statistics against control over perturbations; here it is the U-statistic
  between predicted and observed cells.
- **cell-eval `overlap_at_N`, `pr_auc`** rank predictions by a test of the predicted cells, so that the number of
  sampled cells matters; here the size of the predicted change ranks, for all methods alike.
- **pertpy `edistance`** (1.0.3) is a V-statistic, with the zero distances of a cell to itself in its within-means:
  with those scaled by `n / (n − 1)` it is the one here.
- **pertpy `mmd`** has a linear kernel by default, and with `kernel="rbf"` a V-statistic with `gamma` 1; here it is
  unbiased with `gamma = 1 / 2σ²`. `mmd_published` is the sum of its V-statistics over ten values of `gamma`.
- **cellsimbench** takes one half of the cells as truth for all methods, weighs genes against all other perturbations
  of the data set and clips its DRF; here truth is all test cells, weights come from training perturbations, and
  nothing is clipped.
- **GEARS, cell-eval `score`** turn NaN into 0; here it stays, with its reason, and leaves the paired tests.

## Adding a metric

Write a function in a module of `perturbed/evaluation/metrics` that takes a `Case` and returns a number; raise
`Undefined("why")` where there is none. Decorate it with `@metric(...)`, whose fields appear here and in its docstring,
and write this page anew. Nothing else changes: `evaluation.metrics: [name]` selects it.
"""


def render(metrics: Mapping[str, Metric]) -> str:
    """The page: how to read scores, an overview, and every entry in full."""
    place = {topic: i for i, topic in enumerate(TOPICS)}
    ordered = sorted(metrics.values(), key=lambda m: place.get(m.topic, len(TOPICS)))
    overview = ["## Overview", "", "| metric | measures | better | perfect | chance |", "|---|---|---|---|---|"]
    arrows = {1: "higher", -1: "lower", 0: "nearer"}
    overview += [
        f"| [`{m.name}`](#{m.name}) | {_cell(m.summary.split('. ')[0].rstrip('.'))} | {arrows[m.direction]} "
        f"| {m.perfect:g} | {_cell(m.chance)} |"
        for m in ordered
    ]
    sections: list[str] = []
    for topic in dict.fromkeys([*TOPICS, *(m.topic for m in ordered)]):
        sections += [f"## {topic}", ""]
        for m in (m for m in ordered if m.topic == topic):
            sections += [f"### {m.name}", "", m.summary, "", *(f"- {key}: {text}" for key, text in describe(m)), ""]
    return "\n".join([_HEAD, *overview, "", *sections, _TAIL])


def _cell(text: str) -> str:
    """Text that may stand in a table."""
    return text.replace("|", "\\|")
