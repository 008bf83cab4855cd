# Figures of the studies, and a target for each item of a paper that a study answers.


# One rule per kind, because a caption's path cannot hold wildcards.
for _kind in STUDY_KINDS:

    rule:
        name:
            f"draw_{_kind}"
        input:
            table=plan.studies.file("programs" if _kind == "programs" else "table.csv"),
        output:
            svg=report(
                plan.studies.figure("svg"),
                caption=f"../report/{_kind}.rst",
                category="Paper A",
                subcategory=_kind.replace("_", " "),
                labels=plan.studies.labels,
            ),
            png=plan.studies.figure("png"),
            source=plan.studies.figure("csv"),
        log:
            plan.studies.file("logs/draw.log"),
        benchmark:
            plan.studies.file("benchmarks/draw.tsv")
        wildcard_constraints:
            study=plan.studies.constraint(_kind),
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
            spec=plan.studies.drawing_slice,
            titles=plan.titles(),
            answers=plan.studies.spell_answers,
            left_out=plan.studies.spell_left_out,
        message:
            "Draw study {wildcards.study}"
        shell:
            "perturbed study draw --table {input.table} --spec {params.spec:q} --titles {params.titles:q}"
            " --out {params.stem} 2>&1 | tee {log}"


for _item, _names in plan.studies.answers.items():

    rule:
        name:
            _item
        input:
            plan.studies.figures(_names),
        localrule: True
        message:
            f"{_item} is drawn"


rule studies:
    input:
        plan.studies.figures(plan.config.studies),
    localrule: True
    message:
        "Every study of this configuration"
