# The only stage that opens the test cells: scores, their floors and ceilings, and the judgement of differences.


rule evaluate:
    input:
        truth=plan.data("prepared.h5ad"),
        split=plan.fold("split.csv"),
        features=plan.fold("features.csv"),
        prediction=plan.fit("prediction.h5ad"),
    output:
        scores=plan.fit("scores.parquet"),
        details=directory(plan.fit("details")),
    log:
        plan.fit("logs/evaluate.log"),
    benchmark:
        plan.fit("benchmarks/evaluate.tsv")
    group:
        "score"
    conda:
        "../../envs/core.yaml"
    resources:
        mem_mb=plan.grow(4000),
        runtime=plan.resources.by_size(5, per_gb=3),
    params:
        spec=plan.section("evaluation", "n_halves", "references"),
    message:
        "Score {wildcards.method} on {wildcards.dataset}, {wildcards.split}, fold {wildcards.fold}, seed {wildcards.seed}"
    shell:
        "perturbed evaluate --truth {input.truth} --split {input.split} --features {input.features}"
        " --prediction {input.prediction} --spec {params.spec:q} --details {output.details} --out {output.scores}"
        " 2>&1 | tee {log}"


rule references:
    input:
        unpack(plan.reference_input),
    output:
        scores=plan.fold("references.parquet"),
    log:
        plan.fold("logs/references.log"),
    benchmark:
        plan.fold("benchmarks/references.tsv")
    group:
        "score"
    conda:
        "../../envs/core.yaml"
    resources:
        mem_mb=plan.grow(8000),
        runtime=plan.resources.by_size(5, per_gb=6),
    params:
        spec=plan.section("evaluation", "references"),
        noise_free=plan.noise_free_option,
    message:
        "Score the floors and ceilings of {wildcards.dataset}, {wildcards.split}, fold {wildcards.fold}"
    shell:
        "perturbed evaluate --references --truth {input.truth} --split {input.split} --features {input.features}"
        " {params.noise_free} --spec {params.spec:q} --out {output.scores} 2>&1 | tee {log}"


rule summarise:
    input:
        scores=plan.score_files(),
    output:
        tables=directory(plan.result("tables")),
    log:
        plan.result("logs/summarise.log"),
    benchmark:
        plan.result("benchmarks/summarise.tsv")
    conda:
        "../../envs/core.yaml"
    resources:
        mem_mb=plan.grow(8000),
        runtime=plan.grow(60),
    params:
        spec=plan.section("statistics"),
        config=plan.capability_slice,  # a function: its text may hold braces
    message:
        "Summarise every score and judge the differences"
    shell:
        "perturbed summarise {input.scores} --spec {params.spec:q} --config {params.config:q}"
        " --out {output.tables} 2>&1 | tee {log}"
