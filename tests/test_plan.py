"""The grid, and that each slice holds what a rule depends on and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from perturbed.answers import where_answered
from perturbed.config import read_yaml
from perturbed.evaluation.studies import read_published
from perturbed.models.base import build, method_class
from perturbed.models.spec import load_method_spec
from perturbed.plan import Plan
from perturbed.study_config import PAPER_A
from perturbed.study_plan import spell_item

ROOT = Path(__file__).parents[1]
HERE = SimpleNamespace(dataset="simulation", split="zero_shot", fold="0", method="perturbedvae", seed="0")


@pytest.fixture(autouse=True)
def at_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_methods_without_randomness_run_once():
    jobs = list(Plan({"dataset": "simulation", "methods": ["additive", "perturbedvae"], "seeds": [0, 1, 2]}).jobs())
    assert [(job.method, job.seed) for job in jobs] == [
        ("additive", 0),
        *[("perturbedvae", seed) for seed in (0, 1, 2)],
    ]


def test_folds_and_methods_of_a_split():
    splits = {
        "a": {"kind": "unseen_combo", "folds": 3, "methods": ["additive"]},
        "b": {"kind": "context", "contexts": ["x", "y"]},
    }
    jobs = list(Plan({"dataset": "simulation", "methods": ["additive", "no_change"], "splits": splits}).jobs())
    assert sum(job.split == "a" for job in jobs) == 3
    assert sum(job.split == "b" for job in jobs) == 4


def test_slices_hold_only_what_is_used():
    plan = Plan({"method_params": {"perturbedvae": {"epochs": 3}}})
    other = Plan({"method_params": {"perturbedvae": {"epochs": 4}}, "statistics": {"n_bootstrap": 500}})
    assert json.loads(plan.method_slice(HERE))["params"]["epochs"] == 3
    assert plan.method_slice(HERE) != other.method_slice(HERE)
    assert plan.split_slice(HERE) == other.split_slice(HERE)
    assert plan.section("evaluation") == other.section("evaluation")
    assert plan.section("statistics") != other.section("statistics")
    additive = SimpleNamespace(**{**vars(HERE), "method": "additive"})
    assert plan.method_slice(additive) == other.method_slice(additive)


def test_which_methods_run_on_a_split_changes_no_split():
    one = Plan({"splits": {"zero_shot": {"kind": "unseen_combo", "methods": ["additive"]}}})
    assert one.split_slice(HERE) == Plan({"splits": {"zero_shot": {"kind": "unseen_combo"}}}).split_slice(HERE)


@pytest.mark.parametrize("path", sorted(ROOT.glob("config/methods/*.yaml")), ids=lambda path: path.stem)
def test_a_method_file_says_what_its_class_says(path):
    spec = load_method_spec(path.stem, [path.parent])
    assert spec.stochastic == method_class(spec).stochastic


# --- studies ------------------------------------------------------------------------------------------------------

SWEEP = {
    "kind": "sweep",
    "title": "t",
    "answers": ["paper_a_table13"],
    "splits": ["zero_shot"],
    "factor": "alpha",
    "levels": {"unaligned": 0, "perturbedvae": 0.05},
    "metrics": ["rmse"],
    "history": ["kl_iota"],
}
WITH_STUDY = {
    "dataset": ["simulation", "norman2019_combo1000"],
    "methods": ["mean_effect"],
    "seeds": [0, 1],
    "splits": {"zero_shot": {"kind": "unseen_combo", "folds": 2}, "other": {"kind": "unseen_combo"}},
    "variants": {"unaligned": {"method": "perturbedvae", "params": {"alpha": 0}}},
    "studies": {"alignment": SWEEP},
}


def test_a_study_adds_its_own_fits_and_no_others():
    jobs = list(Plan(WITH_STUDY).jobs())
    benchmark = [job for job in jobs if job.method == "mean_effect"]
    added = [job for job in jobs if job.method != "mean_effect"]
    assert len(benchmark) == 2 * (2 + 1)
    assert len(added) == 2 * 2 * 2 * 2  # datasets, folds, levels, seeds
    assert {job.split for job in added} == {"zero_shot"}
    assert len(set(jobs)) == len(jobs)


def test_the_seeds_of_a_slow_method_and_of_its_variants_are_limited():
    plan = Plan({**WITH_STUDY, "method_seeds": {"perturbedvae": 1}})
    assert {job.seed for job in plan.jobs() if job.method in ("perturbedvae", "unaligned")} == {0}


def test_a_study_reads_its_own_scores_the_floors_and_the_references():
    plan = Plan({**WITH_STUDY, "dataset": "simulation"})
    files = plan.studies.score_files(SimpleNamespace(study="alignment"))
    methods = {Path(path).parts[-3] for path in files if path.endswith("/scores.parquet")}
    assert methods == {"unaligned", "perturbedvae", "mean_effect"}
    assert sum(path.endswith("references.parquet") for path in files) == 2
    histories = plan.studies.history_files(SimpleNamespace(study="alignment"))
    assert len(histories) == 2 * 2 * 2 and all("mean_effect" not in path for path in histories)


def test_titles_and_answers_do_not_make_a_table_anew_but_the_order_of_levels_does():
    here = SimpleNamespace(study="alignment")

    def slice_of(**changes):
        return Plan({**WITH_STUDY, "studies": {"alignment": {**SWEEP, **changes}}}).studies.slice(here)

    assert slice_of() == slice_of(title="other", answers=[])
    assert slice_of() != slice_of(levels={"perturbedvae": 0.05, "unaligned": 0})
    assert slice_of() != slice_of(metrics=["l2_delta"])


def test_methods_that_cannot_run_are_left_out_by_name_where_they_were_wanted():
    study = {**SWEEP, "kind": "comparison", "methods": ["additive", "svae_plus"], "datasets": ["norman2019_combo1000"]}
    for key in ("levels", "factor", "history"):
        del study[key]
    plan = Plan({**WITH_STUDY, "studies": {"counts": study}})
    reason = "needs counts; norman2019_combo1000 has none (keys.counts is null)"
    assert plan.left_out() == [f"svae_plus is left out on norman2019_combo1000 (paper_a_table13): {reason}"]
    assert {job.method for job in plan.studies.jobs("counts")} == {"additive"}
    assert plan.studies.spell_left_out(SimpleNamespace(study="counts")) == f"sVAE+ on norman2019_combo1000 ({reason})"


def test_an_item_may_be_answered_by_several_studies():
    both = {name: {**SWEEP, "title": name} for name in ("first", "second")}
    plan = Plan({**WITH_STUDY, "studies": both})
    assert plan.studies.answers["paper_a_table13"] == ["first", "second"]
    assert len(plan.studies.figures(plan.studies.answers["paper_a_table13"])) == 2


def test_a_variant_with_a_file_of_its_own_takes_part_once_the_file_is_there(tmp_path):
    file = tmp_path / "{dataset}" / "uce.csv"
    study = {
        "kind": "probe",
        "title": "t",
        "dataset": "simulation",
        "split": "zero_shot",
        "methods": ["perturbedvae", "uce"],
    }
    config = {
        "dataset": "simulation",
        "methods": ["mean_effect"],
        "variants": {"uce": {"method": "embedding_cells", "files": {"cell_embedding": str(file)}}},
        "studies": {"probe": study},
    }
    there = str(file).replace("{dataset}", "simulation")
    plan = Plan(config)
    assert plan.left_out() == [
        f"uce is left out on simulation (study probe): needs cell embedding; {there} is not there"
    ]
    assert plan.tabulate_capabilities().set_index("method").loc["uce", "reason"].endswith(f"{there} is not there")
    Path(there).parent.mkdir()
    Path(there).write_text("cell,d0\n")
    plan = Plan(config)
    assert plan.left_out() == []
    assert plan.side.options(SimpleNamespace(dataset="simulation", method="uce")) == f"--file cell_embedding={there}"
    assert plan.studies.model_input(SimpleNamespace(study="probe"))["files"] == [there]


def test_gene_sets_by_their_card_and_a_graph_by_its_address_are_made_by_rules():
    plan = Plan(read_yaml("config/paper.yaml"))
    sena, gears = (SimpleNamespace(dataset="norman2019_paper", method=name) for name in ("sena", "gears"))
    assert plan.side.input(sena) == ["data/norman2019_paper/gene_sets/go_bp_human.gmt"]
    assert plan.side.input(gears) == ["data/norman2019_paper/gene_graph.csv"]
    assert set(plan.side.libraries) == {"go_bp_human"}
    assert plan.studies.truth_input(SimpleNamespace(study="programs"))["gene_sets"] == plan.side.input(sena)[0]
    planted = SimpleNamespace(dataset="simulation", method="sena")
    assert plan.side.input(planted) == ["data/simulation/gene_sets.gmt"]


# --- the full-size config -----------------------------------------------------------------------------------------

NEEDS_A_FILE = {"embedding", "embedding_cells", "uce", "scfoundation", "geneformer", "state"}
"""Heads on embeddings that no address serves: users make the files, and the head takes part once they are there."""
RIVALS = {
    "paper_a_fig1": {"perturbedvae", "scvi_additive", "uce", "scfoundation", "geneformer", "state"},
    "paper_a_fig10": {"perturbedvae"},
    "paper_a_fig11": {"perturbedvae"},
    "paper_a_table3": {"mean_effect"},
    "paper_a_table4": {"svae_plus", "svae_plus_gaussian", "sams_vae", "sams_vae_gaussian", "additive"},
    "paper_a_table10": {"additive"},
    "paper_a_appendix_i": {"perturbedvae"},
    **{f"paper_a_{item}": {"perturbedvae"} for item in ("fig5", "fig7", "fig8", "table8", "table9")},
}
"""Rivals of items beside those with a published number; the trivial ones are ours."""


def planned_methods(plan: Plan, item: str) -> set[str]:
    """Methods, and levels of sweeps, that the studies behind an item plan to fit."""
    found = set()
    for name in plan.studies.answers[item]:
        study = plan.studies.studies[name]
        found |= {job.method for job in plan.studies.jobs(name)} if study.kind != "identifiability" else set()
        found |= {str(level) for level in getattr(study, "levels", {}).values()}
    return found


@pytest.mark.parametrize("item", PAPER_A)
def test_the_full_size_config_plans_every_rival_of_the_paper(item):
    plan = Plan(read_yaml("config/paper.yaml"))
    published = read_published(Path("config/published/paper_a.csv"))
    rows = published[published["item"] == item]
    rivals = {*rows["method"], *RIVALS.get(item, ())}
    assert rivals or item == "paper_a_table1", "no rival is known: name them in RIVALS"
    missing = rivals - planned_methods(plan, item)
    assert missing <= NEEDS_A_FILE
    named = {method for name in plan.studies.answers[item] for method, _ in plan.studies.wanted(name)}
    assert missing <= named
    lines = [line for line in plan.left_out() if item in line]
    assert {line.partition(" ")[0] for line in lines} & rivals == missing
    splits = {split for name in plan.studies.answers[item] for _, split in plan.studies.pages(name)}
    assert set(rows["split"]) <= splits


def test_the_full_size_config_has_the_published_values():
    """Defaults of the classes are the published ones, and the methods' files are for smaller screens."""
    plan = Plan(read_yaml("config/paper.yaml"))
    keys = ("n_latent", "n_hidden", "n_hidden_layers", "lr", "batch_size", "max_steps", "epochs", "patience")
    for name in ("sams_vae", "sams_vae_gaussian", "svae_plus", "svae_plus_gaussian"):
        spec = plan.methods[name]
        published, ours = method_class(spec).Params(), build(spec).params
        assert {key: getattr(ours, key) for key in keys} == {key: getattr(published, key) for key in keys}, name
        assert (ours.n_latent, ours.n_hidden, ours.lr, ours.batch_size, ours.max_steps) == (200, 400, 3e-4, 512, 30_000)
    for name, keys in (
        ("discrepancy_vae", ("n_latent", "n_hidden", "mmd_weight", "kl_weight", "lr", "batch_size", "epochs")),
        ("sena", ("mask_leak", "mmd_weight", "kl_weight", "temperature", "lr", "batch_size", "epochs")),
    ):
        spec = plan.methods[name]
        published, ours = method_class(spec).Params(), build(spec).params
        assert {key: getattr(ours, key) for key in keys} == {key: getattr(published, key) for key in keys}, name
    assert plan.methods["gears"].params["epochs"] == 20
    ours = build(plan.methods["perturbedvae"]).params
    assert (ours.lr, ours.epochs, ours.batch_size, ours.alpha, ours.n_nu, ours.n_iota) == (1e-4, 100, 64, 0.05, 20, 85)


