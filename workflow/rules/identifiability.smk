# Identifiability studies: one job for each setting and seed, and their join.


rule identify:
    output:
        table=plan.studies.file("{setting}/seed{seed}.csv"),
    log:
        plan.studies.file("logs/{setting}_seed{seed}.log"),
    benchmark:
        plan.studies.file("benchmarks/{setting}_seed{seed}.tsv")
    wildcard_constraints:
        study=plan.studies.constraint("identifiability"),
        setting="[^/]+",
    group:
        "identify"
    conda:
        "../../envs/core.yaml"
    threads: plan.config.threads
    resources:
        mem_mb=plan.grow(4000),
        runtime=plan.grow(30),
        gpu=plan.resources.small_gpu,
        gres=plan.resources.small_gres,
    params:
        setting=plan.studies.setting_slice,
        device=plan.resources.small_device,
    message:
        "Identifiability: {wildcards.setting}, seed {wildcards.seed}"
    shell:
        "perturbed study identify --setting {params.setting:q} --seed {wildcards.seed}"
        " --device {params.device} --threads {threads} --out {output.table} 2>&1 | tee {log}"


rule gather_study:
    input:
        parts=plan.studies.parts,
    output:
        table=plan.studies.file("table.csv"),
    log:
        plan.studies.file("logs/gather.log"),
    benchmark:
        plan.studies.file("benchmarks/gather.tsv")
    wildcard_constraints:
        study=plan.studies.constraint("identifiability"),
    group:
        "study"
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=plan.grow(2000),
        runtime=plan.grow(10),
    message:
        "Join the jobs of study {wildcards.study}"
    shell:
        "perturbed study gather {input.parts} --out {output.table} 2>&1 | tee {log}"
