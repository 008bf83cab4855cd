# Fit and predict: every method through the same door.


rule fit:
    input:
        prepared=plan.data("prepared.h5ad"),
        split=plan.fold("split.csv"),
        features=plan.fold("features.csv"),
        leakage=plan.fold("leakage.json"),
        environment=plan.environment_input,
        files=plan.side_file_input,
    output:
        model=directory(plan.fit("model")),
        history=plan.fit("training.csv"),
    log:
        plan.fit("logs/fit.log"),
    benchmark:
        plan.fit("benchmarks/fit.tsv")
    conda:
        "../../envs/core.yaml"
    threads: plan.config.threads
    resources:
        mem_mb=plan.resource("mem_mb"),
        runtime=plan.resource("runtime"),
        gpu=plan.gpus,
    params:
        method=plan.method_slice,
        device=plan.config.device,
        checkpoint=lambda wildcards, output: f"{output.model}.checkpoint",
        program=plan.program,
        files=plan.side_file_options,
    message:
        "Fit {wildcards.method} on {wildcards.dataset}, {wildcards.split}, fold {wildcards.fold}, seed {wildcards.seed}"
    shell:
        "{params.program} fit --prepared {input.prepared} --split {input.split} --features {input.features}"
        " --leakage {input.leakage} --method {params.method:q} --name {wildcards.method}"
        " --seed {wildcards.seed} --device {params.device} {params.files}"
        " --threads {threads} --checkpoint {params.checkpoint} --history {output.history} --out {output.model}"
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
    conda:
        "../../envs/core.yaml"
    resources:
        mem_mb=plan.grow(4000),
        runtime=plan.grow(30),
    params:
        program=plan.program,
    message:
        "Predict with {wildcards.method} on {wildcards.dataset}, {wildcards.split}, fold {wildcards.fold}, seed {wildcards.seed}"
    shell:
        "{params.program} predict --model {input.model} --prepared {input.prepared} --split {input.split}"
        " --method {wildcards.method} --seed {wildcards.seed} --out {output.prediction} 2>&1 | tee {log}"
