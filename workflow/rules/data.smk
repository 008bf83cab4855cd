# From a dataset card to prepared cells. Files depend on the card alone and are shared by all configurations.


rule fetch:
    output:
        raw=plan.data("raw.h5ad"),
    log:
        plan.data("logs/fetch.log"),
    benchmark:
        plan.data("benchmarks/fetch.tsv")
    wildcard_constraints:
        dataset="|".join(plan.fetched) or "(?!)",
    conda:
        "../../envs/core.yaml"
    resources:
        mem_mb=plan.grow(8000),
        runtime=plan.grow(240),
    params:
        card=plan.card_slice("source", "keys", "expect"),
    message:
        "Fetch {wildcards.dataset}"
    shell:
        "perturbed fetch --dataset {wildcards.dataset} --card {params.card:q} --out {output.raw} 2>&1 | tee {log}"


rule simulate:
    output:
        raw=plan.data("raw.h5ad"),
        truth=plan.data("truth.h5ad"),
        gene_sets=plan.data("gene_sets.gmt"),
    log:
        plan.data("logs/simulate.log"),
    benchmark:
        plan.data("benchmarks/simulate.tsv")
    wildcard_constraints:
        dataset="|".join(plan.simulated) or "(?!)",
    conda:
        "../../envs/core.yaml"
    resources:
        mem_mb=plan.grow(4000),
        runtime=plan.grow(30),
    params:
        card=plan.card_slice("source"),
    message:
        "Simulate {wildcards.dataset}, with planted truth"
    shell:
        "perturbed simulate --dataset {wildcards.dataset} --card {params.card:q}"
        " --out {output.raw} --truth {output.truth} --gene-sets {output.gene_sets} 2>&1 | tee {log}"


rule prepare:
    input:
        raw=plan.data("raw.h5ad"),
    output:
        prepared=plan.data("prepared.h5ad"),
    log:
        plan.data("logs/prepare.log"),
    benchmark:
        plan.data("benchmarks/prepare.tsv")
    conda:
        "../../envs/core.yaml"
    resources:
        mem_mb=plan.resources.prepare,
        runtime=plan.grow(60),
    params:
        card=plan.card_slice("source", "keys", "prepare", "expect"),
    message:
        "Prepare {wildcards.dataset}: canonical names, quality control, normalisation"
    shell:
        "perturbed prepare --dataset {wildcards.dataset} --raw {input.raw} --card {params.card:q}"
        " --out {output.prepared} 2>&1 | tee {log}"


# What cards name beside the cells: a library of gene sets by its card, a graph of genes by its address.
rule dataset_gene_sets:
    input:
        prepared=plan.data("prepared.h5ad"),
    output:
        sets=plan.side.library(),
        mapping=plan.side.library("mapping.csv"),
    log:
        plan.data("logs/gene_sets_{library}.log"),
    benchmark:
        plan.data("benchmarks/gene_sets_{library}.tsv")
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=plan.grow(4000),
        runtime=plan.grow(60),
    params:
        card=plan.side.library_slice,
    message:
        "Gene sets of {wildcards.library} for {wildcards.dataset}"
    shell:
        "perturbed gene-sets --name {wildcards.library} --card {params.card:q} --var-table {input.prepared}"
        " --out {output.sets} 2>&1 | tee {log}"


rule fetch_gene_graph:
    output:
        graph=plan.data(SIDE_GRAPH),
    log:
        plan.data("logs/gene_graph.log"),
    benchmark:
        plan.data("benchmarks/gene_graph.tsv")
    wildcard_constraints:
        dataset="|".join(plan.side.graphs) or "(?!)",
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=plan.grow(2000),
        runtime=plan.grow(120),
    params:
        file=plan.side.graph_slice,
    message:
        "Fetch the graph of genes of {wildcards.dataset}"
    shell:
        "perturbed fetch-file --file {params.file:q} --out {output.graph:q} 2>&1 | tee {log}"
