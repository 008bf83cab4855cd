# What trains and what is tested, the features of the training cells, and the proof that nothing leaks.


rule split:
    input:
        prepared=plan.data("prepared.h5ad"),
    output:
        split=plan.fold("split.csv"),
    log:
        plan.fold("logs/split.log"),
    benchmark:
        plan.fold("benchmarks/split.tsv")
    group:
        "fold"
    conda:
        "../../envs/core.yaml"
    resources:
        mem_mb=plan.grow(2000),
        runtime=plan.grow(10),
    params:
        spec=plan.split_slice,
    message:
        "Split {wildcards.dataset} by {wildcards.split}, fold {wildcards.fold}"
    shell:
        "perturbed split --dataset {wildcards.dataset} --name {wildcards.split} --fold {wildcards.fold}"
        " --prepared {input.prepared} --spec {params.spec:q} --out {output.split} 2>&1 | tee {log}"


rule features:
    input:
        prepared=plan.data("prepared.h5ad"),
        split=plan.fold("split.csv"),
    output:
        features=plan.fold("features.csv"),
    log:
        plan.fold("logs/features.log"),
    benchmark:
        plan.fold("benchmarks/features.tsv")
    group:
        "fold"
    conda:
        "../../envs/core.yaml"
    resources:
        mem_mb=plan.grow(8000),
        runtime=plan.grow(60),
    params:
        spec=plan.feature_slice,
    message:
        "Genes, scaling and PCA from the training cells of {wildcards.dataset}, {wildcards.split}, fold {wildcards.fold}"
    shell:
        "perturbed features --prepared {input.prepared} --split {input.split} --spec {params.spec:q}"
        " --out {output.features} 2>&1 | tee {log}"


rule check_leakage:
    input:
        prepared=plan.data("prepared.h5ad"),
        split=plan.fold("split.csv"),
        features=plan.fold("features.csv"),
    output:
        leakage=plan.fold("leakage.json"),
    log:
        plan.fold("logs/check_leakage.log"),
    benchmark:
        plan.fold("benchmarks/check_leakage.tsv")
    group:
        "fold"
    conda:
        "../../envs/core.yaml"
    resources:
        mem_mb=plan.grow(8000),
        runtime=plan.grow(60),
    message:
        "Prove that no test cell of {wildcards.dataset}, {wildcards.split}, fold {wildcards.fold} reaches training"
    shell:
        "perturbed check-leakage --prepared {input.prepared} --split {input.split} --features {input.features}"
        " --out {output.leakage} 2>&1 | tee {log}"
