# Studies: what a config asks for beyond the benchmark. One table and one figure each; perturbed.study_plan knows the fits.


rule tabulate_study:
    input:
        scores=plan.studies.score_files,
        history=plan.studies.history_files,
        probe=plan.studies.probe_file,
        published=plan.studies.published_file,
        details=plan.studies.detail_folders,
    output:
        table=plan.studies.file("table.csv"),
    log:
        plan.studies.file("logs/tabulate.log"),
    benchmark:
        plan.studies.file("benchmarks/tabulate.tsv")
    wildcard_constraints:
        study=plan.studies.constraint(*SCORED),
    group:
        "study"
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=plan.grow(8000),
        runtime=plan.grow(10),
    params:
        spec=plan.studies.slice,
        statistics=plan.section("statistics"),
        history=plan.studies.options("--history", "history"),
        probe=plan.studies.options("--probe", "probe"),
        published=plan.studies.options("--published", "published"),
        details=plan.studies.options("--details", "details"),
    message:
        "Table of study {wildcards.study}"
    shell:
        "perturbed study tabulate {input.scores} --spec {params.spec:q} --statistics {params.statistics:q}"
        " {params.history} {params.probe} {params.published} {params.details} --out {output.table} 2>&1 | tee {log}"


# Both read fitted models and cells and differ in the verb alone.
for _kind, _verb, _message in (
    ("probe", "probe", "Probe representations for the condition"),
    ("latent_map", "map", "Map latents of held-out cells"),
):

    rule:
        name:
            f"study_{_kind}"
        input:
            unpack(plan.studies.model_input),
        output:
            table=plan.studies.file("table.csv"),
        log:
            plan.studies.file(f"logs/{_verb}.log"),
        benchmark:
            plan.studies.file(f"benchmarks/{_verb}.tsv")
        wildcard_constraints:
            study=plan.studies.constraint(_kind),
        conda:
            "../../envs/core.yaml"
        threads: 1
        resources:
            mem_mb=plan.grow(8000),
            runtime=plan.grow(120),
        params:
            verb=_verb,
            spec=plan.studies.slice,
            models=plan.studies.named_models,
        message:
            f"{_message}: {{wildcards.study}}"
        shell:
            "perturbed study {params.verb} --prepared {input.prepared} --split {input.split} --features {input.features}"
            " {params.models} --spec {params.spec:q} --out {output.table} 2>&1 | tee {log}"


rule study_programs:
    input:
        unpack(plan.studies.truth_input),
    output:
        tables=directory(plan.studies.file("programs")),
    log:
        plan.studies.file("logs/programs.log"),
    benchmark:
        plan.studies.file("benchmarks/programs.tsv")
    wildcard_constraints:
        study=plan.studies.constraint("programs"),
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=plan.grow(8000),
        runtime=plan.grow(60),
    params:
        spec=plan.studies.slice,
        models=plan.studies.options("--model", "models"),
        gene_sets=plan.studies.options("--gene-sets", "gene_sets"),
        truth=plan.studies.options("--truth", "truth"),
    message:
        "Latent programs: {wildcards.study}"
    shell:
        "perturbed study programs --prepared {input.prepared} --features {input.features} {params.models}"
        " {params.gene_sets} {params.truth} --spec {params.spec:q} --out {output.tables} 2>&1 | tee {log}"
