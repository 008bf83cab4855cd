"""Sections of the strict configuration: every key is declared, documented and checked in one of these models.

`perturbed.run_config` joins them to the configuration of a run; dataset cards, method files and studies are sections of
their own modules. The JSON schema (`config/schema.json`) and the reference page (`docs/configuration.md`) are generated
from the models by `perturbed config --write`; a test fails when they drift.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from perturbed.errors import ConfigError, suggest


class Section(BaseModel):
    """Base of every section: unknown keys are refused and values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


Model = TypeVar("Model", bound=BaseModel)


def as_tuple(value: Any) -> Any:
    """A single name or number as a tuple of one, so that configs may leave the brackets out."""
    return (value,) if isinstance(value, str | int) else value


Names = Annotated[tuple[str, ...], BeforeValidator(as_tuple), Field(min_length=1)]
PLAIN_NAME = r"[A-Za-z0-9][A-Za-z0-9_-]*"
"""A name that becomes a folder, a wildcard and a word of a command."""
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]


# --- splits -------------------------------------------------------------------------------------------------------


class _Drawn(Section):
    seed: int = 0
    """Seed of every draw of the split. Change it to see how much the choice of test set matters."""
    methods: tuple[str, ...] | None = None
    """Restrict this split to some of the methods of the run; leave out for all."""
    datasets: tuple[str, ...] | None = None
    """Restrict this split to some of the datasets of the run; leave out for all."""

    @property
    def n_folds(self) -> int:
        """How many folds the split has; known before any data are read."""
        return int(getattr(self, "folds", 1))


class _Split(_Drawn):
    control_test_fraction: Fraction = 0.5
    """Share of control cells kept from training, the reference of the disjoint-control scores. 0 gives all controls
    to training (the paper's choice); the disjoint-control scores are then undefined."""
    val_fraction: Fraction = 0.1
    """Share of the remaining training cells, per condition, set aside for early stopping. 0 when a method must see
    all."""
    train_cells: int | None = Field(None, ge=2)
    """At most so many training cells of each perturbation and context (validation cells not counted), nested for one
    seed: the cells of a smaller number are among those of a larger one. Leave out for all."""
    train_controls: int | None = Field(None, ge=2)
    """The same for control cells."""


class HeldoutCells(_Split):
    """The paper's single test: some cells of well-covered single perturbations are held out."""

    kind: Literal["heldout_cells"]
    perturbations: tuple[str, ...] | None = None
    """The held-out perturbations by name; leave out to draw `n_perturbations` of the singles with enough cells."""
    n_perturbations: int = Field(14, ge=1)
    """How many single perturbations to draw when none are named."""
    n_cells: int = Field(96, ge=2)
    """Cells held out of each."""
    min_cells: int = Field(800, ge=2)
    """A single must have more cells than this to be drawn (the paper's 800)."""


class UnseenSingle(_Split):
    """Single perturbations never seen: genes are held out, with every combination that holds one of them."""

    kind: Literal["unseen_single"]
    folds: int = Field(5, ge=1)
    """k-fold over the perturbed genes; 1 draws one test set of `test_fraction`."""
    test_fraction: Fraction = 0.2
    """Share of genes tested when `folds` is 1."""


class UnseenCombo(_Split):
    """Combinations never seen. `train_fraction` 0 is zero-shot: every combination is tested."""

    kind: Literal["unseen_combo"]
    folds: int = Field(1, ge=1)
    """Repetitions with other draws (`scheme` random), or k of the k-fold (`scheme` kfold)."""
    scheme: Literal["random", "kfold", "gears"] = "random"
    """`random`: a seeded share of the combinations trains. `kfold`: each combination is tested once. `gears`: genes
    are held out too, so that combinations with 0, 1 and 2 seen genes occur (subgroups combo_seen0/1/2)."""
    train_fraction: Fraction = 0.0
    """Share of combinations in training (`scheme` random); 0 is zero-shot."""
    test_gene_fraction: Fraction = 0.25
    """Share of perturbed genes held out (`scheme` gears)."""


class Context(_Split):
    """Transfer across a covariate: in the test contexts only control cells are seen in training."""

    kind: Literal["context"]
    contexts: Names
    """The contexts to test, one fold each."""

    @property
    def n_folds(self) -> int:
        """One fold for each context."""
        return len(self.contexts)


