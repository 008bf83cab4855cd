"""The judge from an enrichment to its tables: what is asked, what is written, what never is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from judge_server import JudgeServer, asked_about, verdict
from judge_world import LISTS, Oracle, make_spec, write_world

from perturbed.config import parse
from perturbed.errors import ConfigError, DataError, PerturbedError
from perturbed.figures.judge import draw_judge_figure
from perturbed.pathways.judge import judge_pathways
from perturbed.pathways.judge_questions import draw_matched, read_panel, show_name
from perturbed.pathways.judge_spec import JudgeSpec

KEY = "sk-verysecret-0123456789"
TABLES = ("verdicts", "answers", "odds", "agreement")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


def parity(text: str, vote: int) -> str:
    """Yes for even pathways; every fifth pathway's last vote is the other way."""
    number = int(re.search(r"pathway (\d+)", text).group(1))
    return "yes" if (number % 2 == 0) != (number % 5 == 0 and vote == 2) else "no"


def read(folder: Path) -> dict[str, pd.DataFrame]:
    return {name: pd.read_csv(folder / f"{name}.csv", keep_default_na=True) for name in TABLES}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- what is asked ----------------------------------------------------------------------------------------------------


def test_the_question_tells_nothing_of_the_list_and_the_order_neither(world, tmp_path):
    folder, libraries = world
    oracle = Oracle(parity)
    judge_pathways(folder, libraries, make_spec(n_votes=3, concurrency=1), tmp_path / "out", provider=oracle)
    verdicts = read(tmp_path / "out")["verdicts"].set_index("pathway")
    prompt = JudgeSpec().prompt.replace("{subject}", JudgeSpec().subject)
    assert {
        text.replace(name, "{pathway}") for text in oracle.asked for name in re.findall(r"wiki pathway \d+", text)
    } == {prompt}  # name and subject are all that differs between questions
    names = [re.search(r"wiki pathway \d+", text).group(0) for text in oracle.asked]
    assert {name: names.count(name) for name in names} == dict.fromkeys(
        verdicts.index, 3
    )  # once a vote, in however many lists
    listed = np.array([not verdicts.loc[name, "is_random"] for name in names])
    place = np.arange(len(names)) / len(names)
    assert abs(place[listed].mean() - 0.5) < 3 * np.sqrt(1 / 12 / listed.sum())  # listed ones are asked about anywhere
    assert names != sorted(names)


def test_the_order_follows_the_seed_and_not_the_tables(world, tmp_path):
    folder, libraries = world
    turned = tmp_path / "turned"
    turned.mkdir()
    for name in ("top", "enrichment"):
        table = pd.read_csv(folder / f"{name}.csv")
        table.iloc[::-1].to_csv(turned / f"{name}.csv", index=False)
    asked = []
    for place, seed in ((folder, 0), (turned, 0), (folder, 1)):
        asked.append(Oracle(parity))
        spec = make_spec(seed=seed, concurrency=1)
        judge_pathways(place, libraries, spec, tmp_path / f"out{len(asked)}", provider=asked[-1])
    assert asked[0].asked == asked[1].asked != asked[2].asked
    assert set(asked[0].asked) != set(asked[2].asked)  # other random pathways


def test_random_pathways_are_tested_unlisted_and_of_the_chosen_test(world):
    folder, libraries = world
    top = pd.read_csv(folder / "top.csv")
    for method in ("ora", "rank"):
        panel = read_panel(folder, libraries, make_spec(method=method))
        chosen = top[(top["method"] == method) & (top["background"] == "model")]
        listed = set(chosen["pathway"])
        assert set(panel.pathways.loc[~panel.pathways["is_random"], "pathway"]) == listed
        random = panel.pathways.loc[panel.pathways["is_random"], "pathway"]
        assert len(random) == 100 == random.nunique() and not listed & set(random)
        assert list(panel.memberships["list"].unique()) == list(LISTS)
        assert panel.pathways["pathway"].is_unique
    shared = panel.pathways[panel.pathways["lists"].str.contains(";")]
    assert len(shared) == 5 and set(shared["lists"]) == {"gradient_unperturbed (all);gradient_perturbed (all)"}
    enrichment = (
        pd.read_csv(folder / "enrichment.csv").query("background == 'model'").groupby("pathway")["set_size"].first()
    )
    assert (panel.pathways["set_size"].to_numpy() == enrichment[panel.pathways["pathway"]].to_numpy()).all()


