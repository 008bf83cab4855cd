# Fit and predict: every method through the same door.


rule fit:
    input:
        prepared=plan.data("prepared.h5ad"),
        split=plan.fold("split.csv"),
        features=plan.fold("features.csv"),
        leakage=plan.fold("leakage.json"),
        environment=plan.environment_input,
        files=plan.side.input,
    output:
        model=directory(plan.fit("model")),
        history=plan.fit("training.csv"),
    log:
        plan.fit("logs/fit.log"),
    benchmark:
        plan.fit("benchmarks/fit.tsv")
    group:
        plan.resources.fit_group
    conda:
        "../../envs/core.yaml"
    threads: plan.config.threads
    resources:
        mem_mb=plan.resources.of_method("mem_mb"),
        runtime=plan.resources.of_method("runtime"),
        gpu=plan.resources.fit_gpu,
        gres=plan.resources.fit_gres,
    params:
        method=plan.method_slice,
        device=plan.config.device,
        checkpoint=lambda wildcards, output: f"{output.model}.checkpoint",
        program=plan.program,
        files=plan.side.options,
        memory_gb=plan.resources.cells_gb,
    message:
        "Fit {wildcards.method} on {wildcards.dataset}, {wildcards.split}, fold {wildcards.fold}, seed {wildcards.seed}"
    shell:
        "{params.program} fit --prepared {input.prepared} --split {input.split} --features {input.features}"
        " --leakage {input.leakage} --method {params.method:q} --name {wildcards.method}"
        " --seed {wildcards.seed} --device {params.device} {params.files}"
        " --threads {threads} --memory-gb {params.memory_gb} --checkpoint {params.checkpoint} --history {output.history} --out {output.model}"
        " 2>&1 | tee {log}"


rule predict:
    input:
        model=plan.fit("model"),
        prepared=plan.data("prepared.h5ad"),
        split=plan.fold("split.csv"),
    output:
        prediction=plan.fit("prediction.h5ad"),
    log:
        plan.fit("logs/predict.log"),
    benchmark:
        plan.fit("benchmarks/predict.tsv")
    group:
        "score"
    conda:
        "../../envs/core.yaml"
    resources:
        mem_mb=plan.grow(4000),
        runtime=plan.resources.by_size(2, per_gb=1),
    params:
        program=plan.program,
    message:
        "Predict with {wildcards.method} on {wildcards.dataset}, {wildcards.split}, fold {wildcards.fold}, seed {wildcards.seed}"
    shell:
        "{params.program} predict --model {input.model} --prepared {input.prepared} --split {input.split}"
        " --method {wildcards.method} --seed {wildcards.seed} --out {output.prediction} 2>&1 | tee {log}"
