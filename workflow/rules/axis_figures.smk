# Figures of the axis cases, and a target for each item of a paper that a case answers.


# One rule per kind, because a caption's path cannot hold wildcards.
for _kind in (*AXIS_FIGURES, "flow"):
    _figure = "flow_{flow}" if _kind == "flow" else _kind

    rule:
        name:
            f"draw_axis_{_kind}"
        input:
            unpack(plan.axes.drawn_from(_kind)),
        output:
            svg=report(
                plan.axes.figure(_figure, "svg"),
                caption=f"../report/axis_{_kind}.rst",
                category="Disease axis",
                subcategory=_kind,
                labels=plan.axes.labels,
            ),
            png=plan.axes.figure(_figure, "png"),
            source=plan.axes.figure(_figure, "csv"),
        log:
            plan.axes.file(f"logs/draw_{_figure}.log"),
        benchmark:
            plan.axes.file(f"benchmarks/draw_{_figure}.tsv")
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
            verb=_kind if _kind in ("pathways", "judge") else f"draw {_kind}",
            options=plan.axes.draw_options(_kind),
            stem=plan.stem,
            title=plan.axes.title,
            answers=plan.axes.spell_answers,
        message:
            "Draw {params.kind} of {wildcards.axis}"
        shell:
            "perturbed axis {params.verb} {params.options} --title {params.title:q} --out {params.stem}"
            " 2>&1 | tee {log}"


rule tabulate_axis_pathways:
    input:
        unpack(plan.axes.drawn_from("table")),
    output:
        page=report(
            plan.axes.figure("table", "html"),
            caption="../report/axis_table.rst",
            category="Disease axis",
            subcategory="table",
            labels=plan.axes.labels,
        ),
        table=plan.axes.figure("table", "csv"),
    log:
        plan.axes.file("logs/tabulate_pathways.log"),
    benchmark:
        plan.axes.file("benchmarks/tabulate_pathways.tsv")
    group:
        "draw"
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=plan.grow(1000),
        runtime=plan.grow(4),
    params:
        options=plan.axes.draw_options("table"),
        stem=plan.stem,
        title=plan.axes.title,
        answers=plan.axes.spell_answers,
    message:
        "Table of the pathways of {wildcards.axis}"
    shell:
        "perturbed axis table {params.options} --title {params.title:q} --out {params.stem} 2>&1 | tee {log}"


for _item, _figures in plan.axes.answers.items():

    rule:
        name:
            _item
        input:
            _figures,
        localrule: True
        message:
            f"{_item} is drawn"


rule t2d:
    input:
        plan.axes.targets(),
    localrule: True
    message:
        "Every axis case of this configuration"
