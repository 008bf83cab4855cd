"""GEARS, the published package, behind our door; it runs in the environment `.envs/gears`.

The network, its losses, its pairing of cells with controls and its training loop are the package's own, untouched. What
it would fetch from the web or leave on disk is replaced: the graph of genes comes from a file, and what it must write
lies in a folder that is removed with the fit.
"""

from __future__ import annotations

import logging
import pickle
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field
from torch import Tensor

from perturbed.config import Section
from perturbed.errors import MethodError, UnseenPerturbationError
from perturbed.models.base import FitRun, Method, TrainingData
from perturbed.models.gears_inputs import MOST_GENES, gears_label, graph_tensors, read_gene_graph
from perturbed.names import CONTROL, genes_of

log = logging.getLogger(__name__)

N_DRAWN = 300
"""Control cells that the package draws for a prediction, and puts through its network as one batch."""


class GearsParams(Section):
    """Hyper-parameters of GEARS, with the package's defaults."""

    hidden_size: int = Field(64, ge=1)
    """Width of every embedding and hidden layer."""
    n_graph_layers: int = Field(1, ge=1)
    """Layers of the graph network over the gene graph."""
    n_coexpression_layers: int = Field(1, ge=1)
    """Layers of the graph network over the co-expression graph of the training cells."""
    n_neighbours: int = Field(20, ge=1)
    """Strongest edges into a gene that are kept of the gene graph, and of the co-expression graph."""
    coexpression_threshold: float = Field(0.4, ge=0, le=1)
    """Absolute correlation above which two genes are joined in the co-expression graph."""
    direction_weight: float = Field(0.1, ge=0)
    """Weight of the loss on the direction of change."""
    epochs: int = Field(20, ge=1)
    """Passes over the training cells; the learning rate halves after each, so that more than ten change little."""
    batch_size: int = Field(32, ge=2)
    """Cells per step; no more than there are training cells."""
    lr: float = Field(1e-3, gt=0)
    """Learning rate of Adam in the first epoch."""
    weight_decay: float = Field(5e-4, ge=0)
    """Weight decay of Adam."""


