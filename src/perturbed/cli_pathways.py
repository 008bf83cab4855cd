"""`perturbed gene-sets` and `perturbed enrich`: libraries of pathways, and which of them lists of genes are rich in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from perturbed.cli_options import DataDir, Mirror, Out, Spec, Unpinned, read_libraries, read_option

GeneTable = Annotated[
    Path | None, typer.Option(help="The data's genes: an h5ad, or a csv with symbol and, for Ensembl ids, gene.")
]


def gene_sets(
    card: Annotated[str, typer.Option("--card", help="Card of the library: YAML or JSON text, or a file.")],
    name: Annotated[str, typer.Option(help="Name of the library.")],
    out: Out,
    var_table: GeneTable = None,
    data_dir: DataDir = Path("data"),
    mirror: Mirror = "",
    allow_unpinned: Unpinned = False,
) -> None:
    """Get a library of gene sets and write it with the data's symbols, and what was lost (STEM.mapping.csv)."""
    from perturbed.config import parse
    from perturbed.pathways.gene_sets import Access, write_gene_sets
    from perturbed.pathways.spec import GeneSetCard, GeneSetPath
    from perturbed.provenance import recorded

    parsed = parse(GeneSetCard, read_option(card, "--card"), "--card")
    access = Access(data_dir, Path(mirror) if mirror else None, allow_unpinned)
    settings = {"name": name, "card": parsed.model_dump(mode="json")}
    read = [parsed.source.path] if isinstance(parsed.source, GeneSetPath) else []
    beside = [out.with_name(f"{out.stem}.mapping.csv")]
    with recorded("gene-sets", out, {"var_table": var_table}, settings, read=read, beside=beside) as record:
        record["sorted_sha256"] = write_gene_sets(parsed, name, out, access=access, var_table=var_table)


def enrich(
    scores: Annotated[Path, typer.Option(help="Folder with rankings.csv.")],
    gene_sets: Annotated[list[str], typer.Option("--gene-sets", help="NAME=PATH of `perturbed gene-sets`; repeat.")],
    out: Out,
    spec: Spec = "{}",
    top: Annotated[int, typer.Option(help="Genes of each list.", min=1)] = 200,
    genome: Annotated[Path | None, typer.Option(help="csv of the genes of the background `genome`.")] = None,
    planted: Annotated[list[str] | None, typer.Option(help="Planted pathway, or how its name begins; repeat.")] = None,
    truth: Annotated[Path | None, typer.Option(help="truth.csv of a simulation, which names planted pathways.")] = None,
) -> None:
    """Test lists of genes for pathways, beside random lists of like expression: a folder of tables."""
    from perturbed.config import parse
    from perturbed.pathways.enrichment import write_enrichment
    from perturbed.pathways.gene_sets import read_planted
    from perturbed.pathways.spec import EnrichmentSpec
    from perturbed.provenance import recorded

    parsed = parse(EnrichmentSpec, read_option(spec, "--spec"), "--spec")
    libraries, rankings = read_libraries(gene_sets), scores / "rankings.csv"
    named = [*(planted or ()), *(() if truth is None else read_planted(truth))]
    settings = {"spec": parsed.model_dump(mode="json"), "top": top, "planted": named}
    inputs, read = {"rankings": rankings, "genome": genome, **libraries}, [] if truth is None else [truth]
    with recorded("enrich", out, inputs, settings, read=read):
        write_enrichment(rankings, libraries, parsed, out, top=top, genome=genome, planted=named)
