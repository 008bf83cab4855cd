# Gradient cases: follow the gradients of fitted decoders, judge them, draw them. perturbed.gradient_plan knows the fits.


rule flow:
    input:
        unpack(plan.gradients.flow_input),
    output:
        tables=directory(plan.gradients.file("{part}/seed{seed}")),
    log:
        plan.gradients.file("logs/{part}_seed{seed}.log"),
    benchmark:
        plan.gradients.file("benchmarks/{part}_seed{seed}.tsv")
    conda:
        "../../envs/core.yaml"
    threads: plan.config.threads
    resources:
        mem_mb=plan.grow(8000),
        runtime=plan.grow(60),
    params:
        spec=plan.gradients.slice,
        options=plan.gradients.options,
    message:
        "Gradients of {wildcards.case}, {wildcards.part}, seed {wildcards.seed}"
    shell:
        "perturbed flow case --model {input.model} --prepared {input.prepared} --split {input.split}"
        " --features {input.features} --spec {params.spec:q} --seed {wildcards.seed} {params.options}"
        " --out {output.tables} 2>&1 | tee {log}"


rule gather_flows:
    input:
        flows=plan.gradients.flows,
    output:
        tables=directory(plan.gradients.file("tables")),
    log:
        plan.gradients.file("logs/gather.log"),
    benchmark:
        plan.gradients.file("benchmarks/gather.tsv")
    group:
        "gather"
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=plan.grow(2000),
        runtime=plan.grow(10),
    message:
        "Gather seeds and groups of {wildcards.case}"
    shell:
        "perturbed flow gather {input.flows} --out {output.tables} 2>&1 | tee {log}"


# One rule per kind, because a caption's path cannot hold wildcards.
for _kind in CASE_FIGURES:

    rule:
        name:
            f"draw_case_{_kind}"
        input:
            tables=plan.gradients.file("tables"),
        output:
            svg=report(
                plan.gradients.figure(_kind, "svg"),
                caption=f"../report/gradient_{_kind}.rst",
                category="Gradient flows",
                subcategory=_kind,
                labels=plan.gradients.labels,
            ),
            png=plan.gradients.figure(_kind, "png"),
            source=plan.gradients.figure(_kind, "csv"),
        log:
            plan.gradients.file(f"logs/draw_{_kind}.log"),
        benchmark:
            plan.gradients.file(f"benchmarks/draw_{_kind}.tsv")
        wildcard_constraints:
            case=plan.gradients.of_kind(_kind),
        group:
            "draw"
        conda:
            "../../envs/core.yaml"
        threads: 1
        resources:
            mem_mb=plan.grow(2000),
            runtime=plan.grow(4),
        params:
            kind=_kind,
            stem=plan.stem,
            title=plan.gradients.title,
            answers=plan.gradients.spell_answers,
        message:
            "Draw {params.kind} of {wildcards.case}"
        shell:
            "perturbed flow draw {params.kind} --tables {input.tables} --title {params.title:q}"
            " --out {params.stem} 2>&1 | tee {log}"


rule draw_quality:
    input:
        tables=plan.gradients.tables(),
    output:
        svg=report(
            plan.gradients.quality_figure("svg"),
            caption="../report/gradient_quality.rst",
            category="Gradient flows",
            subcategory="quality",
            labels={"case": "all"},
        ),
        png=plan.gradients.quality_figure("png"),
        source=plan.gradients.quality_figure("csv"),
    log:
        plan.result("gradients/logs/draw_quality.log"),
    benchmark:
        plan.result("gradients/benchmarks/draw_quality.tsv")
    group:
        "draw"
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=plan.grow(2000),
        runtime=plan.grow(4),
    params:
        stem=plan.stem,
        titles=plan.gradients.titles(),
    message:
        "Draw the quality of the decoders"
    shell:
        "perturbed flow quality {input.tables} --titles {params.titles:q} --out {params.stem} 2>&1 | tee {log}"


for _item, _figure in plan.gradients.answers.items():

    rule:
        name:
            _item
        input:
            _figure,
        localrule: True
        message:
            f"{_item} is drawn"


rule gradients:
    input:
        plan.gradients.figures(),
    localrule: True
    message:
        "Every gradient case of this configuration"
