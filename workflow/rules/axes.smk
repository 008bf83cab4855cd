# Axis cases: gene scores along an axis of the latent space, their pathways, a judge. See perturbed.axis_plan.


rule score_genes:
    input:
        unpack(plan.axes.score_input),
    output:
        tables=directory(plan.axes.file("tables")),
    log:
        plan.axes.file("logs/score_genes.log"),
    benchmark:
        plan.axes.file("benchmarks/score_genes.tsv")
    conda:
        "../../envs/core.yaml"
    threads: plan.config.threads
    resources:
        mem_mb=plan.grow(8000),
        runtime=plan.grow(120),
    params:
        spec=plan.axes.slice("enrichment", "judge", "gene_sets"),
        options=plan.axes.score_options,
    message:
        "Score genes along the axis of {wildcards.axis}"
    shell:
        "perturbed score-genes --cells {input.cells} --model {input.model:q} --spec {params.spec:q} {params.options}"
        " --out {output.tables} 2>&1 | tee {log}"


rule enrich:
    input:
        tables=plan.axes.file("tables"),
        libraries=plan.axes.library_input,
        truth=plan.axes.planted_input,
    output:
        enrichment=directory(plan.axes.file("enrichment")),
    log:
        plan.axes.file("logs/enrich.log"),
    benchmark:
        plan.axes.file("benchmarks/enrich.tsv")
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=plan.grow(4000),
        runtime=plan.grow(60),
    params:
        spec=plan.axes.section("enrichment"),
        libraries=plan.axes.library_options,
        top=plan.axes.top,
        planted=plan.axes.planted_option,
    message:
        "Pathways of {wildcards.axis}"
    shell:
        "perturbed enrich --scores {input.tables} {params.libraries} --spec {params.spec:q} --top {params.top}"
        " {params.planted} --out {output.enrichment} 2>&1 | tee {log}"


rule judge:
    input:
        enrichment=plan.axes.file("enrichment"),
        libraries=plan.axes.library_input,
        replay=plan.axes.replay_input,
    output:
        judgement=directory(plan.axes.file("judgement")),
    log:
        plan.axes.file("logs/judge.log"),
    benchmark:
        plan.axes.file("benchmarks/judge.tsv")
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=plan.grow(2000),
        runtime=plan.grow(240),
    params:
        spec=plan.axes.section("judge"),
        libraries=plan.axes.library_options,
        # answers cost money: they outlive a failed or repeated job
        cache=plan.axes.file("answers.jsonl"),
    message:
        "Judge the pathways of {wildcards.axis}"
    shell:
        "perturbed judge --enrichment {input.enrichment} {params.libraries} --spec {params.spec:q}"
        " --cache {params.cache} --out {output.judgement} 2>&1 | tee {log}"
