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
    retries: 2
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
        mem_mb=lambda wildcards, input, attempt: attempt
        * max(4000, 8 * int(input.size_mb)),
        runtime=plan.grow(60),
    params:
        card=plan.card_slice("source", "keys", "prepare", "expect"),
    message:
        "Prepare {wildcards.dataset}: canonical names, quality control, normalisation"
    shell:
        "perturbed prepare --dataset {wildcards.dataset} --raw {input.raw} --card {params.card:q}"
        " --out {output.prepared} 2>&1 | tee {log}"