class FromColumn(_Split):
    """The split another study fixed, read from an `obs` column of the data."""

    kind: Literal["from_column"]
    column: str
    """The `obs` column of raw.h5ad that holds the part of each cell; name it in the card's `keys.keep` too."""
    values: dict[str, str] = Field(default_factory=dict)
    """Spelling of the column's values as train, val, test or unused, where they differ."""


class FromFile(_Split):
    """A split.csv made before, or by someone else."""

    kind: Literal["from_file"]
    path: str
    """The file; `{dataset}` and `{fold}` are filled in."""
    folds: int = Field(1, ge=1)
    """Number of files, when `{fold}` stands in the path."""


class RandomCells(_Drawn):
    """Cells at random, whatever their condition, for models whose question is not an unseen perturbation."""

    kind: Literal["random_cells"]
    test_fraction: Fraction = 0.09
    """Share of cells tested, controls among them (the decoder paper's 82 : 9 : 9). Cells of combinations train or
    validate only: a combination that trains is no unseen one."""
    val_fraction: Fraction = 0.09
    """Share of cells set aside for early stopping."""
    stratified: bool = True
    """Take the shares of every condition (perturbation and context); else of all cells together."""
    keep: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(default_factory=dict)
    """Share of the cells of a perturbation that is used at all, by name: `{knockout: 0.1}` keeps a tenth of them and
    leaves the others unused."""


SplitSpec = Annotated[
    HeldoutCells | UnseenSingle | UnseenCombo | Context | FromColumn | FromFile | RandomCells,
    Field(discriminator="kind"),
]


# --- features, evaluation, statistics -----------------------------------------------------------------------------


class FeatureSpec(Section):
    """Genes, scaling and PCA, from training cells only."""

    n_hvg: int | Literal["all"] = 5000
    """Highly variable genes kept; `all` keeps every gene, and is what a source that chose its genes already needs."""
    keep_perturbed: bool = True
    """Keep perturbed genes among the features even where they vary little."""
    keep_genes: tuple[str, ...] = ()
    """Genes, by name or symbol, that are among the features however little they vary, such as those a flow is asked
    about. A dataset without one of them does without it."""
    n_pcs: int = Field(50, ge=2)
    """Principal components for the distribution metrics and the linear models."""
    seed: int = 0
    """Seed of the start vector, where the PCA is iterative (large data)."""


class EvaluationSpec(Section):
    """What is measured, and how many cells the cell-level metrics use."""

    metrics: Annotated[Literal["all"] | Names, Field(union_mode="left_to_right")] = "all"
    """Metrics by name; see `docs/metrics.md`."""
    n_top_de: int = Field(20, ge=1)
    """Genes in the top-DE versions of the metrics."""
    max_cells: int = Field(200, ge=2)
    """Cells per condition, drawn once and seeded, for distribution metrics and differential expression."""
    min_cells: int = Field(2, ge=1)
    """A test condition with fewer cells is scored NaN with this reason."""
    references: bool = True
    """Score floors and ceilings too (technical and interpolated duplicate, truth, noise-free where simulated)."""
    n_halves: int = Field(10, ge=1)
    """Random halves that the technical duplicate averages over."""
    seed: int = 0
    """Seed of the cell draws and halves."""


class StatisticsSpec(Section):
    """How the differences are judged. Fix this before looking at the test scores."""

    primary_metric: str = "pearson_delta_pert"
    """The metric of the primary contrast."""
    primary_method: str = "perturbedvae"
    """The method of the primary contrast."""
    primary_baseline: str = "additive"
    """The baseline of the primary contrast."""
    baselines: Names = ("no_change", "mean_effect", "additive")
    """Every other method is contrasted with each of these."""
    n_bootstrap: int = Field(2000, ge=100)
    """Bootstrap draws over perturbations' genes, nested over seeds."""
    confidence: float = Field(0.95, gt=0.5, lt=1.0)
    """Level of the intervals."""
    n_strata: int = Field(3, ge=1)
    """Effect-size strata."""
    seed: int = 0
    """Seed of the bootstrap."""


# --- reading ------------------------------------------------------------------------------------------------------