def test_what_random_genes_found_can_be_drawn_and_is_asked_about_once(world, tmp_path):
    folder, libraries = world
    other = tmp_path / "enrichment"
    other.mkdir()
    for name in ("top", "enrichment"):
        table = pd.read_csv(folder / f"{name}.csv")
        table.replace({"list": {LISTS[2]: "random"}}).to_csv(other / f"{name}.csv", index=False)
    panel = read_panel(other, libraries, make_spec()).pathways
    control = panel["lists"] == "random (all)"
    assert panel["pathway"].is_unique and panel["is_random"].sum() == 100 and control.sum() == 10
    assert 0 < (control & panel["is_random"]).sum() < 10  # 125 candidates, ten of them the control's


def test_random_pathways_are_as_large_as_the_listed():
    rng = np.random.default_rng(0)
    candidates = np.round(np.exp(rng.normal(3, 0.9, 400)))
    listed = np.exp(rng.normal(4.3, 0.3, 25))
    for seed in range(5):
        drawn = draw_matched(listed, candidates, 100, np.random.default_rng(seed))
        assert len(np.unique(drawn)) == 100
        gap = np.log(candidates[drawn]).mean() - np.log(listed).mean()
        unmatched = np.log(candidates).mean() - np.log(listed).mean()
        assert abs(gap) < 0.4 * abs(unmatched)  # a quarter of all candidates cannot all be as large
    few = draw_matched(listed, candidates, 30, np.random.default_rng(0))
    assert abs(np.log(candidates[few]).mean() - np.log(listed).mean()) < 0.1
    every = draw_matched(listed, candidates[:40], 100, np.random.default_rng(0))
    assert every.tolist() == list(range(40))


def test_what_depends_on_size_alone_looks_like_no_preference():
    """Large sets are called relevant and large sets are listed: matching must not take that for a preference."""
    from perturbed.pathways.judge_statistics import compare_odds

    matched, unmatched = [], []
    for run in range(60):
        rng = np.random.default_rng([3, run])
        size = np.exp(rng.normal(3, 0.9, 500))
        relevant = rng.random(500) < 1 / (1 + np.exp(-1.5 * (np.log(size) - 3)))
        listed = rng.choice(500, 20, replace=False, p=size / size.sum())
        rest = np.setdiff1d(np.arange(500), listed)
        drawn = rest[draw_matched(size[listed], size[rest], 100, rng)]
        yes = int(relevant[listed].sum())
        for found, other in ((matched, drawn), (unmatched, rng.choice(rest, 100, replace=False))):
            found.append(compare_odds(yes, 20 - yes, int(relevant[other].sum()), int((~relevant[other]).sum())).value)
    assert 0.75 < np.median(matched) < 1.35
    assert np.median(unmatched) > 2


def test_genes_are_shown_only_on_request(world):
    folder, libraries = world
    plain = read_panel(folder, libraries, make_spec())
    assert not any("G0" in text[0]["content"] for text in plain.messages)
    shown = read_panel(folder, libraries, make_spec(show_genes=True))
    assert all("Genes of the pathway: G0, G1" in text[0]["content"] for text in shown.messages)


def test_names_read_as_words():
    assert show_name("TCA cycle%WikiPathways_20240101%WP434%Mus musculus") == "TCA cycle"
    assert show_name("KEGG_INSULIN_SIGNALING") == "KEGG INSULIN SIGNALING"
    assert show_name("Class A/1 (Rhodopsin_like)") == "Class A/1 (Rhodopsin_like)"


# --- what is written --------------------------------------------------------------------------------------------------


