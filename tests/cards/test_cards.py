"""Every card that ships is complete, and those of files on this machine hold what they promise."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import urlsplit

import anndata
import pytest
from pydantic import ValidationError

from perturbed.config import parse, read_yaml
from perturbed.data.cards import (
    Card,
    Keys,
    PathSource,
    RemoteFile,
    SimulationSource,
    UrlSource,
    load_card,
    names_card,
)
from perturbed.data.raw import check_expectations, check_raw
from perturbed.errors import ConfigError
from perturbed.pathways.spec import load_gene_set_card

REPOSITORY = Path(__file__).resolve().parents[2]
FOLDER = REPOSITORY / "config" / "datasets"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
CARDS = {name: load_card(name, [FOLDER]) for name in NAMES}
BY_URL = [name for name in NAMES if isinstance(CARDS[name].source, UrlSource)]
BY_PATH = [name for name in NAMES if isinstance(CARDS[name].source, PathSource)]
REQUIRED = {
    "adamson2016_pilot", "adamson2016_upr", "kang2018", "norman2019_gears", "norman2019_paper", "norman2019_scperturb",
    "papalexi2021", "replogle2022_k562_essential", "replogle2022_rpe1", "wessels2023",
}  # fmt: skip


UNPINNED = {"vanhove2019_irf8", "takada2022_cardiotoxin", "packer2019_celegans"}
"""Cards of files whose hash nobody has published; their note says so."""


def files(name: str) -> tuple:
    source = CARDS[name].source
    return source.files if isinstance(source, UrlSource) else ()


def test_the_promised_cards_are_there() -> None:
    assert set(NAMES) >= REQUIRED


@pytest.mark.parametrize("name", NAMES)
def test_card_says_what_a_report_needs(name: str) -> None:
    card = CARDS[name]
    assert card.about.title
    if isinstance(card.source, SimulationSource):
        return
    assert card.about.licence
    assert card.about.organism
    assert re.fullmatch(r"10\.\d{4,}/\S+", card.about.doi) or card.about.note
    assert card.expect.n_obs is not None or name in UNPINNED
    assert card.expect.values is not None


@pytest.mark.parametrize("name", BY_URL)
def test_files_are_pinned_and_addresses_are_safe(name: str) -> None:
    for file in files(name):
        assert (
            file.sha256 or file.md5 or file.member_sha256 or (name in UNPINNED and "unpinned" in CARDS[name].about.note)
        )
        assert len(set(file.urls)) == len(file.urls)
        for url in file.urls:
            address = urlsplit(url)
            assert address.scheme == "https"
            # These answer scripts with 202 and nothing, or with 403.
            assert not (address.netloc.endswith("figshare.com") and address.path.startswith("/ndownloader"))


@pytest.mark.parametrize("name", [name for name in NAMES if CARDS[name].provides & {"gene_sets", "gene_graph"}])
def test_side_files_are_known_and_pinned(name: str) -> None:
    sets, graph = CARDS[name].files.gene_sets, CARDS[name].files.gene_graph
    if sets is not None and names_card(sets):
        library = load_gene_set_card(sets, [REPOSITORY / "config" / "gene_sets"])
        assert library.organism == CARDS[name].about.organism
    if isinstance(graph, RemoteFile):
        assert graph.sha256 and graph.member_sha256
        assert all(urlsplit(url).scheme == "https" for url in graph.urls)


def test_one_name_is_one_file() -> None:
    """Downloads and mirrors are keyed by name, so cards that share a name must mean the same bytes."""
    seen: dict[str, tuple] = {}
    for name in BY_URL:
        for file in files(name):
            known = (file.bytes, file.sha256, file.md5)
            assert seen.setdefault(file.name, known) == known


def test_paper_card_is_the_source_less_one_construct() -> None:
    source, paper = CARDS["norman2019_scperturb"], CARDS["norman2019_paper"]
    assert paper.source == source.source
    assert (source.expect.n_obs, source.expect.n_control) == (111_445, 11_855)
    assert (paper.expect.n_kept, paper.expect.n_control) == (111_445 - 2_948, 11_855 - 2_948)
    assert (paper.expect.n_groups, paper.expect.n_single, paper.expect.n_double) == (1 + 105 + 131, 105, 131)
    (pattern,) = paper.keys.drop_matching["guide_id"]
    dropped = [
        "NegCtrl1_NegCtrl0", "NegCtrl1_NegCtrl0;NegCtrl1_NegCtrl0", "NegCtrl1_NegCtrl0__NegCtrl1_NegCtrl0",
        "NegCtrl1_NegCtrl0__NegCtrl1_NegCtrl0;anything",
    ]  # fmt: skip
    kept = [
        "NegCtrl10_NegCtrl0__NegCtrl10_NegCtrl0", "NegCtrl11_NegCtrl0", "NegCtrl0_NegCtrl0__NegCtrl0_NegCtrl0;x",
        "KLF1_NegCtrl0__KLF1_NegCtrl0", "NegCtrl1_NegCtrl0__NegCtrl0_NegCtrl0", "xNegCtrl1_NegCtrl0",
    ]  # fmt: skip
    assert all(re.fullmatch(pattern, value) for value in dropped)
    assert not any(re.fullmatch(pattern, value) for value in kept)


def test_construct_names_are_stripped_to_genes() -> None:
    (pattern,) = CARDS["adamson2016_upr"].keys.strip
    labels = {
        "HSPA5_pDS017": "HSPA5", "HSPA5_pDS371": "HSPA5", "ERN1_pBA574": "ERN1", "C7orf26_pDS004": "C7orf26",
        "63(mod)_pBA580": "63(mod)_pBA580", "Gal4-4(mod)_pBA582": "Gal4-4(mod)_pBA582",
    }  # fmt: skip
    assert {label: re.sub(pattern, "", label) for label in labels} == labels
    (guide,) = CARDS["papalexi2021"].keys.strip
    assert [re.sub(guide, "", label) for label in ("STAT2g2", "MARCH8g1", "control")] == ["STAT2", "MARCH8", "control"]


def test_guide_features_are_told_from_genes() -> None:
    patterns = CARDS["wessels2023"].keys.drop_genes
    expect = CARDS["wessels2023"].expect
    assert expect.n_vars is not None
    assert expect.n_vars - 421 == expect.n_genes

    def is_dropped(feature: str) -> bool:
        return any(re.fullmatch(pattern, feature) for pattern in patterns)

    guides = ("eGFP", "KRAB", "ATXN7L3_g1:NT_g2", "CD71-Mpknot")
    genes = ("OR4F5", "AC213203.1", "CD55", "CD46", "HLA-A", "MT-CO1", "NT5E", "MECP2", "Y_RNA", "RP11-54O7.3")
    assert all(map(is_dropped, guides))
    assert not any(map(is_dropped, genes))


def test_the_gradients_cases_avoid_the_sources_traps() -> None:
    irf8, muscle, worm = (CARDS[name] for name in ("vanhove2019_irf8", "takada2022_cardiotoxin", "packer2019_celegans"))
    names = [file.name for file in files("vanhove2019_irf8")]
    assert all("irf8" in name or name == "annot_JP34353637.csv" for name in names) and not any("WT" in n for n in names)
    assert (irf8.expect.n_groups, muscle.expect.n_groups, worm.expect.n_groups) == (2, 2, 1)
    assert {file.role: file.key for file in files("takada2022_cardiotoxin")}["annotation"] == "Assay"
    assert worm.keys.drop == {"passed_initial_QC_or_later_whitelisted": ("False",)}
    for card in (irf8, muscle, worm):
        p = card.prepare
        assert (p.min_genes, p.min_counts, p.max_genes, p.min_cells_per_gene) == (200, 500, 5000, 5)


@pytest.mark.parametrize("name", BY_PATH)
def test_shared_files_hold_what_their_card_expects(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    card = CARDS[name]
    assert isinstance(card.source, PathSource)
    path = Path(card.source.path)
    if not path.is_file():
        pytest.skip(f"{path} is not on this machine")
    check_raw(path, card, name)
    obs = anndata.read_h5ad(path, backed="r").obs.astype(str)
    for column, values in card.keys.drop.items():
        assert set(values) <= set(obs[column])
        obs = obs[~obs[column].isin(values)]
    label = obs[card.keys.perturbation].replace(dict(card.keys.rename))
    control = label.isin(card.keys.control)
    names = {tuple(sorted(set(text.split(card.keys.delimiter)))) for text in label[~control]}
    found = {
        "n_control": int(control.sum()), "n_groups": len(names) + 1,
        "n_single": sum(len(genes) == 1 for genes in names), "n_double": sum(len(genes) == 2 for genes in names),
    }  # fmt: skip
    if card.expect.n_kept is not None:
        found["n_kept"] = len(obs)
    check_expectations(found, card.expect, name)
    assert set(card.keys.keep.values()) <= set(obs.columns)


# --- the model ----------------------------------------------------------------------------------------------------


def test_misspelt_key_names_the_nearest() -> None:
    value = read_yaml(FOLDER / "norman2019_scperturb.yaml")
    value["keys"]["delimeter"] = "_"
    with pytest.raises(ConfigError, match=r"mine: unknown key 'keys.delimeter'; did you mean 'delimiter'\?"):
        parse(Card, value, "mine")


def test_unknown_dataset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no card for 'norman2019_scpertub'.*did you mean 'norman2019_scperturb'"):
        load_card("norman2019_scpertub", [FOLDER])


@pytest.mark.parametrize("key", ["strip", "drop_genes"])
def test_patterns_are_checked_and_one_needs_no_list(key: str) -> None:
    assert getattr(Keys.model_validate({key: "g\\d+$"}), key) == ("g\\d+$",)
    with pytest.raises(ValidationError, match="is no regular expression"):
        Keys.model_validate({key: ["good", "(bad"]})
    with pytest.raises(ConfigError, match=r"mine: keys.drop_matching.guide.*'\(bad' is no regular expression"):
        parse(Card, {"source": {"kind": "path", "path": "x"}, "keys": {"drop_matching": {"guide": "(bad"}}}, "mine")


@pytest.mark.parametrize(("key", "value"), [("sha256", "abc"), ("md5", "X" * 32), ("name", "../x"), ("name", ".x")])
def test_hashes_and_names_are_checked(key: str, value: str) -> None:
    file = {"name": "x", "urls": ["https://example.com/x"], key: value}
    with pytest.raises(ConfigError, match=f"mine: source.files.0.{key}"):
        parse(Card, {"source": {"kind": "url", "files": [file]}}, "mine")
