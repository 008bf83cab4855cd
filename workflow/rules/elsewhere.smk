# A target of the papers that this configuration does not answer says which one does.
for _item in [
    *plan.studies.unanswered(),
    *plan.gradients.unanswered(),
    *plan.axes.unanswered(),
]:

    rule:
        name:
            _item
        log:
            plan.result(f"logs/{_item}.log"),
        localrule: True
        conda:
            "../../envs/core.yaml"
        params:
            reason=explain(_item, CONFIGS),
        shell:
            "echo perturbed: {params.reason:q} | tee {log} >&2; exit 1"