def test_tables_hold_votes_verdicts_and_odds(world, tmp_path):
    folder, libraries = world
    judge_pathways(folder, libraries, make_spec(n_votes=3), tmp_path / "out", provider=Oracle(parity))
    tables = read(tmp_path / "out")
    verdicts = tables["verdicts"]
    number = verdicts["pathway"].str[-3:].astype(int)
    assert (verdicts["verdict"] == np.where(number % 2 == 0, "yes", "no")).all()
    split = number % 5 == 0
    assert np.allclose(verdicts["agreement"], np.where(split, 2 / 3, 1), atol=1e-5)
    assert (verdicts["votes_yes"] + verdicts["votes_no"] == 3).all()
    assert len(tables["answers"]) == 375 and set(tables["answers"]["status"]) == {"answer"}
    odds = tables["odds"].set_index("list")
    assert list(odds.index) == ["gradient lists", *LISTS]
    for name in LISTS:
        inside = verdicts["lists"].str.contains(name, na=False)
        assert odds.loc[name, "n_yes"] == (verdicts[inside]["verdict"] == "yes").sum()
        assert odds.loc[name, ["n", "n_random"]].tolist() == [10, 100]
    assert odds.loc["gradient lists", "n"] == 15  # without the rival's; five are in both lists and count once
    every = tables["agreement"].set_index("pathways").loc["all"]
    assert every["share_unanimous"] == pytest.approx(1 - split.mean(), abs=1e-5) and 0 < every["kappa"] < 1


def test_equal_answers_give_equal_bytes_whatever_order_they_came_in(world, tmp_path):
    folder, libraries = world
    cache = tmp_path / "cache.jsonl"
    spec = make_spec(n_votes=2, concurrency=8)
    judge_pathways(folder, libraries, spec, tmp_path / "one", cache=cache, provider=Oracle(lambda text, vote: "yes"))
    lines = cache.read_text().splitlines()
    cache.write_text("\n".join(reversed(lines)) + "\n")
    judge_pathways(folder, libraries, spec, tmp_path / "two", cache=cache, provider=Oracle(None))  # asks nothing
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    replay = make_spec(n_votes=2, provider="replay", replay=str(cache), key_env="NO_SUCH_KEY")
    judge_pathways(folder, libraries, replay, tmp_path / "three")
    changed = {name for name, data in contents(tmp_path / "one").items() if contents(tmp_path / "three")[name] != data}
    assert changed == {"cost.json"}  # which names the provider
    cost = json.loads((tmp_path / "three" / "cost.json").read_text())
    assert cost["requests"] == cost["n_answers"] == 250 and cost["input_tokens"] == 2500


def test_cost_counts_every_answer_that_came(world, tmp_path):
    folder, libraries = world

    def script(request, before):
        if asked_about(request).endswith("7"):
            return {"content": "hm"}
        return {"content": None, "refusal": "no"} if asked_about(request).endswith("3") else verdict("yes")

    prices = {"price_per_million_input_tokens": 2.0, "price_per_million_output_tokens": 10.0}
    with JudgeServer(script) as server:
        spec = make_spec(base_url=server.url, malformed_retries=1, **prices)
        judge_pathways(folder, libraries, spec, tmp_path / "out", cache=tmp_path / "cache.jsonl")
    cost = json.loads((tmp_path / "out" / "cost.json").read_text())
    verdicts = read(tmp_path / "out")["verdicts"]
    sevens, threes = (int(verdicts["pathway"].str.endswith(end).sum()) for end in "73")
    assert cost["n_invalid"] == sevens == (verdicts["votes_invalid"] == 1).sum() > 0
    assert cost["n_refused"] == threes == (verdicts["votes_refused"] == 1).sum() > 0
    assert set(verdicts.loc[verdicts["pathway"].str.contains("[37]$"), "verdict"]) == {"undecided"}
    assert cost["requests"] == len(server.requests) == 125 + sevens
    assert cost["cost"] == pytest.approx(cost["requests"] * (100 * 2 + 20 * 10) / 1e6)
    assert cost["models_that_answered"] == ["tiny-0001"] and cost["servers"] == [server.url]


