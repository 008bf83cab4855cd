"""Options of the identifiability study and the settings it expands to; needs no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from perturbed.config import Section
from perturbed.errors import ConfigError

Arm = Literal["aligned", "penalty_only", "start_only", "unaligned"]
"""What a fit knows of the pairs: `aligned` begins where pairs agree and is penalised where they do not, `penalty_only`
begins at principal components, `start_only` is not penalised, `unaligned` knows nothing of them."""


class LatentWorldOptions(Section):
    """A world in which the theory's assumptions hold, or one of them is broken."""

    n_genes: int = Field(500, ge=2)
    """Observed dimensions of x (paper: 500)."""
    d_nu: int = Field(4, ge=2)
    """Responsive latents z_ν (paper: 4)."""
    d_iota: int = Field(7, ge=2)
    """Invariant latents z_ι (paper: 7)."""
    n_environments: int = Field(12, ge=3)
    """Environments, control among them (paper: 12). The theory asks for at least 2 d_nu + 1."""
    n_train: int = Field(3000, ge=50)
    """Training cells over all environments (paper: 3,000), each with a control partner. A tenth of them validates."""
    n_test: int = Field(1000, ge=50)
    """Test cells over all environments (paper: 1,000)."""
    noise: float = Field(0.0, ge=0)
    """Standard deviation of Gaussian noise on x, whose genes have a standard deviation of about 0.7. The theory has
    none; raise it to break assumption (i)."""
    edge_density: float = Field(0.5, ge=0, le=1)
    """Share of the possible edges among the responsive latents that exist. Every z_ι is a parent of every z_ν."""
    n_layers: int = Field(2, ge=2, le=3)
    """Layers of the LeakyReLU mixing; more bend x further away from linear."""
    mixing_width: int = Field(64, ge=2)
    """Width of its hidden layers, at least d_nu + d_iota, or g could not be inverted. A wide layer is easy to invert
    linearly, a narrow one is not."""
    parents_removed: bool = True
    """Assumption (iv): environment e removes all parents of latent e mod d_nu. `false` breaks it."""
    shared_noise: bool = True
    """Assumption (iii): a cell and its control partner share their background noise. `false` breaks it."""

    @model_validator(mode="after")
    def _check_mixing(self) -> LatentWorldOptions:
        n_latents = self.d_nu + self.d_iota
        if self.n_genes < n_latents:
            raise ValueError(f"n_genes {self.n_genes} cannot show {n_latents} latents; take at least {n_latents}")
        if not n_latents <= self.mixing_width <= self.n_genes:
            raise ValueError(
                f"mixing_width {self.mixing_width} cannot be inverted; "
                f"take {n_latents} (all latents) to {self.n_genes} (all genes)"
            )
        return self


class EstimatorOptions(Section):
    """How PerturbedVAE is fitted to that world."""

    n_hidden: int = Field(128, ge=1)
    """Width of the hidden layers of encoder and decoder."""
    n_hidden_layers: int = Field(2, ge=1)
    """Hidden layers of each."""
    n_components: int = Field(64, ge=2)
    """Principal components of x, fitted on training cells, that the network reads and writes. A mixing of width 64
    fills no more than 64, so that nothing is lost by default."""
    alpha: float = Field(25.0, ge=0)
    """Weight of the alignment in the arms that have it. The paper's 0.05 belongs to a loss averaged over genes;
    beside an ELBO that sums over 500 of them, that is 25."""
    posterior_sees_condition: bool = False
    """Whether the condition enters q(z_ν | x, u), as in the paper. Where x determines z the exact posterior ignores
    u, and both score alike."""
    lr: float = Field(2e-3, gt=0)
    """Learning rate; falls linearly to a hundredth."""
    batch_size: int = Field(256, ge=2)
    """Cells per step, each with its partner."""
    steps: int = Field(1000, ge=1)
    """Steps of each fit, whatever the number of cells."""
    warm_up: float = Field(0.1, ge=0, lt=1)
    """Share of the training over which KL terms and alignment are phased in."""
    restarts: int = Field(2, ge=1)
    """Fits with other random weights and draws; the lowest validation loss is kept, never the best score."""