class Gears(Method):
    """GEARS (Roohani et al. 2023).

    A perturbed gene's embedding is averaged over a graph of genes, so that genes never perturbed can be predicted, if
    the graph has them. The prediction is `x + f(genes)`: f does not depend on the control cell x, so that the mean over
    control cells is taken exactly, where the package averages 300 cells drawn with replacement.

    The package's co-expression graph reaches the first cell of each batch only, in training as in prediction, since its
    edges are never repeated for the others. What is predicted here is the package's own mean, of one such cell and 299
    without.
    """

    Params = GearsParams
    stochastic = True
    params: GearsParams

    def __init__(self, params: Section | None = None) -> None:
        super().__init__(params)
        self._genes: tuple[str, ...] = ()
        self._nodes: tuple[str, ...] = ()
        self._contexts: tuple[str, ...] = ()
        self._state: dict[str, Tensor] = {}
        self._model: Any = None

    # --- fitting ----------------------------------------------------------------------------------------------------

    def check(self, data: TrainingData) -> None:
        """Refuse data that GEARS cannot name or place on its graph.

        Raises
        ------
        MethodError
            If there are several contexts, a condition of more than two genes, no gene graph, or nothing to train on.
        """
        super().check(data)
        if len(set(data.context)) > 1:
            raise MethodError(f"GEARS knows one context only, these data have {len(set(data.context))}")
        for name in sorted(set(data.perturbation)):
            gears_label(name)
        self.require_file(data, "gene_graph")

    def fit(self, data: TrainingData, run: FitRun) -> None:
        """Train with the package's own loop; the weights of the epoch with the least validation error are kept.

        Cells of perturbations with a gene that the graph lacks are left out, as the package does; the log names them.

        Raises
        ------
        MethodError
            As `check`; or if the package is not installed, or a perturbation has a single training cell.
        """
        self.check(data)
        graph = read_gene_graph(self.require_file(data, "gene_graph"), self.params.n_neighbours)
        self._genes, self._contexts = tuple(data.genes), tuple(sorted(set(data.context)))
        self._nodes = tuple(sorted(set(graph["source"]) | set(graph["target"])))
        keep = _on_graph(data.perturbation, self._nodes)
        gears = import_gears()
        with _seeded(run.seed), _as_the_package_needs(), tempfile.TemporaryDirectory(prefix="gears-") as folder:
            cells = _PertCells(gears, data, keep, self._nodes, Path(folder), self.params.batch_size, run.seed)
            trainer = gears.GEARS(cells.pert_data, device=run.device)
            go_edges, go_weights = graph_tensors(graph, self._nodes)
            trainer.model_initialize(**self._architecture(), G_go=go_edges, G_go_weight=go_weights)
            trainer.train(epochs=self.params.epochs, lr=self.params.lr, weight_decay=self.params.weight_decay)
        names = ("G_go", "G_go_weight", "G_coexpress", "G_coexpress_weight")
        self._state = {f"graph.{name}": trainer.config[name].cpu() for name in names}
        self._state |= {f"model.{key}": value.cpu() for key, value in trainer.best_model.state_dict().items()}
        # every control cell counts, validation too: no weight was learned from them
        control = data.X[np.flatnonzero(data.perturbation == CONTROL)].mean(axis=0, dtype=np.float64)
        self._state["control"] = torch.from_numpy(np.asarray(control, dtype=np.float32).ravel())
        self._model = None

    def _architecture(self) -> dict[str, Any]:
        p = self.params
        return {
            "hidden_size": p.hidden_size,
            "num_go_gnn_layers": p.n_graph_layers,
            "num_gene_gnn_layers": p.n_coexpression_layers,
            "num_similar_genes_co_express_graph": p.n_neighbours,
            "coexpress_threshold": p.coexpression_threshold,
            "direction_lambda": p.direction_weight,
        }

    # --- predicting -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict_one(self, perturbation: str, context: str, *, seed: int = 0) -> dict[str, np.ndarray]:
        """Mean expression; nothing in it is drawn.

        Raises
        ------
        UnseenPerturbationError
            If a gene is not in the gene graph, or there are more than two.
        MethodError
            If the context was not in training.
        """
        if context not in self._contexts:
            raise MethodError(f"context {context!r} was not in training; known: {', '.join(self._contexts)}")
        genes = genes_of(perturbation)
        if len(genes) > MOST_GENES:
            raise UnseenPerturbationError(f"GEARS predicts one or two genes, {perturbation} has {len(genes)}")
        missing = [gene for gene in genes if gene not in self._nodes]
        if missing:
            raise UnseenPerturbationError(f"{', '.join(missing)}: not in the gene graph that GEARS was given")
        control = self._state["control"]
        if not genes:
            return {"mean": control.numpy()}
        from torch_geometric.data import Batch, Data  # type: ignore[import-not-found, unused-ignore]

        cell = Data(x=control.unsqueeze(1), pert_idx=[self._nodes.index(gene) for gene in sorted(genes)])
        first, other = self._restored()(Batch.from_data_list([cell, cell]))
        mean = (first.double() + (N_DRAWN - 1) * other.double()) / N_DRAWN
        return {"mean": mean.numpy().astype(np.float32)}

    def _restored(self) -> Any:
        """The package's network with the fitted weights."""
        if self._model is None:
            import_gears()
            from gears.model import GEARS_Model  # type: ignore[import-not-found, unused-ignore]

            graph = {key.removeprefix("graph."): v for key, v in self._state.items() if key.startswith("graph.")}
            sizes = {"num_genes": len(self._genes), "num_perts": len(self._nodes)}
            fixed = {"decoder_hidden_size": 16, "uncertainty": False, "no_perturb": False, "device": "cpu"}
            with _seeded(0):  # initial weights are drawn, then replaced
                model = GEARS_Model({**self._architecture(), **graph, **sizes, **fixed})
            weights = {key.removeprefix("model."): v for key, v in self._state.items() if key.startswith("model.")}
            model.load_state_dict(weights)
            self._model = model.eval()
        return self._model

    # --- keeping ----------------------------------------------------------------------------------------------------

    @property
    def genes(self) -> tuple[str, ...]:
        """Gene names of the predictions."""
        return self._genes

    def state(self) -> dict[str, Tensor]:
        """Weights, both graphs and the control mean."""
        return dict(self._state)

    def meta(self) -> dict[str, Any]:
        """Names of genes, of the graph's nodes and of contexts."""
        return {"genes": self._genes, "nodes": self._nodes, "contexts": self._contexts}

    def load_state(self, state: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Restore a fitted model."""
        self._genes, self._nodes = tuple(meta["genes"]), tuple(meta["nodes"])
        self._contexts, self._state, self._model = tuple(meta["contexts"]), dict(state), None


def _on_graph(perturbation: np.ndarray, nodes: Sequence[str]) -> np.ndarray:
    """Which cells are of a perturbation whose genes are all on the graph."""
    known = set(nodes)
    names = sorted(set(perturbation))
    out = [name for name in names if not known.issuperset(genes_of(name))]
    if len(out) == len(set(names) - {CONTROL}):
        raise MethodError(f"gene graph: holds no perturbed gene of these data, such as {out[0] if out else 'any'!r}")
    if out:
        log.warning("GEARS trains without %s: not in the gene graph", ", ".join(out))
    return ~np.isin(perturbation, out)


# --- the package ------------------------------------------------------------------------------------------------------


def import_gears() -> ModuleType:
    """The package, without what its import does to warnings and to torch's generator.

    Raises
    ------
    MethodError
        If it is not installed.
    """
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            import gears  # type: ignore[import-not-found, unused-ignore]
    except ModuleNotFoundError as error:
        raise MethodError(
            f"GEARS runs in an environment of its own ({error.name} is missing here); make it with "
            "`envs/environment.sh gears` and run `.envs/gears/bin/perturbed`"
        ) from None
    return gears  # type: ignore[no-any-return, unused-ignore]


class _PertCells:
    """Training cells as the package wants them: its `PertData` with our cells, our graph's genes and our split."""

    def __init__(
        self,
        gears: ModuleType,
        data: TrainingData,
        keep: np.ndarray,
        nodes: Sequence[str],
        folder: Path,
        batch_size: int,
        seed: int,
    ) -> None:
        # PertData downloads gene ontology terms unless this file is there; it takes from it which genes the graph has
        (folder / "gene2go_all.pkl").write_bytes(pickle.dumps({gene: set() for gene in nodes}))
        (folder / "nodes.pkl").write_bytes(pickle.dumps(list(nodes)))
        train, val = (_as_anndata(data, keep & part) for part in (~data.is_val, data.is_val))
        few = train.obs["condition"].value_counts()
        if few.min() < 2:
            raise MethodError(
                f"GEARS ranks the genes of each perturbation and needs two training cells of it; {few.idxmin()} has one"
            )
        self.pert_data = cells = gears.PertData(str(folder), gene_set_path=str(folder / "nodes.pkl"))
        cells.new_data_process(dataset_name="cells", adata=train)
        cells.split, cells.seed = "no_test", seed  # only part of a file name from here on
        cells.set2conditions = {"train": train.obs["condition"].unique().tolist()}
        cells.node_map = {gene: i for i, gene in enumerate(data.genes)}
        graphs = {"train": [graph for part in cells.dataset_processed.values() for graph in part]}
        graphs["val"] = self._validation_graphs(val) if val.n_obs else graphs["train"]
        from torch_geometric.loader import DataLoader  # type: ignore[import-not-found, unused-ignore]

        size = min(batch_size, len(graphs["train"]))
        cells.dataloader = {
            "train_loader": DataLoader(graphs["train"], batch_size=size, shuffle=True, drop_last=True),
            "val_loader": DataLoader(graphs["val"], batch_size=size, shuffle=False),
        }

    def _validation_graphs(self, val: Any) -> list[Any]:
        """Graphs of validation cells, with the training cells' names and differential genes."""
        cells = self.pert_data
        table = cells.adata.obs.drop_duplicates("condition").set_index("condition")["condition_name"].astype(str)
        val = val[val.obs["condition"].isin(table.index)].copy()  # a condition that only validates has no ranking
        val.obs["condition_name"] = val.obs["condition"].map(table)
        val.uns["rank_genes_groups_cov_all"] = cells.adata.uns["rank_genes_groups_cov_all"]
        conditions = val.obs["condition"].unique()
        return [graph for name in conditions for graph in cells.create_cell_graph_dataset(val, name)]


def _as_anndata(data: TrainingData, rows: np.ndarray) -> Any:
    from anndata import AnnData

    chosen = np.flatnonzero(rows)
    obs = pd.DataFrame(
        {"condition": [gears_label(name) for name in data.perturbation[chosen]], "cell_type": "cells"},
        index=pd.Index([f"cell{row}" for row in chosen], dtype=str),
    )
    var = pd.DataFrame({"gene_name": list(data.genes)}, index=pd.Index(data.genes, dtype=str))
    return AnnData(data.X[chosen].astype(np.float32), obs=obs, var=var)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators, which the package draws from, and put them back."""
    before = np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            np.random.set_state(before)  # noqa: NPY002


@contextmanager
def _as_the_package_needs() -> Iterator[None]:
    """Lend pandas' Series the method through which scipy, since 1.15, reads a mask: the package indexes with Series.

    Its warnings about its own age are kept from the log meanwhile.
    """
    pd.Series.nonzero = lambda series: series.to_numpy().nonzero()  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        del pd.Series.nonzero  # type: ignore[attr-defined]