def test_every_item_of_the_paper_is_answered_by_a_shipped_config():
    full = Plan(read_yaml("config/paper.yaml"))
    assert full.studies.unanswered() == []
    assert Plan(read_yaml("config/paper_small.yaml")).studies.unanswered() == ["paper_a_table10"]
    assert "config/paper.yaml" in where_answered("paper_a_table10", Path("config"))
    assert "paper_small.yaml" not in where_answered("paper_a_table10", Path("config"))


def test_the_small_config_keeps_to_its_budget():
    plan = Plan(read_yaml("config/paper_small.yaml"))
    trained = [job for job in plan.jobs() if plan.methods[job.method].stochastic]
    assert len(trained) <= 170
    assert len([job for job in trained if job.method == "gears"]) == 1
    assert plan.methods["gears"].params["epochs"] <= 10
    name = plan.studies.of_kind("identifiability")[0]
    fits = [
        len(setting.arms) * setting.estimator.restarts + setting.plain_vae
        for setting in plan.studies.settings(name).values()
    ]
    assert sum(fits) * len(plan.studies.seeds(name)) <= 60


@pytest.mark.parametrize(
    ("item", "text"),
    [("paper_a_table4", "Table 4"), ("paper_a_fig10", "Figure 10"), ("paper_a_appendix_i", "Appendix I")],
)
def test_items_as_readers_write_them(item, text):
    assert spell_item(item) == text


def test_one_file_and_several_become_options():
    spell = Plan(WITH_STUDY).studies.options("--truth", "truth")
    assert spell(HERE, {"truth": "truth.h5ad"}) == "--truth truth.h5ad"
    assert spell(HERE, {"truth": ["a", "b"]}) == "--truth a --truth b"
    assert spell(HERE, {}) == ""
