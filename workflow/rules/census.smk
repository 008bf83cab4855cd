# From a Census card to cells, the model that decodes them and the gene sets they are tested on; shared by all configurations.


rule simulate_census:
    output:
        store=directory(plan.axes.census("store")),
        truth=plan.axes.census("truth.csv"),
        gene_sets=plan.axes.census("gene_sets.gmt"),
    log:
        plan.axes.census("logs/simulate.log"),
    benchmark:
        plan.axes.census("benchmarks/simulate.tsv")
    wildcard_constraints:
        census="|".join(plan.axes.simulated) or "(?!)",
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=plan.grow(2000),
        runtime=plan.grow(30),
    params:
        card=plan.axes.cells_slice,
    message:
        "Simulate the Census store {wildcards.census}, with planted truth"
    shell:
        "perturbed census simulate --name {wildcards.census} --card {params.card:q} --store {output.store}"
        " --truth {output.truth} --gene-sets {output.gene_sets} 2>&1 | tee {log}"


rule query_census:
    input:
        unpack(plan.axes.cells_input),
    output:
        cells=plan.axes.census("cells.h5ad"),
    log:
        plan.axes.census("logs/query.log"),
    benchmark:
        plan.axes.census("benchmarks/query.tsv")
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=plan.grow(8000),
        runtime=plan.grow(240),
    params:
        card=plan.axes.cells_slice,
        store=plan.axes.store_option,
    message:
        "Query the Census for {wildcards.census}"
    shell:
        "perturbed census query --name {wildcards.census} --card {params.card:q} {params.store}"
        " --out {output.cells} 2>&1 | tee {log}"


rule fit_census_model:
    input:
        cells=plan.axes.census("cells.h5ad"),
    output:
        model=directory(plan.axes.fitted_model()),
    log:
        plan.axes.census("logs/model_{decoder}.log"),
    benchmark:
        plan.axes.census("benchmarks/model_{decoder}.tsv")
    wildcard_constraints:
        decoder="|".join(plan.axes.fitted) or "(?!)",
    conda:
        "../../envs/core.yaml"
    threads: plan.config.threads
    resources:
        mem_mb=plan.grow(8000),
        runtime=plan.grow(240),
        gpu=plan.resources.gpu,
        gres=plan.resources.gres,
    params:
        card=plan.axes.model_slice,
        device=plan.config.device,
    message:
        "Fit {wildcards.decoder} to {wildcards.census}"
    shell:
        "perturbed census model --name {wildcards.decoder} --card {params.card:q} --cells {input.cells}"
        " --device {params.device} --out {output.model} 2>&1 | tee {log}"


rule fetch_census_model:
    input:
        unpack(plan.axes.model_input),
    output:
        model=directory(plan.axes.fetched_model()),
    log:
        f"{plan.config.data}/models/logs/{{decoder}}.log",
    benchmark:
        f"{plan.config.data}/models/benchmarks/{{decoder}}.tsv"
    wildcard_constraints:
        decoder="|".join(plan.axes.fetched) or "(?!)",
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=plan.grow(4000),
        runtime=plan.grow(120),
    params:
        card=plan.axes.model_slice,
    message:
        "Get the model {wildcards.decoder} and check it"
    shell:
        "perturbed census model --name {wildcards.decoder} --card {params.card:q} --out {output.model} 2>&1 | tee {log}"


rule gene_sets:
    input:
        cells=plan.axes.census("cells.h5ad"),
    output:
        sets=plan.axes.library(),
        mapping=plan.axes.library("mapping.csv"),
    log:
        plan.axes.census("logs/gene_sets_{library}.log"),
    benchmark:
        plan.axes.census("benchmarks/gene_sets_{library}.tsv")
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=plan.grow(2000),
        runtime=plan.grow(30),
    params:
        card=plan.axes.library_slice,
    message:
        "Gene sets of {wildcards.library}, named as in {wildcards.census}"
    shell:
        "perturbed gene-sets --name {wildcards.library} --card {params.card:q} --var-table {input.cells}"
        " --out {output.sets} 2>&1 | tee {log}"
