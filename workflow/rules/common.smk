# Load and validate the configuration, name the targets, constrain the wildcards. The logic is in perturbed.plan.
from os import environ
from os.path import relpath

from perturbed.plan import RUN_FIGURES, SPLIT_FIGURES, read_plan

plan = read_plan(config)

# Where a file comes from changes no result, so it is no parameter: changing it must not fetch anything anew.
environ["PERTURBED_DATA"] = plan.config.data
environ["PERTURBED_MIRROR"] = plan.config.mirror or ""
environ["PERTURBED_ALLOW_UNPINNED"] = str(int(plan.config.allow_unpinned))


wildcard_constraints:
    dataset="|".join(plan.cards),
    split="|".join(plan.config.splits),
    fold=r"\d+",
    method="|".join(plan.methods),
    seed=r"\d+",
