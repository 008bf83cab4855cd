"""What a list of genes must beat: decoded medians, differential expression by donor, correlation with the axis."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse, special, stats

from perturbed.axis.cells import AxisCells, Counts
from perturbed.decoders.base import Decoder

MIN_DONOR_CELLS = 10
"""Donors with fewer cells of a group take no part in its differential expression."""
TARGET_SUM = 1e4
"""Counts per cell of the log-normalised expression that is correlated with the axis."""


@torch.no_grad()
def compare_decoded_medians(cells: AxisCells, rows: np.ndarray, *, most_batches: int = 50) -> np.ndarray:
    r"""The paper's baseline: relative difference of what the median latents of both arms decode to (n_genes,).

    .. math:: 2 (m_1 - m_0) / (m_1 + m_0)

    with :math:`m_0, m_1` the decoded shares at the median latent of the unperturbed and the perturbed cells
    (Bjerregaard et al. 2025, authors' notes). A decoder with batches has no answer without one: both medians are
    decoded with each batch of the group (the commonest ones) and averaged by cells, the same for both arms.

    Parameters
    ----------
    cells
        The cells.
    rows
        Those of the group.
    most_batches
        So many of the commonest batches.
    """
    names, counts = np.unique(cells.batch[rows].astype(str), return_counts=True)
    order = np.argsort(-counts, kind="stable")[:most_batches]
    context = cells.decoder.context(list(names[order]))
    weight = torch.from_numpy(counts[order] / counts[order].sum())
    means = []
    for k in (0, 1):
        median = np.median(cells.z[rows[cells.arm[rows] == k]], axis=0)
        z = torch.from_numpy(median).float().expand(len(order), -1)
        means.append((weight @ cells.decoder.decode(z, context).expression.double()).numpy())
    return 2 * (means[1] - means[0]) / (means[1] + means[0])


@torch.no_grad()
def mean_decoded(decoder: Decoder, z: np.ndarray, context: dict[str, torch.Tensor]) -> np.ndarray:
    """Mean decoded share of every gene over cells (n_genes,)."""
    total = np.zeros(len(decoder.genes))
    for start in range(0, len(z), 512):
        rows = slice(start, start + 512)
        inside = {key: value[rows] for key, value in context.items()}
        total += decoder.decode(torch.from_numpy(z[rows]), inside).expression.sum(dim=0, dtype=torch.float64).numpy()
    return total / len(z)


# --- counts -------------------------------------------------------------------------------------------------------


class CountSums(NamedTuple):
    """Sums over the cells of each donor."""

    counts: np.ndarray
    """Counts of the model's genes (n_donors, n_genes)."""
    library: np.ndarray
    """Counts of all genes (n_donors,)."""
    n_cells: np.ndarray
    """(n_donors,)."""


def sum_counts(counts: Counts, rows: np.ndarray, donor: np.ndarray, n_donors: int) -> CountSums:
    """Sums of counts by donor, in one pass over the file.

    Parameters
    ----------
    counts
        The counts.
    rows
        Cells that count, by position, ascending (n_chosen,).
    donor
        Their donors (n_chosen,).
    n_donors
        Number of donors.
    """
    found = CountSums(np.zeros((n_donors, len(counts.decoder.genes))), np.zeros(n_donors), np.zeros(n_donors))
    for inside, matrix, library in counts.chunks():
        here = (rows >= inside.start) & (rows < inside.stop)
        place, own = rows[here] - inside.start, donor[here]
        select = sparse.csr_matrix((np.ones(len(own)), (own, place)), shape=(n_donors, matrix.shape[0]))
        np.add(found.counts, (select @ matrix).toarray(), out=found.counts)
        np.add(found.library, select @ library, out=found.library)
        np.add(found.n_cells, np.bincount(own, minlength=n_donors), out=found.n_cells)
    return found


class DonorTest(NamedTuple):
    """Differential expression by donor."""

    t: np.ndarray
    """Moderated t, positive where perturbed donors are higher (n_genes,)."""
    p: np.ndarray
    """Two-sided (n_genes,)."""
    adjusted: str
    """Whether studies were adjusted for."""


def compare_donors(sums: CountSums, arm: np.ndarray, study: np.ndarray) -> DonorTest | None:
    r"""Differential expression by donor: moderated t of the arms' log counts per million, and its two-sided p.

    Per gene, :math:`y_d = \log_2(10^6 c_d / L_d + 1)` of the pooled counts of donor d is regressed on the arm, and on
    the studies where that leaves the arm estimable. Residual variances are shrunk to a common prior as by Smyth (2004,
    Stat. Appl. Genet. Mol. Biol. 3:3), so that few donors do not make large t by chance.

    Parameters
    ----------
    sums
        Pooled counts.
    arm, study
        Of every donor (n_donors,).

    Returns
    -------
    DonorTest or None
        None where fewer than two donors of an arm have enough cells.
    """
    used = np.flatnonzero(sums.n_cells >= MIN_DONOR_CELLS)
    if min((arm[used] == 0).sum(), (arm[used] == 1).sum()) < 2:
        return None
    y = np.log2(1e6 * sums.counts[used] / sums.library[used, None] + 1)
    design = _design(arm[used], study[used])
    if design.shape[1] > 2:
        adjusted = "for studies"
    elif len(set(study[used])) == 1:
        adjusted = "no: one study"
    else:
        adjusted = "no: too few donors, or studies that the arms cannot be told from"
    return DonorTest(*moderated_t(y, design, 1), adjusted)


def _design(arm: np.ndarray, study: np.ndarray) -> np.ndarray:
    """Intercept, arm, and indicators of all studies but one, where these leave the arm and a residual."""
    plain = np.column_stack([np.ones(len(arm)), arm])
    dummies = [(study == name).astype(float) for name in sorted(set(study))[1:]]
    full = np.column_stack([plain, *dummies])
    estimable = np.linalg.matrix_rank(full) == full.shape[1] and full.shape[1] < len(arm)
    return full if dummies and estimable else plain


def moderated_t(y: np.ndarray, design: np.ndarray, column: int) -> tuple[np.ndarray, np.ndarray]:
    """Moderated t of one coefficient of a linear model, and its two-sided p, for every gene.

    Parameters
    ----------
    y
        Values (n_samples, n_genes).
    design
        Of full rank (n_samples, n_coefficients).
    column
        The coefficient.

    Returns
    -------
    tuple
        (n_genes,) each; t is 0 and p 1 for a gene that does not vary.
    """
    coefficient, *_ = np.linalg.lstsq(design, y, rcond=None)
    freedom = len(y) - design.shape[1]
    variance = ((y - design @ coefficient) ** 2).sum(axis=0) / freedom
    moves = np.ptp(y, axis=0) > 0
    prior_freedom, prior = fit_variance_prior(variance[moves], freedom)
    if np.isinf(prior_freedom):
        shrunk = np.full_like(variance, prior)
    else:
        shrunk = (prior_freedom * prior + freedom * variance) / (prior_freedom + freedom)
    factor = np.linalg.inv(design.T @ design)[column, column]
    t = np.where(moves, coefficient[column] / np.sqrt(np.where(moves, shrunk, 1.0) * factor), 0.0)
    total = min(freedom + prior_freedom, freedom * y.shape[1])
    return t, np.where(moves, 2 * stats.t.sf(np.abs(t), total), 1.0)


def fit_variance_prior(variance: np.ndarray, freedom: int) -> tuple[float, float]:
    """Degrees of freedom (may be infinite) and scale of the inverse χ² prior of variances, by moments of their logs."""
    logs = np.log(variance[variance > 0])
    if len(logs) < 3:
        return 0.0, 1.0
    e = logs - special.digamma(freedom / 2) + np.log(freedom / 2)
    excess = e.var(ddof=1) - special.polygamma(1, freedom / 2)
    if excess <= 0:
        return np.inf, float(np.exp(e.mean()))
    prior = 2 * _inverse_trigamma(float(excess))
    return prior, float(np.exp(e.mean() + special.digamma(prior / 2) - np.log(prior / 2)))


def _inverse_trigamma(x: float) -> float:
    """The y with trigamma(y) = x, by Newton's method on 1/trigamma, which is convex."""
    y = 0.5 + 1 / x
    for _ in range(50):
        value = float(special.polygamma(1, y))
        step = value * (1 - value / x) / float(special.polygamma(2, y))
        y += step
        if -step / y < 1e-8:
            break
    return y


def correlate_with_axis(counts: Counts, rows: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Pearson correlation of every gene's log-normalised expression with the cells' place along an axis (n_genes,).

    Parameters
    ----------
    counts
        The counts.
    rows
        Cells by position, ascending (n_chosen,).
    place
        Their place along the axis (n_chosen,).

    Returns
    -------
    numpy.ndarray
        0 for genes that do not vary.
    """
    total, squares, cross = np.zeros((3, len(counts.decoder.genes)))
    centred = place - place.mean(dtype=np.float64)
    for inside, matrix, library in counts.chunks():
        here = (rows >= inside.start) & (rows < inside.stop)
        own = rows[here] - inside.start
        scale = sparse.diags_array(TARGET_SUM / np.maximum(library[own], 1))
        logs = sparse.csr_matrix(scale @ matrix[own].astype(np.float64)).log1p()
        total += np.asarray(logs.sum(axis=0)).ravel()
        squares += np.asarray(logs.multiply(logs).sum(axis=0)).ravel()
        cross += logs.T @ centred[here]
    spread = np.sqrt(np.maximum(squares - total**2 / len(rows), 0) * (centred**2).sum())
    return np.divide(cross, spread, out=np.zeros(len(cross)), where=spread > 1e-12)
