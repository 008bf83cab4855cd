# Load and validate the configuration, name the targets, constrain the wildcards. The logic is in perturbed.plan.
import sys
from os import environ
from os.path import relpath
from pathlib import Path

from perturbed.answers import explain
from perturbed.axis_plan import AXIS_FIGURES
from perturbed.gradient_plan import CASE_FIGURES
from perturbed.jobs import print_longest
from perturbed.plan import RUN_FIGURES, SPLIT_FIGURES, read_plan
from perturbed.provenance import date_back, set_aside_torn
from perturbed.side_plan import GRAPH as SIDE_GRAPH
from perturbed.resource_plan import read_gres
from perturbed.study_config import SCORED, STUDY_KINDS

CONFIGS = Path(relpath(workflow.basedir)) / "config"
ENVIRONMENTS = Path(relpath(workflow.basedir)) / "envs"

plan = read_plan(config)
plan.resources.site_gres = read_gres(workflow.resource_settings.default_resources)

# A scheduler asks all processes of a job to end. The shell and `tee` must outlive the program, which cleans up.
# The prefix replaces Snakemake's own, without whose `pipefail` the exit code would be that of `tee`: always 0.
shell.prefix("set -euo pipefail; trap '' TERM; ")

# Where a file comes from changes no result, so it is no parameter: changing it must not fetch anything anew.
environ["PERTURBED_DATA"] = plan.config.data
environ["PERTURBED_MIRROR"] = plan.config.mirror or ""
environ.setdefault("PERTURBED_ROOT", str(workflow.basedir))
environ["PERTURBED_ALLOW_UNPINNED"] = str(int(plan.config.allow_unpinned))

if workflow.is_main_process:
    # A file that exists is done for Snakemake, half a file, too. Who dry-runs or does not have the folder to himself
    # is only told.
    _looks = workflow.output_settings.dryrun or any(
        Path(".snakemake/locks").glob("*.lock")
    )
    _folders = (plan.config.data, plan.config.results)
    _mended = [
        *set_aside_torn(*_folders, only_say=_looks),
        *date_back(*_folders, only_say=_looks),
    ]
    for _line in [*plan.left_out(), *_mended]:
        print(f"perturbed: {_line}", file=sys.stderr)


wildcard_constraints:
    dataset="|".join(plan.cards) or "(?!)",
    split="|".join(plan.config.splits) or "(?!)",
    fold=r"\d+",
    method="|".join(plan.methods),
    seed=r"\d+",
    study="|".join(plan.config.studies) or "(?!)",
    case="|".join(plan.gradients.cases) or "(?!)",
    part="|".join(plan.gradients.parts) or "(?!)",
    axis="|".join(plan.axes.cases) or "(?!)",
    census="|".join(plan.axes.cells) or "(?!)",
    decoder="|".join(plan.axes.models) or "(?!)",
    library="|".join([*plan.axes.libraries, *plan.side.libraries]) or "(?!)",
    flow="|".join(plan.axes.flows) or "(?!)",
    environment="|".join(plan.environments) or "(?!)",
