from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perturbed.data.cards import Keys
from perturbed.data.labels import canonical_labels
from perturbed.errors import DataError

GEARS = Keys(control="ctrl", delimiter="+", filler="ctrl")


def test_fillers_order_and_duplicates_are_merged():
    found = canonical_labels(["A+ctrl", "ctrl+A", "A", "A+A", "B+A", "A+B", "ctrl", "ctrl+ctrl"], GEARS)
    assert list(found) == ["A", "A", "A", "A", "A+B", "A+B", "control", "control"]


def test_another_delimiter_and_several_controls():
    keys = Keys(control=("NT", ""), delimiter="_")
    assert list(canonical_labels(["KLF1_BAK1", "NT", "", "SET"], keys)) == ["BAK1+KLF1", "control", "control", "SET"]


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_missing_label_is_the_empty_string(missing):
    assert list(canonical_labels(np.array(["A", missing], dtype=object), Keys(control=("",)))) == ["A", "control"]
    with pytest.raises(DataError, match=r"label '' is empty or missing.*keys\.drop"):
        canonical_labels(np.array(["A", missing], dtype=object), Keys())


@pytest.mark.parametrize("label", ["A++B", "A+", "+", "A+ +B"])
def test_empty_parts_are_refused(label):
    with pytest.raises(DataError, match=r"has an empty part.*keys\.rename"):
        canonical_labels(["A", label], Keys())


def test_empty_filler_is_allowed():
    assert list(canonical_labels(["A+", "+A"], Keys(filler=("",)))) == ["A", "A"]


def test_declared_genes_with_delimiter_are_matched_first():
    keys = Keys(delimiter="-", genes_with_delimiter=("HLA-A", "NKX2-1", "HLA-A-1"))
    found = canonical_labels(["HLA-A", "HLA-A-KLF1", "KLF1-HLA-A", "NKX2-1-HLA-A", "A-HLA", "HLA-A-1-X"], keys)
    assert list(found) == ["HLA-A", "HLA-A+KLF1", "HLA-A+KLF1", "HLA-A+NKX2-1", "A+HLA", "HLA-A-1+X"]


def test_undeclared_gene_with_delimiter_is_ambiguous():
    with pytest.raises(DataError, match=r"file: label 'KLF1-HLA-A' is ambiguous: 'HLA-A'.*genes_with_delimiter"):
        canonical_labels(["KLF1-HLA-A"], Keys(delimiter="-"), genes=["HLA-A", "KLF1"], where="file")
    renamed = Keys(delimiter="-", rename={"KLF1-HLA-A": "HLA-A+KLF1"})
    assert canonical_labels(["KLF1-HLA-A"], renamed, genes=["HLA-A"])[0] == "HLA-A+KLF1"


def test_overlapping_declared_genes_are_ambiguous():
    with pytest.raises(DataError, match=r"'A-B-C' can be read in two ways"):
        canonical_labels(["A-B-C"], Keys(delimiter="-", genes_with_delimiter=("A-B", "B-C")))


def test_joiner_in_a_gene_name_is_refused_and_renamed():
    with pytest.raises(DataError, match=r"gene named 'A\+1'.*keys\.rename"):
        canonical_labels(["A+1_B"], Keys(delimiter="_"))
    assert canonical_labels(["A+1_B"], Keys(delimiter="_", rename={"A+1": "A1"}))[0] == "A1+B"


def test_rename_of_whole_labels_and_parts():
    keys = Keys(delimiter="_", rename={"HOXC13_2": "HOXC13", "X_Y_2": "X+Y", "old": "new", "NC": "control"})
    found = canonical_labels(["HOXC13_2", "X_Y_2", "old_KLF1", "old", "NC"], keys)
    assert list(found) == ["HOXC13", "X+Y", "KLF1+new", "new", "control"]


def test_strip_comes_first():
    keys = Keys(delimiter="_", strip=(r"_pDS\d+",), control="NT")
    assert list(canonical_labels(["SPI1_pDS255", "NT_pDS1", "A_pDS2_B"], keys)) == ["SPI1", "control", "A+B"]


@pytest.mark.parametrize("label", ["A+NT", "control"])
def test_a_control_label_among_genes_is_refused(label):
    with pytest.raises(DataError, match=r"the name of controls; add it to keys\.filler"):
        canonical_labels([label], Keys(control="NT"))


GENES = st.lists(st.sampled_from(["A", "B", "KLF1", "BAK1", "ctrl"]), min_size=1, max_size=4)


@given(GENES, st.randoms())
def test_spelling_does_not_matter(genes, random):
    shuffled = [*genes, *random.choices(genes, k=2)]
    random.shuffle(shuffled)
    one, other = canonical_labels(["+".join(genes), "+".join(shuffled)], GEARS)
    assert one == other == ("+".join(sorted(set(genes) - {"ctrl"})) or "control")
    if one != "control":
        assert canonical_labels([one], GEARS)[0] == one
