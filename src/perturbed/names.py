"""Perturbation names: one canonical spelling, used in every file, table and plot."""

from __future__ import annotations

from collections.abc import Iterable

CONTROL = "control"
JOINER = "+"


def genes_of(perturbation: str) -> tuple[str, ...]:
    """The perturbed genes of a canonical name; empty for control.

    >>> genes_of("KLF1+BAK1")
    ('KLF1', 'BAK1')
    >>> genes_of("control")
    ()
    """
    return () if perturbation == CONTROL else tuple(perturbation.split(JOINER))


def join_genes(genes: Iterable[str]) -> str:
    """Canonical name of a set of perturbed genes: sorted, without repeats, joined by `+`.

    >>> join_genes(["KLF1", "BAK1"])
    'BAK1+KLF1'
    >>> join_genes([])
    'control'
    """
    unique = sorted(set(genes))
    return JOINER.join(unique) if unique else CONTROL