def test_nobody_asked_means_not_judged_and_no_invented_answer(world, tmp_path):
    folder, libraries = world
    judge_pathways(folder, libraries, JudgeSpec(), tmp_path / "out")
    tables = read(tmp_path / "out")
    assert set(tables["verdicts"]["verdict"]) == {"not judged"} and tables["answers"].empty
    assert tables["odds"]["odds_ratio"].isna().all() and set(tables["odds"]["reason"]) == {"not judged"}
    assert set(tables["agreement"]["reason"]) == {"not judged"} and tables["agreement"]["kappa"].isna().all()
    assert json.loads((tmp_path / "out" / "cost.json").read_text())["requests"] == 0


def test_libraries_are_compared_apart_and_shared_names_asked_once(tmp_path):
    folder, libraries = write_world(tmp_path, libraries=("wiki", "reactome"))
    oracle = Oracle(lambda text, vote: "yes" if "wiki" in text else "no")
    judge_pathways(folder, libraries, make_spec(), tmp_path / "out", provider=oracle)
    tables = read(tmp_path / "out")
    assert set(tables["odds"]["reason"]) == {"every pathway was judged yes", "every pathway was judged no"}
    assert set(tables["agreement"]["library"]) == {"all", "wiki", "reactome"}
    same = tmp_path / "same"
    same.mkdir()
    for name in ("top", "enrichment"):
        table = pd.read_csv(folder / f"{name}.csv")
        table = table[table["library"] == "wiki"]
        pd.concat([table, table.assign(library="copy")]).to_csv(same / f"{name}.csv", index=False)
    again = Oracle(parity)
    judge_pathways(
        same, {"wiki": libraries["wiki"], "copy": libraries["wiki"]}, make_spec(), tmp_path / "2", provider=again
    )
    assert len(again.asked) == len(set(again.asked)) < 250


def test_a_small_library_gives_what_it_has(tmp_path, caplog):
    folder, libraries = write_world(tmp_path, n_pathways=60)
    judge_pathways(folder, libraries, make_spec(), tmp_path / "out", provider=Oracle(parity))
    assert "has 35 pathways outside the lists, not 100" in caplog.text
    assert set(read(tmp_path / "out")["odds"]["n_random"]) == {35}


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_replay_that_lacks_answers_says_how_many(world, tmp_path):
    folder, libraries = world
    cache = tmp_path / "cache.jsonl"
    judge_pathways(folder, libraries, make_spec(), tmp_path / "out", cache=cache, provider=Oracle(parity))
    cache.write_text("".join(f"{line}\n" for line in cache.read_text().splitlines()[:-20]))
    replay = make_spec(provider="replay", replay=str(cache))
    with pytest.raises(DataError, match=r"lacks 20 of 125 answers of model tiny .*vote 0") as error:
        judge_pathways(folder, libraries, replay, tmp_path / "two")
    assert "\n" not in str(error.value) and not (tmp_path / "two").exists()
    with pytest.raises(DataError, match="lacks 125 of 125 answers of model other"):
        judge_pathways(folder, libraries, replay.model_copy(update={"model": "other"}), tmp_path / "two")
    with pytest.raises(DataError, match=r"none\.jsonl: no such file of kept answers"):
        judge_pathways(folder, libraries, replay.model_copy(update={"replay": "none.jsonl"}), tmp_path / "two")


