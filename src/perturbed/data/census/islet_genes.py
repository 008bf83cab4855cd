"""Genes of the simulated islets: real mouse symbols of what islets are known for, and invented ones."""

from __future__ import annotations

CELL_TYPES = {
    "type B pancreatic cell": "CL:0000169",
    "pancreatic A cell": "CL:0000171",
    "pancreatic D cell": "CL:0000173",
    "pancreatic PP cell": "CL:0002275",
    "endothelial cell": "CL:0000115",
}
"""Simulated cell types with their ontology terms; the first is the β cell, the second the α cell."""

MARKERS = {
    "type B pancreatic cell": "Ins1 Ins2 Iapp Slc2a2 Mafa Nkx6-1 Pdx1 Ucn3 G6pc2 Slc30a8 Pcsk1 Glp1r Npy Ero1b Sytl4",
    "pancreatic A cell": "Gcg Arx Irx1 Irx2 Mafb Ttr Pcsk2 Slc7a2 Gc Tmem27 Fev Sphkap Tspan7 Peg3 Dpp10",
    "pancreatic D cell": "Sst Hhex Rbp4 Ghsr Ptprz1 Gabrb3 Fxyd6 Efna5 Nrg1 Arg1",
    "pancreatic PP cell": "Ppy Pyy Aqp3 Etv1 Vsig1 Tmem59l Sertm1 Cntnap2 Folr1 Gpc6",
    "endothelial cell": "Pecam1 Plvap Cdh5 Kdr Flt1 Esm1 Emcn Tie1 Ecscr Egfl7 Cldn5 Eng",
}
"""Genes high in each cell type."""

UP = {
    "cytoplasmic ribosomal proteins": (
        "Rpl3 Rpl4 Rpl5 Rpl7 Rpl8 Rpl10a Rpl13 Rpl14 Rpl18 Rpl23 Rps2 Rps3 Rps5 Rps8 Rps12 Rps19 Rps23 Rplp0"
    ),
    "glycolysis and lipid handling": "Aldoa Mdh1 Fabp5 Acot7 Ldha Pgk1 Gapdh Eno1 Pkm Tpi1 Txnip Aldh1a3",
    "dedifferentiation": "Gcg Cck Gast Sox9 Serpina7 Hmgn3",
}
"""Genes that rise along the planted disease programme."""

DOWN = {
    "electron transport chain": (
        "Ndufa1 Ndufa4 Ndufb8 Ndufs2 Ndufs7 Ndufv1 Sdhb Uqcrb Uqcrc1 Uqcrfs1 Cox4i1 Cox5a Cox6c Cox7a2 Atp5b Atp5e "
        "Atp5j Cycs"
    ),
    "insulin secretion": "Ins1 Ins2 Pcsk1 Pcsk2 Slc2a2 Mafa Nkx6-1 Ucn3 G6pc2 Slc30a8 Glp1r Abcc8 Kcnj11 Cacna1c",
}
"""Genes that fall along it."""

OLD = "Cdkn2a Cdkn1a Igf1r Bambi Ccnd2 Trp53inp1 Mki67 Ezh2 Bmi1 Pdgfra"
"""Genes of the age programme, which some healthy donors are further along."""


def symbols(n_genes: int) -> list[str]:
    """Symbols of all simulated genes: the known ones in the order of this file, then invented ones."""
    texts = [*MARKERS.values(), *UP.values(), *DOWN.values(), OLD]
    known = list(dict.fromkeys(name for text in texts for name in text.split()))
    return [*known, *(f"Simg{i + 1:04d}" for i in range(n_genes - len(known)))][:n_genes]


def gene_ids(n_genes: int) -> list[str]:
    """Ids of the form of Ensembl's, from a range that no real gene has."""
    return [f"ENSMUSG{99_000_000_001 + i:011d}" for i in range(n_genes)]