class IdentifiabilitySetting(Section):
    """One world and one estimator."""

    name: str
    """Name of the setting."""
    factor: str
    """What differs from the base setting; `base` for that itself."""
    level: str
    """Value of that factor."""
    world: LatentWorldOptions
    """The world."""
    estimator: EstimatorOptions
    """The estimator."""
    arms: tuple[Arm, ...] = ("aligned", "unaligned")
    """Fits with and without the alignment."""
    perturbedvae_class: bool = False
    """Also fit the class that predicts real cells; see the study's option."""
    plain_vae: bool = False
    """Also fit a plain VAE as a floor; its one standard normal prior knows no environments."""


class IdentifiabilityStudy(Section):
    """The base setting and the settings that differ from it in one factor."""

    world: LatentWorldOptions = LatentWorldOptions()
    """The base world."""
    estimator: EstimatorOptions = EstimatorOptions()
    """The base estimator."""
    base_arms: tuple[Arm, ...] = Field(("aligned", "penalty_only", "start_only", "unaligned"), min_length=1)
    """Fits in the base setting."""
    arms: tuple[Arm, ...] = Field(("aligned", "unaligned"), min_length=1)
    """Fits in the other settings."""
    perturbedvae_class: bool = False
    """Also fit the class `PerturbedVAE`, which predicts real cells, in the base setting: its defaults, with random
    partners, with matched ones, and without alignment. Three fits more for each seed."""
    environments: tuple[int, ...] = (4, 8, 24)
    """Other numbers of environments."""
    cells: tuple[int, ...] = (750, 1500, 12000)
    """Other numbers of training cells."""
    noise: tuple[float, ...] = (0.05, 0.2, 0.5)
    """Other standard deviations of noise on x."""
    layers: tuple[int, ...] = ()
    """Other depths of the mixing."""
    breaks: tuple[Literal["parents_kept", "partners_unrelated", "posterior_sees_condition"], ...] = (
        "parents_kept",
        "partners_unrelated",
        "posterior_sees_condition",
    )
    """Assumptions (iv) and (iii) broken, and the posterior with the condition in it."""


_BREAKS: dict[str, tuple[dict[str, bool], dict[str, bool]]] = {
    "parents_kept": ({"parents_removed": False}, {}),
    "partners_unrelated": ({"shared_noise": False}, {}),
    "posterior_sees_condition": ({}, {"posterior_sees_condition": True}),
}


def expand(study: IdentifiabilityStudy) -> dict[str, IdentifiabilitySetting]:
    """Name every setting of a study, the base setting first and then one factor at a time.

    Raises
    ------
    ConfigError
        If two settings have one name.
    """
    settings: dict[str, IdentifiabilitySetting] = {}

    def add(factor: str, level: str, world: dict[str, object], estimator: dict[str, object]) -> None:
        name = factor if factor in ("base", level) else f"{factor}_{level}"
        if name in settings:
            raise ConfigError(f"identifiability: setting {name!r} occurs twice; name every level once")
        changed = LatentWorldOptions.model_validate({**study.world.model_dump(), **world})
        settings[name] = IdentifiabilitySetting(
            name=name,
            factor=factor,
            level=level,
            world=changed,
            estimator=EstimatorOptions.model_validate({**study.estimator.model_dump(), **estimator}),
            arms=study.base_arms if factor == "base" else study.arms,
            perturbedvae_class=study.perturbedvae_class and factor == "base",
            plain_vae=factor == "base",
        )

    add("base", "base", {}, {})
    for factor, key, levels in (
        ("environments", "n_environments", study.environments),
        ("cells", "n_train", study.cells),
        ("noise", "noise", study.noise),
        ("layers", "n_layers", study.layers),
    ):
        for level in levels:
            add(factor, f"{level:g}", {key: level}, {})
    for name in study.breaks:
        add(name, name, dict(_BREAKS[name][0]), dict(_BREAKS[name][1]))
    return settings
