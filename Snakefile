# Cells to figures. `snakemake` runs config/config.yaml; see README.md and docs/architecture.md.
from snakemake.utils import min_version

min_version("9.20")


# A config given on the command line stands alone: laid over the default, its splits would be added to the default's.
if not workflow.config_settings.configfiles:

    configfile: "config/config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/splits.smk"
include: "workflow/rules/environments.smk"
include: "workflow/rules/methods.smk"
include: "workflow/rules/evaluation.smk"
include: "workflow/rules/studies.smk"
include: "workflow/rules/identifiability.smk"
include: "workflow/rules/study_figures.smk"
include: "workflow/rules/gradients.smk"
include: "workflow/rules/census.smk"
include: "workflow/rules/axes.smk"
include: "workflow/rules/axis_figures.smk"
include: "workflow/rules/elsewhere.smk"
include: "workflow/rules/report.smk"


report: "workflow/report/workflow.rst"


localrules:
    all,
    demo,
    benchmark,
    figures,


rule all:
    default_target: True
    input:
        plan.products(),
    message:
        "Everything that this configuration asks for"


rule demo:
    input:
        plan.products(),
    message:
        "The embedded default, end to end: what `make run` builds"


rule benchmark:
    input:
        rules.summarise.output.tables,
    message:
        "Scores, summary and contrasts"


rule figures:
    input:
        plan.figure_files(),
    message:
        "Every figure of this configuration"


onsuccess:
    print_longest(plan.config.results)
