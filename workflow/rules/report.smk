# Figures from tables, and the self-contained report.


rule run_figure:
    input:
        tables=plan.result("tables"),
    output:
        svg=report(
            plan.result("figures/{figure}.svg"),
            caption="../report/{figure}.rst",
            category="Benchmark",
            subcategory="All datasets",
            labels={"figure": "{figure}"},
        ),
        png=plan.result("figures/{figure}.png"),
        source=plan.result("figures/{figure}.csv"),
    log:
        plan.result("logs/figure_{figure}.log"),
    benchmark:
        plan.result("benchmarks/figure_{figure}.tsv")
    conda:
        "../../envs/core.yaml"
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        stem=plan.stem,
        spec=plan.section("statistics"),
        titles=plan.titles(),
    message:
        "Draw {wildcards.figure}"
    shell:
        "perturbed figure {wildcards.figure} --tables {input.tables} --spec {params.spec:q} --titles {params.titles:q}"
        " --out {params.stem} 2>&1 | tee {log}"


rule split_figure:
    input:
        tables=plan.result("tables"),
        details=plan.figure_details,
    output:
        svg=report(
            plan.result("figures/{dataset}/{split}/{figure}.svg"),
            caption="../report/{figure}.rst",
            category="Benchmark",
            subcategory="{dataset}, {split}",
            labels={"figure": "{figure}"},
        ),
        png=plan.result("figures/{dataset}/{split}/{figure}.png"),
        source=plan.result("figures/{dataset}/{split}/{figure}.csv"),
    log:
        plan.result("logs/figure_{dataset}_{split}_{figure}.log"),
    benchmark:
        plan.result("benchmarks/figure_{dataset}_{split}_{figure}.tsv")
    conda:
        "../../envs/core.yaml"
    resources:
        mem_mb=2000,
        runtime=10,
    params:
        stem=plan.stem,
        spec=plan.section("statistics"),
        titles=plan.titles(),
        details=plan.detail_options,
    message:
        "Draw {wildcards.figure} of {wildcards.dataset}, {wildcards.split}"
    shell:
        "perturbed figure {wildcards.figure} --tables {input.tables} --dataset {wildcards.dataset}"
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
        mem_mb=1000,
        runtime=5,
    params:
        config=plan.resolved(),
    message:
        "Write the configuration with every default filled in"
    shell:
        "perturbed config --resolve {params.config:q} --out {output.config} 2>&1 | tee {log}"


rule report:
    input:
        figures=plan.figure_files(),
        tables=plan.result("tables"),
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
        mem_mb=2000,
        runtime=20,
    message:
        "Assemble the report"
    shell:
        # Snakemake's own report of the finished part of this very run; it reads, so it needs no lock.
        "snakemake --snakefile {workflow.main_snakefile:q} --configfile {input.config} --nolock --quiet all"
        " --report {output.html} -- {input.figures} > {log} 2>&1"
