"""What the test cells say: means, moments, drawn cells and controls of every test condition, on the split's genes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from perturbed.config import EvaluationSpec
from perturbed.evaluation.differential import Moments, add_up
from perturbed.evaluation.distances import median_bandwidth
from perturbed.evaluation.undefined import Undefined
from perturbed.files import sha256_text

_BANDWIDTH_CELLS = 1000


def generator(seed: int, *names: str) -> np.random.Generator:
    """A random stream of its own for every seed and tuple of names, whatever else is drawn."""
    digest = sha256_text("\x1f".join(names))
    return np.random.default_rng([seed, *(int(digest[i : i + 8], 16) for i in range(0, 32, 8))])


@dataclass(frozen=True)
class Pool:
    """Cells kept in memory: test cells of perturbations, and drawn control cells.

    Parameters
    ----------
    cells
        Log-normalised expression, CSR (n_kept, n_genes).
    fit
        Gives mean (n_genes,) and PCA loadings (n_genes, n_pcs) of the training cells; called when first needed.
    """

    cells: sparse.csr_matrix
    fit: Callable[[], tuple[np.ndarray, np.ndarray]]

    @cached_property
    def basis(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean (n_genes,) and PCA loadings (n_genes, n_pcs) of the training cells, float64."""
        centre, loadings = self.fit()
        return np.asarray(centre, dtype=np.float64), np.asarray(loadings, dtype=np.float64)

    @property
    def loadings(self) -> np.ndarray:
        """PCA loadings (n_genes, n_pcs)."""
        return self.basis[1]

    def project(self, values: np.ndarray | sparse.csr_matrix) -> np.ndarray:
        """PCA scores of rows of expression (n, n_pcs)."""
        centre, loadings = self.basis
        return np.asarray(values @ loadings) - centre @ loadings

    @cached_property
    def scores(self) -> np.ndarray:
        """PCA scores of all kept cells (n_kept, n_pcs)."""
        return self.project(self.cells)


@dataclass(frozen=True)
class ContextTruth:
    """What all test conditions of one context share.

    Parameters
    ----------
    control
        Mean of the training and validation control cells (n_genes,): the shared reference.
    control_test
        Mean of the held-out control cells, or None where the split holds none out.
    perturbed_mean
        Mean over the training perturbations, equal weight each, or None where there is none.
    control_rows
        Pool rows of drawn training control cells, which stand in for cells where a method predicts means only.
    reference_rows
        Pool rows of drawn control cells for the truth side: held-out ones, or training ones where none is held out.
    background
        Moments of all perturbed training cells of the context, and `own` those of each test perturbation among them.
    """

    control: np.ndarray
    control_test: np.ndarray | None
    perturbed_mean: np.ndarray | None
    control_rows: np.ndarray
    reference_rows: np.ndarray
    background: Moments | None
    own: dict[str, Moments] = field(default_factory=dict)


@dataclass(frozen=True)
class Truth:
    """The test set of one split.

    Parameters
    ----------
    genes
        Names of the genes scored.
    conditions
        One row per test condition: `perturbation`, `context`, `subgroup`.
    targets
        Gene positions of the perturbed genes of each condition.
    moments
        Moments of the test cells of each condition.
    rows
        Pool rows of the test cells of each condition, in the order of their names.
    contexts
        What the conditions of a context share.
    pool
        The cells.
    spec
        How many cells are drawn, and the seed.
    header
        `dataset`, `split`, `fold`, `split_sha256`.
    """

    genes: tuple[str, ...]
    conditions: pd.DataFrame
    targets: tuple[np.ndarray, ...]
    moments: tuple[Moments, ...]
    rows: tuple[np.ndarray, ...]
    contexts: dict[str, ContextTruth]
    pool: Pool
    spec: EvaluationSpec
    header: dict[str, Any]

    def __len__(self) -> int:
        return len(self.conditions)

    def key(self, index: int) -> tuple[str, str]:
        """Perturbation and context of a condition."""
        return str(self.conditions["perturbation"].iat[index]), str(self.conditions["context"].iat[index])

    def context(self, index: int) -> ContextTruth:
        """What the context of a condition holds."""
        return self.contexts[self.key(index)[1]]

    @cached_property
    def n_cells(self) -> np.ndarray:
        """Test cells per condition (n_conditions,)."""
        return np.array([len(rows) for rows in self.rows])

    @cached_property
    def mean(self) -> np.ndarray:
        """Mean of the test cells of every condition (n_conditions, n_genes)."""
        return np.stack([moments.mean for moments in self.moments])

    @cached_property
    def effect_size(self) -> np.ndarray:
        """``‖x_p − c‖₂`` of every condition (n_conditions,)."""
        control = np.stack([self.context(i).control for i in range(len(self))])
        return np.linalg.norm(self.mean - control, axis=1)

    @cached_property
    def _members(self) -> dict[str, np.ndarray]:
        usable = self.n_cells >= self.spec.min_cells
        context = self.conditions["context"].to_numpy()
        return {name: np.flatnonzero((context == name) & usable) for name in self.contexts}

    def peers(self, index: int) -> np.ndarray:
        """Positions of all conditions of the same context with enough cells, the own one among them."""
        return self._members[self.key(index)[1]]

    def background(self, index: int) -> Moments:
        """Moments of the cells of all other perturbations: training ones, or where the context has none, test ones.

        Raises
        ------
        Undefined
            If the context has no cell of another perturbation.
        """
        perturbation, _ = self.key(index)
        shared = self.context(index)
        if shared.background is not None:
            own = shared.own.get(perturbation)
            rest = shared.background if own is None else shared.background - own
            if rest.n >= 2:
                return rest
        others = [self.moments[i] for i in self.peers(index) if i != index]
        if not others:
            raise Undefined("no cells of another perturbation in this context")
        return add_up(others)

    @cached_property
    def _bandwidths(self) -> dict[str, float]:
        return {}

    def bandwidth(self, index: int) -> float:
        """Median distance between observed cells of the context (test and drawn control cells) in PCA space."""
        context = self.key(index)[1]
        if context not in self._bandwidths:
            inside = np.flatnonzero((self.conditions["context"] == context).to_numpy())
            rows = np.concatenate([self.rows[i] for i in inside] + [self.contexts[context].reference_rows])
            rows = generator(self.spec.seed, "bandwidth", context).permutation(rows)[:_BANDWIDTH_CELLS]
            self._bandwidths[context] = median_bandwidth(self.pool.scores[rows])
        return self._bandwidths[context]

    def restrict(self, rows: Sequence[np.ndarray]) -> Truth:
        """The same test set with only some of the cells of each condition."""
        moments = tuple(Moments.of(self.pool.cells[chosen]) for chosen in rows)
        return replace(self, rows=tuple(rows), moments=moments)
