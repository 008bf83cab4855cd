"""The class `PerturbedVAE` on planted latents, beside the study's own estimator."""

from __future__ import annotations

from functools import partial

import numpy as np

from perturbed.figures.identifiability import draw
from perturbed.interpret import identifiability_class
from perturbed.interpret.identifiability import run_setting
from perturbed.interpret.identifiability_class import ARMS, fit_class
from perturbed.interpret.identifiability_spec import EstimatorOptions, IdentifiabilitySetting, LatentWorldOptions
from perturbed.interpret.latent_simulation import TRAIN, LatentWorld
from perturbed.models.perturbedvae import PerturbedVAEParams

SMALL = LatentWorldOptions(n_genes=60, mixing_width=48)


def test_the_class_that_predicts_real_cells_is_scored_beside_the_estimator(monkeypatch) -> None:
    monkeypatch.setattr(identifiability_class, "PerturbedVAEParams", partial(PerturbedVAEParams, epochs=4))
    small = SMALL.model_copy(update={"n_train": 360, "n_test": 120})
    setting = IdentifiabilitySetting(
        name="base",
        factor="base",
        level="base",
        world=small,
        estimator=EstimatorOptions(),
        arms=(),
        perturbedvae_class=True,
    )
    found = run_setting(setting, 0)
    names = ("perturbedvae_class", "perturbedvae_class_rotated", "perturbedvae_class_targets")
    scored = found[found["arm"] != "none"]
    assert set(zip(scored["arm"], scored["estimator"])) == {(arm, name) for arm in ARMS for name in names}
    assert np.isfinite(scored["value"]).all() and len(scored) == 3 * 3 * 5
    draw(found)


def test_the_class_is_fitted_as_it_stands_to_cells_and_partners(monkeypatch) -> None:
    monkeypatch.setattr(identifiability_class, "PerturbedVAEParams", partial(PerturbedVAEParams, epochs=2))
    cells = LatentWorld(SMALL, 0).draw(TRAIN, 60)
    fits = dict(fit_class(cells, (4, 7), seed=0, device="cpu"))
    assert [fit.method.params.alpha for fit in fits.values()] == [0.05, 0.05, 0]
    assert [fit.method.params.partners for fit in fits.values()] == ["random", "matched_pca", "random"]
    for fit in fits.values():
        defaults = PerturbedVAEParams(n_nu=4, n_iota=7, epochs=2).model_dump()
        changed = {key for key, value in fit.method.params.model_dump().items() if value != defaults[key]}
        assert changed <= {"alpha", "partners", "n_control"}
        assert len(fit.method.perturbed) == 11
        here, there = fit.encode(cells.x, cells.environment), fit.encode(cells.x, np.roll(cells.environment, 1))
        assert not np.array_equal(here[0], there[0]) and np.array_equal(here[1], there[1])
