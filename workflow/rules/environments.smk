# Environments of methods whose packages do not go with ours.


rule environment:
    input:
        lock=f"{ENVIRONMENTS}/{{environment}}.lock",
    output:
        ready=".envs/{environment}/.ready",
    log:
        ".envs/logs/{environment}.log",
    benchmark:
        ".envs/benchmarks/{environment}.tsv"
    conda:
        "../../envs/core.yaml"
    threads: 1
    resources:
        mem_mb=plan.grow(2000),
        runtime=plan.grow(60),
    params:
        script=f"{ENVIRONMENTS}/environment.sh",
    message:
        "Make the environment {wildcards.environment}"
    shell:
        "{params.script:q} {wildcards.environment} 2>&1 | tee {log}"