def test_a_missing_key_is_named_and_nothing_asked(world, tmp_path, monkeypatch):
    folder, libraries = world
    monkeypatch.delenv("OPENAI_TEST_KEY", raising=False)
    with pytest.raises(PerturbedError, match="variable OPENAI_TEST_KEY is not set"):
        judge_pathways(
            folder, libraries, make_spec(key_env="OPENAI_TEST_KEY"), tmp_path / "out", cache=tmp_path / "cache.jsonl"
        )
    with pytest.raises(ConfigError, match="needs --cache"):
        judge_pathways(folder, libraries, make_spec(), tmp_path / "out")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"provider": "openai"}, "provider openai needs `model`"),
        ({"provider": "replay", "model": "m"}, "`replay`, the file, goes with"),
        ({"key_env": KEY}, "key_env"),
        ({"api_key": KEY}, "unknown key 'api_key'"),
        ({"base_url": f"https://me:{KEY}@host/v1"}, "without user, password"),
        ({"base_url": f"https://host/v1?key={KEY}"}, "without user, password"),
        ({"base_url": "host/v1"}, "the whole address"),
        ({"prompt": "Is {pathway} good?"}, "lacks {subject}"),
        ({"n_random": 20}, "n_random"),
        ({"extra": {"model": "x"}}, "may not hold 'model'"),
    ],
)
def test_a_wrong_section_is_refused_without_repeating_secrets(value, message):
    with pytest.raises(ConfigError) as error:
        parse(JudgeSpec, value, "judge")
    assert message in str(error.value) and KEY not in str(error.value)


def test_wrong_folders_are_named(world, tmp_path):
    folder, libraries = world
    with pytest.raises(DataError, match=r"top\.csv: no such file"):
        read_panel(tmp_path, libraries, make_spec())
    with pytest.raises(DataError, match="no gene sets for library 'wiki'"):
        read_panel(folder, {}, make_spec())
    with pytest.raises(DataError, match="no row has method 'gsea'"):
        read_panel(folder, libraries, make_spec(method="gsea"))
    (tmp_path / "other.gmt").write_text("Other\t\tA\tB\n")
    with pytest.raises(DataError, match=r"other\.gmt: has no pathway 'wiki pathway 000'"):
        read_panel(folder, {"wiki": tmp_path / "other.gmt"}, make_spec())


# --- the figure -------------------------------------------------------------------------------------------------------


def test_the_figure_draws_what_the_tables_say(world, tmp_path):
    folder, libraries = world
    judge_pathways(folder, libraries, make_spec(n_votes=3), tmp_path / "out", provider=Oracle(parity))
    for run in ("one", "two"):
        draw_judge_figure(tmp_path / "out", tmp_path / run / "judge", "A judge")
    for suffix in (".svg", ".png", ".csv"):
        assert (tmp_path / "one" / f"judge{suffix}").read_bytes() == (tmp_path / "two" / f"judge{suffix}").read_bytes()
    svg = (tmp_path / "one" / "judge.svg").read_text()
    odds = read(tmp_path / "out")["odds"].set_index("list")
    row = odds.loc["gradient_perturbed"]
    assert f">{row['n_yes']}/{row['n_yes'] + row['n_no']}<" in svg and "gradient perturbed" in svg and "A judge" in svg
    source = pd.read_csv(tmp_path / "one" / "judge.csv")
    drawn = source[source["label"] == "gradient perturbed"].iloc[0]
    assert drawn[["odds_ratio", "low", "high"]].tolist() == pytest.approx(
        row[["odds_ratio", "low", "high"]].tolist(), rel=1e-5
    )
    votes = source[source["table"] == "votes"]
    assert votes["n"].sum() == 125


@pytest.mark.parametrize(
    ("answer", "words"), [("yes", "every pathway was judged yes"), (None, "Not judged: no language model was asked")]
)
def test_the_figure_says_why_there_is_nothing_to_compare(answer, words, world, tmp_path):
    folder, libraries = world
    spec = JudgeSpec() if answer is None else make_spec()
    judge_pathways(folder, libraries, spec, tmp_path / "out", provider=Oracle(lambda *_: answer))
    draw_judge_figure(tmp_path / "out", tmp_path / "judge")
    assert words in " ".join(re.sub(r"<[^>]+>", " ", (tmp_path / "judge.svg").read_text()).split())
    assert len(pd.read_csv(tmp_path / "judge.csv")) > 0
    with pytest.raises(DataError, match=r"odds\.csv: no such file"):
        draw_judge_figure(tmp_path, tmp_path / "x")
