# Load and validate the configuration, name the targets, constrain the wildcards. The logic is in perturbed.plan.
from os.path import relpath

from perturbed.plan import RUN_FIGURES, SPLIT_FIGURES, read_plan

plan = read_plan(config)


wildcard_constraints:
    dataset="|".join(plan.cards),
    split="|".join(plan.config.splits),
    fold=r"\d+",
    method="|".join(plan.methods),
    seed=r"\d+",