def check_plain(key: str, name: str) -> None:
    """Refuse a name that could not stand in a path or a command as it is.

    Raises
    ------
    ConfigError
        Names the key.
    """
    if not re.fullmatch(PLAIN_NAME, name):
        raise ConfigError(f"config: {key}: {name!r} is no usable name; use letters, digits, _ and -")


def with_group(group: str) -> AfterValidator:
    """Validator of a regular expression that must have a group of this name."""

    def check(pattern: str) -> str:
        try:
            groups = re.compile(pattern).groupindex
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression ({error})") from None
        if group not in groups:
            raise ValueError(f"{pattern!r} has no group called {group}; write (?P<{group}>…)")
        return pattern

    return AfterValidator(check)


def find_card(model: type[Model], what: str, name: str, folders: Sequence[str | Path]) -> Model:
    """The file `NAME.yaml` of the first of `folders` that has it.

    Raises
    ------
    ConfigError
        If no folder has it (the line begins with `what`), or it is wrong.
    """
    for folder in folders:
        path = Path(folder) / f"{name}.yaml"
        if path.is_file():
            return parse(model, read_yaml(path), str(path))
    known = [path.stem for folder in folders for path in Path(folder).glob("*.yaml")]
    raise ConfigError(f"{what} for {name!r} in {', '.join(map(str, folders))}; {suggest(name, known)}")


def parse(model: type[Model], value: Any, where: str) -> Model:
    """Validate `value` against a section model.

    Raises
    ------
    ConfigError
        One line that names `where`, the key, what is wrong and, for a misspelt key, the nearest valid one.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise ConfigError(f"{where}: {'; '.join(_explain(model, item) for item in error.errors())}") from None


def _explain(model: type[BaseModel], item: Any) -> str:
    location = [part for part in item["loc"] if not _is_tag(part)]
    key = ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {suggest(str(location[-1]), _valid_keys(model, item['loc']))}"
    if item["type"] in ("union_tag_invalid", "union_tag_not_found"):
        expected = str(item.get("ctx", {}).get("expected_tags", "")) or "a `kind`"
        return f"{key}: `kind` must be one of {expected.replace(chr(39), '')}"
    return f"{key or 'value'}: {item['msg']}"


def _is_tag(part: str | int) -> bool:
    """Pydantic puts a union's tag or branch into the location; a user never wrote it."""
    return isinstance(part, str) and (part in _KINDS or "[" in part or part in ("tuple", "literal", "str", "int"))


_KINDS = {"heldout_cells", "unseen_single", "unseen_combo", "context", "from_column", "from_file", "random_cells"}
_KINDS |= {"url", "path", "simulation", "query", "minified", "h5ad", "published", "fit"}
_KINDS |= {"comparison", "conditions", "sweep", "denoising", "probe", "programs", "identifiability", "latent_map"}


def _valid_keys(model: type[BaseModel], location: tuple[str | int, ...]) -> set[str]:
    """The keys of the section in which the last key of `location` stands."""
    schema = model.model_json_schema(by_alias=True)
    definitions = schema.get("$defs", {})

    def resolve(node: dict[str, Any]) -> dict[str, Any]:
        while "$ref" in node:
            node = definitions[node["$ref"].rsplit("/", 1)[-1]]
        return node

    node = resolve(schema)
    for part in location[:-1]:
        tags = node.get("discriminator", {}).get("mapping", {})
        if part in tags:
            node = resolve({"$ref": tags[part]})
        elif part in node.get("properties", {}):
            node = resolve(node["properties"][part])
        elif isinstance(part, int) and "items" in node:
            node = resolve(node["items"])
        elif isinstance(node.get("additionalProperties"), dict):
            node = resolve(node["additionalProperties"])
        for branch in node.get("anyOf", []):
            if resolve(branch).get("type") in ("object", "array"):
                node = resolve(branch)
    return set(node.get("properties", {}))


# Every job of a run reads some thirty files; the loader in C is ten times as fast and as safe.
_SAFE_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises
    ------
    ConfigError
        If the file is missing, is no YAML, or holds no mapping.
    """
    try:
        value = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_SAFE_LOADER)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: holds no text; correct the path") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold a mapping of keys to values")
    return value
