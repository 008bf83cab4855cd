"""Perturbation labels of a source, brought to the one canonical spelling."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from perturbed.data.cards import Keys
from perturbed.errors import DataError
from perturbed.names import CONTROL, JOINER, join_genes


def canonical_labels(
    values: Sequence[str] | np.ndarray, keys: Keys, *, genes: Collection[str] = (), where: str = "labels"
) -> np.ndarray:
    """Canonical perturbation names of a source's labels.

    Matches of `keys.strip` are removed first. A label is then renamed as a whole by `keys.rename` (whose values are in
    our spelling, genes joined by `+`); otherwise a control label becomes `control`, and any other is split at
    `keys.delimiter`, with the genes of `keys.genes_with_delimiter` matched first and the longest of them preferred.
    Parts are renamed by `keys.rename`, fillers removed, duplicates merged and genes sorted; a label of fillers only is
    `control`.

    Parameters
    ----------
    values
        One label per cell (n_cells,); a missing one counts as the empty string.
    keys
        The card's keys.
    genes
        Gene names of the data, to notice labels such as `HLA-A` under the delimiter `-`.
    where
        What errors name, such as the file.

    Returns
    -------
    numpy.ndarray
        Canonical names (n_cells,), object dtype.

    Raises
    ------
    DataError
        If a label has an empty or ambiguous part; names the label and the mend.
    """
    codes, distinct = pd.factorize(np.asarray(values, dtype=object))
    labels = [*map(str, distinct), ""]  # the code of a missing label, -1, is the last one's
    known = {str(gene): None for gene in genes if keys.delimiter in str(gene)} if keys.delimiter else {}
    names = np.empty(len(labels), dtype=object)
    for code in np.unique(codes):
        names[code] = _canonical(labels[code], keys, known, where)
    return names[codes]


def _canonical(label: str, keys: Keys, known: Collection[str], where: str) -> str:
    for pattern in keys.strip:
        label = re.sub(pattern, "", label)
    if label in keys.rename:
        ours = keys.rename[label]
        return CONTROL if ours == CONTROL else join_genes(_check(gene, label, where) for gene in ours.split(JOINER))
    if label in keys.control:
        return CONTROL
    kept = [keys.rename.get(part, part) for part in _split(label, keys, known, where) if part not in keys.filler]
    for part in kept:
        if part and part in (*keys.control, CONTROL):
            raise DataError(
                f"{where}: label {label!r} holds {part!r}, the name of controls; add it to keys.filler if it stands "
                f"for no gene, or {label!r} to keys.control if these cells are controls"
            )
        if JOINER in part:
            raise DataError(
                f"{where}: label {label!r} holds a gene named {part!r}, but {JOINER!r} joins genes in our names; give "
                f"{part!r} another name in keys.rename, or set keys.delimiter to {JOINER!r} if it is a combination"
            )
    return join_genes(_check(part, label, where) for part in kept)


def _check(gene: str, label: str, where: str) -> str:
    if not gene.strip():
        raise DataError(
            f"{where}: label {label!r} {'has an empty part' if label else 'is empty or missing'}; say what it means in "
            "keys.rename (or keys.control), or drop these cells with keys.drop"
        )
    return gene


def _split(label: str, keys: Keys, known: Collection[str], where: str) -> list[str]:
    """The parts of a label, with declared gene names that hold the delimiter kept whole."""
    if not keys.delimiter or keys.delimiter not in label:
        return [label]
    tokens = label.split(keys.delimiter)
    declared = _matches(tokens, keys.genes_with_delimiter, keys.delimiter)
    for (_, stop), (start, _) in pairwise(declared):
        if start < stop:
            raise DataError(
                f"{where}: label {label!r} can be read in two ways with keys.genes_with_delimiter; write its genes, "
                f"joined by {JOINER!r}, in keys.rename"
            )
    parts, position = [], 0
    for start, stop in [*declared, (len(tokens), len(tokens))]:
        _refuse_undeclared(label, tokens[position:start], keys.delimiter, known, where)
        parts += tokens[position:start]
        if stop > start:
            parts.append(keys.delimiter.join(tokens[start:stop]))
        position = stop
    return parts


def _matches(tokens: list[str], genes: Collection[Any], delimiter: str) -> list[tuple[int, int]]:
    """Where genes stand in the tokens, as (start, stop); those inside a longer one are left out."""
    patterns = {tuple(gene.split(delimiter)) for gene in genes}
    spans = [
        (start, start + len(pattern))
        for pattern in patterns
        for start in range(len(tokens) - len(pattern) + 1)
        if tuple(tokens[start : start + len(pattern)]) == pattern
    ]
    inside = {a for a in spans for b in spans if a != b and b[0] <= a[0] and a[1] <= b[1]}
    return sorted(set(spans) - inside)


def _refuse_undeclared(label: str, tokens: list[str], delimiter: str, known: Collection[str], where: str) -> None:
    """Refuse to cut through the name of a gene of the data that nobody declared."""
    for start in range(len(tokens)):
        for stop in range(start + 2, len(tokens) + 1):
            gene = delimiter.join(tokens[start:stop])
            if gene in known:
                raise DataError(
                    f"{where}: label {label!r} is ambiguous: {gene!r} is a gene of the data and holds the delimiter "
                    f"{delimiter!r}; add {gene!r} to keys.genes_with_delimiter, or write the label's genes, joined by "
                    f"{JOINER!r}, in keys.rename"
                )
