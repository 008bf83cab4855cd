# Figures from tables, and the self-contained report.


# One rule per figure, because a caption's path cannot hold wildcards.
for _figure in RUN_FIGURES:

    rule:
        name:
            f"draw_{_figure}"
        input:
            tables=plan.result("tables"),
        output:
            svg=report(
                plan.result(f"figures/{_figure}.svg"),
                caption=f"../report/{_figure}.rst",
                category="Benchmark",
                subcategory="All datasets",
                labels={"figure": _figure.replace("_", " ")},
            ),
            png=plan.result(f"figures/{_figure}.png"),
            source=plan.result(f"figures/{_figure}.csv"),
        log:
            plan.result(f"logs/draw_{_figure}.log"),
        benchmark:
            plan.result(f"benchmarks/draw_{_figure}.tsv")
        group:
            "draw"
        conda:
            "../../envs/core.yaml"
        threads: 1
        resources:
            mem_mb=plan.grow(2000),
            runtime=plan.grow(4),
        params:
            figure=_figure,
            stem=plan.stem,
            spec=plan.section("statistics"),
            titles=plan.titles(),
        message:
            "Draw {params.figure}"
        shell:
            "perturbed figure {params.figure} --tables {input.tables} --spec {params.spec:q} --titles {params.titles:q}"
            " --out {params.stem} 2>&1 | tee {log}"


for _figure in SPLIT_FIGURES:

    rule:
        name:
            f"draw_{_figure}"
        input:
            tables=plan.result("tables"),
            details=plan.figure_details(_figure),
        output:
            svg=report(
                plan.result(f"figures/{{dataset}}/{{split}}/{_figure}.svg"),
                caption=f"../report/{_figure}.rst",
                category="Benchmark",
                subcategory="{dataset}, {split}",
                labels={"figure": _figure.replace("_", " ")},
            ),
            png=plan.result(f"figures/{{dataset}}/{{split}}/{_figure}.png"),
            source=plan.result(f"figures/{{dataset}}/{{split}}/{_figure}.csv"),
        log:
            plan.result(f"logs/draw_{{dataset}}_{{split}}_{_figure}.log"),
        benchmark:
            plan.result(f"benchmarks/draw_{{dataset}}_{{split}}_{_figure}.tsv")
        group:
            "draw"
        conda:
            "../../envs/core.yaml"
        threads: 1
        resources:
            mem_mb=plan.grow(2000),
            runtime=plan.grow(4),
        params:
            figure=_figure,
            stem=plan.stem,
            spec=plan.section("statistics"),
            titles=plan.titles(),
            details=plan.detail_options,
        message:
            "Draw {params.figure} of {wildcards.dataset}, {wildcards.split}"
        shell:
            "perturbed figure {params.figure} --tables {input.tables} --dataset {wildcards.dataset}"
            " --split-name {wildcards.split} --spec {params.spec:q} --titles {params.titles:q} {params.details}"
            " --out {params.stem} 2>&1 | tee {log}"


rule resolve_config:
    output:
        config=plan.result("config.yaml"),
    log:
        plan.result("logs/resolve_config.log"),
    benchmark:
        plan.result("benchmarks/resolve_config.tsv")
    conda:
        "../../envs/core.yaml"
    resources:
        mem_mb=plan.grow(1000),
        runtime=plan.grow(5),
    params:
        config=plan.resolved,  # a function: its text holds braces
    message:
        "Write the configuration with every default filled in"
    shell:
        "perturbed config --resolve {params.config:q} --out {output.config} 2>&1 | tee {log}"


rule report:
    input:
        figures=plan.figure_files(),
        tables=plan.table_folder(),
        config=plan.result("config.yaml"),
    output:
        html=plan.result("report.html"),
    log:
        plan.result("logs/report.log"),
    benchmark:
        plan.result("benchmarks/report.tsv")
    conda:
        "../../envs/core.yaml"
    resources:
        mem_mb=plan.grow(2000),
        runtime=plan.grow(20),
    params:
        snakefile=relpath(workflow.main_snakefile),
    message:
        "Assemble the report"
    shell:
        "perturbed report {input.figures} --snakefile {params.snakefile:q} --config {input.config}"
        " --out {output.html} > {log} 2>&1"
