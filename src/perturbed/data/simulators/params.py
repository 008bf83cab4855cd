"""The parameters of the simulators: what a card's `source.params` may hold."""

from __future__ import annotations

from pydantic import ConfigDict, Field, ValidationInfo, field_validator

from perturbed.config import Fraction, Section


class CommonParams(Section):
    """What both generators share: the design, the cells' background, the genes and the counts."""

    model_config = ConfigDict(allow_inf_nan=False)

    # The screen.
    n_genes: int = Field(600, ge=20)
    """Genes measured, the perturbed ones among them."""
    n_perturbed_genes: int = Field(36, ge=2)
    """Genes perturbed; each gives one single perturbation."""
    n_doubles: int = Field(36, ge=0)
    """Double perturbations, pairs of perturbed genes drawn without repeats; both singles are always present."""
    n_cells_per_perturbation: int = Field(80, ge=1)
    """Cells of each single and double perturbation."""
    n_control: int = Field(600, ge=1)
    """Control cells."""
    n_truth_cells: int = Field(2000, ge=100)
    """Further cells per perturbation that the planted expectation averages over; they are never written."""

    # Invariant programs.
    n_states: int = Field(3, ge=1)
    """Cell-state clusters; 1 leaves only continuous variation."""
    d_state: int = Field(3, ge=1)
    """Dimensions of the cell state. Two of the cell cycle and one that goes with depth are added to them."""
    state_separation: float = Field(1.2, ge=0)
    """Standard deviation of the clusters' centres; the spread within a cluster is 0.5."""
    invariant_loading: float = Field(0.30, ge=0)
    """Standard deviation of the genes' loadings on invariant programs, in log-rate per unit of latent."""
    invariant_density: float = Field(0.4, gt=0, le=1)
    """Share of genes that load on an invariant program."""

    # Responsive programs.
    d_nu: int = Field(12, ge=2)
    """Responsive programs. The first is the shared response that every perturbation shifts."""
    gene_set_size: int = Field(50, ge=1)
    """Genes of each responsive program: its planted gene set."""
    responsive_loading: float = Field(0.35, gt=0)
    """Mean size of the loadings within a gene set, in log-rate per unit of latent."""
    shared_effect: float = Field(0.7, ge=0)
    """Mean shift of the shared program by a single perturbation; 0 takes the systematic effect away."""
    effect_size: float = Field(1.0, ge=0)
    """Typical size of a perturbation's shift of the programs it targets."""
    n_targets: int = Field(2, ge=1)
    """Programs, beside the shared one, that a perturbed gene targets."""
    target_effect: float = 1.0
    """Log-fold change of a perturbed gene's own rate: positive as in CRISPRa, negative as in CRISPRi, 0 for none."""

    # Counts.
    expression_sd: float = Field(1.2, ge=0)
    """Standard deviation over genes of the baseline log-rate."""
    depth: float = Field(2500.0, ge=100)
    """Median expected counts of a cell."""
    depth_sd: float = Field(0.35, ge=0, le=1)
    """Standard deviation of the log of a cell's expected counts."""
    depth_correlation: float = Field(0.7, ge=0, le=1)
    """Correlation of log depth with the depth-related invariant program."""
    dispersion: float = Field(6.0, gt=0)
    """Median over genes of the negative binomial's inverse dispersion θ: variance = mean + mean²/θ."""
    dispersion_sd: float = Field(0.5, ge=0)
    """Standard deviation over genes of log θ."""
    n_batches: int = Field(2, ge=0)
    """Batches, to which cells are assigned at random; 0 or 1 gives a single one."""
    batch_sd: float = Field(0.08, ge=0)
    """Standard deviation over genes of a batch's additive shift of the log-rate."""
    hidden: int = Field(32, ge=1)
    """Hidden units of the mixing network."""
    nonlinearity: float = Field(0.25, ge=0)
    """Weight of the mixing network beside the linear loadings; 0 makes the mixing linear in the log-rate."""

    @field_validator("n_perturbed_genes")
    @classmethod
    def _fit_genes(cls, value: int, info: ValidationInfo) -> int:
        return _at_most(value, info.data.get("n_genes"), "n_genes")

    @field_validator("gene_set_size")
    @classmethod
    def _fit_set(cls, value: int, info: ValidationInfo) -> int:
        return _at_most(value, info.data.get("n_genes"), "n_genes")

    @field_validator("n_doubles")
    @classmethod
    def _fit_pairs(cls, value: int, info: ValidationInfo) -> int:
        n = info.data.get("n_perturbed_genes")
        return _at_most(value, None if n is None else n * (n - 1) // 2, "the number of pairs of n_perturbed_genes")

    @field_validator("n_targets")
    @classmethod
    def _fit_targets(cls, value: int, info: ValidationInfo) -> int:
        d_nu = info.data.get("d_nu")
        return _at_most(value, None if d_nu is None else d_nu - 1, "d_nu - 1")

    @property
    def d_iota(self) -> int:
        """Dimensions of the invariant latents: state, two of the cycle, one of depth."""
        return self.d_state + 3


class ScmParams(CommonParams):
    """Parameters of the generator `scm`."""

    edge_density: Fraction = 0.25
    """Share of possible edges among responsive latents that the graph has."""
    edge_weight: float = Field(0.6, ge=0)
    """Mean size of an edge weight; weights lie within ±33 % of it."""
    iota_density: Fraction = 0.15
    """Share of possible edges from invariant to responsive latents."""
    iota_weight: float = Field(0.4, ge=0)
    """Mean size of an edge weight from an invariant to a responsive latent."""
    noise_variance: float = Field(0.10, gt=0)
    """Median variance β of the responsive latents' noise in control cells."""
    edge_change: float = Field(0.5, ge=0)
    """Typical size of a perturbation's change of the edges into the latents it targets."""
    log_variance_change: float = Field(0.4, ge=0)
    """Standard deviation of a perturbation's change of log β of the latents it targets."""


class EpistasisParams(CommonParams):
    """Parameters of the generator `epistasis`; programs are wider and doses larger, since responses saturate."""

    gene_set_size: int = Field(100, ge=1)
    """Genes of each responsive program: its planted gene set."""
    shared_effect: float = Field(1.3, ge=0)
    """Mean shift of the shared program by a single perturbation; 0 takes the systematic effect away."""
    effect_size: float = Field(1.5, ge=0)
    """Typical size of a perturbation's shift of the programs it targets."""
    interaction: float = Field(1.0, ge=0)
    """Weight of all that is not additive in doubles; 0 makes doubles additive in the log-rate."""
    ceiling: float = Field(0.5, gt=0)
    """Largest log-rate effect that a gene's response saturates at."""
    synergy: float = Field(2.0, ge=0)
    """Weight of the product of the two single effects, per unit of log-rate."""
    threshold: float = 2.2
    """Summed shared-program activity above which a cell of a threshold double switches."""
    switch_effect: float = Field(2.0, ge=0)
    """Activity that the switch gives to a program neither gene targets."""
    masking: float = Field(0.7, ge=0, le=1)
    """Share of the second gene's effect that the switch takes away."""
    activity_variance: float = Field(0.10, ge=0)
    """Variance over cells of the activity of a responsive program."""
    idiosyncratic_genes: int = Field(10, ge=0)
    """Genes outside any program's logic that a perturbation changes directly."""
    idiosyncratic_effect: float = Field(0.5, ge=0)
    """Standard deviation of those direct effects, in log-rate."""
    dropout: float = Field(0.10, ge=0, lt=0.5)
    """Mean probability that a perturbation makes a very low count drop to zero; differs between perturbations."""
    dropout_rate: float = Field(3.0, gt=0)
    """Expected count at which dropout has fallen to 1/e."""

    @field_validator("idiosyncratic_genes")
    @classmethod
    def _fit_direct(cls, value: int, info: ValidationInfo) -> int:
        return _at_most(value, info.data.get("n_genes"), "n_genes")


def _at_most(value: int, bound: int | None, name: str) -> int:
    """`bound` is None where the other key is wrong itself, which is reported by its own name."""
    if bound is not None and value > bound:
        raise ValueError(f"{value} is more than {name} ({bound}); lower it")
    return value
