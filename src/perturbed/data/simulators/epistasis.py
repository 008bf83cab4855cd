"""Generator `epistasis`: doubles combine in ways that no linear SCM of programs has."""

from __future__ import annotations

import numpy as np

from perturbed.data.simulators.params import EpistasisParams
from perturbed.data.simulators.world import (
    EFFECTS,
    INTERACTIONS,
    Background,
    Generator,
    Response,
    signed_uniform,
    stream,
)

KINDS = ("threshold", "saturating", "multiplicative")


class Epistasis(Generator):
    """Effects act on log-rates directly; doubles saturate, multiply or switch.

    Gene k has a dose per gene g: `d_k = M a_k + e_k`, with program activities a_k, loadings M and sparse direct
    effects e_k. Its single effect is `s_k = r(d_k)`, `r(d) = sign(d) c (1 - exp(-|d|/c))`. A double is of one kind:

    - saturating: `r(d_i + d_j)`;
    - multiplicative: `s_i + s_j + synergy s_i s_j`;
    - threshold: `s_i + s_j`, and in those cells whose shared activity passes the threshold a program that neither
      gene targets switches on and a share of the second gene's effect is masked.

    All deviations from `s_i + s_j` are multiplied by `interaction`. Counts then drop to zero with a probability that
    depends on the perturbation.
    """

    def __init__(self, params: EpistasisParams, seed: int) -> None:
        super().__init__(params, seed)
        self.p = params
        n = params.n_perturbed_genes
        self.activity = np.zeros((n, params.d_nu))
        direct = np.zeros((n, params.n_genes))
        self.gene_dropout = np.zeros(n)
        for i in range(n):
            rng = stream(seed, EFFECTS, i)
            others = rng.choice(np.arange(1, params.d_nu), params.n_targets, replace=False)
            self.activity[i, 0] = params.shared_effect * rng.uniform(0.4, 1.6)
            self.activity[i, others] = signed_uniform(
                rng, params.n_targets, 0.5 * params.effect_size, 1.5 * params.effect_size
            )
            genes = rng.choice(params.n_genes, params.idiosyncratic_genes, replace=False)
            direct[i, genes] = rng.normal(0.0, params.idiosyncratic_effect, len(genes))
            self.gene_dropout[i] = rng.uniform(0.0, 2.0 * params.dropout)
        self.dose = self.activity @ self.world.loadings_nu.T + direct
        self.kinds, self.switched = self._draw_interactions(seed)

    def _draw_interactions(self, seed: int) -> tuple[dict[tuple[int, ...], str], dict[tuple[int, ...], int]]:
        """Kind of each double, in equal shares, and the program that each would switch on."""
        pairs = [key for key in self.world.conditions.values() if len(key) == 2]
        order = stream(seed, INTERACTIONS).permutation(len(pairs))
        kinds: dict[tuple[int, ...], str] = {key: KINDS[order[at] % len(KINDS)] for at, key in enumerate(pairs)}
        switched: dict[tuple[int, ...], int] = {}
        for key in pairs:
            total = np.abs(self.activity[list(key), 1:]).sum(axis=0)
            free = np.flatnonzero(total == 0) if (total == 0).any() else np.array([total.argmin()])
            switched[key] = int(1 + stream(seed, INTERACTIONS, *key).choice(free))
        return kinds, switched

    def saturate(self, dose: np.ndarray) -> np.ndarray:
        """`sign(d) c (1 - exp(-|d|/c))`: linear for small doses, never beyond the ceiling c."""
        return -np.sign(dose) * self.p.ceiling * np.expm1(-np.abs(dose) / self.p.ceiling)

    def respond(self, key: tuple[int, ...], cells: Background) -> Response:
        """Log-rates of `cells` under a perturbation."""
        noise = np.sqrt(self.p.activity_variance) * cells.noise
        z_nu = noise + self.activity[list(key)].sum(axis=0)
        # Only the background goes through the mixing network, so that effects meet in the log-rate itself.
        log_rate = self.world.mix(cells.z_iota, np.zeros_like(noise), cells.batch) + noise @ self.world.loadings_nu.T
        singles = self.saturate(self.dose[list(key)])
        log_rate += singles.sum(axis=0)
        kind = self.kinds.get(key, "")
        if kind == "saturating":
            log_rate += self.p.interaction * (self.saturate(self.dose[list(key)].sum(axis=0)) - singles.sum(axis=0))
        elif kind == "multiplicative":
            log_rate += self.p.interaction * self.p.synergy * singles[0] * singles[1]
        elif kind == "threshold":
            on = (z_nu[:, 0] > self.p.threshold).astype(float)[:, None]
            program = self.switched[key]
            gained = self.p.switch_effect * self.world.loadings_nu[:, program] - self.p.masking * singles[1]
            log_rate += self.p.interaction * on * gained
            z_nu[:, program] += self.p.interaction * self.p.switch_effect * on[:, 0]
        log_rate[:, self.world.perturbed[list(key)]] += self.p.target_effect
        return Response(log_rate, z_nu)

    def dropout(self, key: tuple[int, ...], rate: np.ndarray) -> np.ndarray:
        """`π(u) exp(-rate / dropout_rate)`: weak counts drop more often."""
        return self.peak_dropout(key) * np.exp(-rate / self.p.dropout_rate)

    def peak_dropout(self, key: tuple[int, ...]) -> float:
        """Dropout of a condition at rate zero: `π(u) = 1 - (1 - dropout/2) Π (1 - π_k)`, so control has the least."""
        return float(1.0 - (1.0 - self.p.dropout / 2) * np.prod(1.0 - self.gene_dropout[list(key)]))

    def planted_rows(self) -> dict[str, np.ndarray]:
        """Summed program activities, before any interaction, and the dropout of every condition."""
        keys = list(self.world.conditions.values())
        return {
            "activity": np.stack([self.activity[list(key)].sum(axis=0) for key in keys]),
            "dropout": np.array([[self.peak_dropout(key)] for key in keys]),
        }

    def planted_labels(self) -> dict[str, list[str]]:
        """The kind of interaction of each double, and the program that a threshold double switches on."""
        keys = list(self.world.conditions.values())
        kinds = [self.kinds.get(key, "") for key in keys]
        switched = [f"program{self.switched[key]:02d}" if kind == "threshold" else "" for key, kind in zip(keys, kinds)]
        return {"interaction": kinds, "switched_program": switched}
