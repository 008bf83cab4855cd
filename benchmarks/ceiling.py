"""What any method could gain over the noise-free additive baseline on the doubles of `simulation_epistasis`.

python benchmarks/ceiling.py [--cells 8000] [--seed 1] [--doubles 36]

The kind of a double and the program that a threshold double switches on are drawn at random, so the singles cannot tell
them. Every double is simulated under each kind and program that it could have had; `expected` is the mean of these,
`median` their geometric median, which has the least expected L2. Both know the generator and all noise-free singles:
no method that is told neither the kind nor the program can do better on average. `log-rate` is a double whose effects
just add there, `link` the same sum on log(eᵐ − 1) of noise-free means m.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from perturbed.config import parse, read_yaml
from perturbed.data.cards import Card, SimulationSource
from perturbed.data.simulate import BLOCK, build_generator
from perturbed.data.simulators.epistasis import Epistasis
from perturbed.data.simulators.world import (
    TRUTH,
    TRUTH_COUNTS,
    draw_counts,
    draw_overdispersion,
    expected_counts,
    log_normalise,
    stream,
)
from perturbed.evaluation.bootstrap import estimate_mean, plan_draws
from perturbed.models.interaction import add_on_link

CARD = Path(__file__).parents[1] / "config/datasets/simulation_epistasis.yaml"
Variant = tuple[str, int]  # a kind and the program that is switched on, -1 for none


def open_generator(seed: int, n_doubles: int) -> Epistasis:
    """The screen of the card with another seed or number of doubles."""
    card = parse(Card, read_yaml(CARD), str(CARD))
    assert isinstance(card.source, SimulationSource)
    params = {**card.source.params, "n_doubles": n_doubles}
    generator = build_generator(card.source.model_copy(update={"seed": seed, "params": params}), "ceiling")
    assert isinstance(generator, Epistasis)
    return generator


def variants_of(generator: Epistasis, key: tuple[int, ...]) -> dict[Variant, float]:
    """Everything a double could have been, with its probability; `additive` has none."""
    free = np.flatnonzero(np.abs(generator.activity[list(key), 1:]).sum(axis=0) == 0) + 1
    switched = {("threshold", int(program)): 1 / (3 * len(free)) for program in free}
    return {("saturating", -1): 1 / 3, ("multiplicative", -1): 1 / 3, **switched, ("additive", -1): 0.0}


def average(generator: Epistasis, n_cells: int) -> dict[tuple[tuple[int, ...], Variant | None], np.ndarray]:
    """Noise-free means of control, singles and every variant of every double, over the same cells."""
    world, total = generator.world, {}
    kinds = dict(generator.kinds)
    for block in range(-(-n_cells // BLOCK)):
        rng = stream(world.seed, TRUTH, block)
        cells = world.draw_background(rng, BLOCK)
        factor = draw_overdispersion(world.dispersion, BLOCK, rng)
        for key in world.conditions.values():
            variants = variants_of(generator, key) if len(key) == 2 else [None]
            for variant in variants:
                if variant:
                    generator.kinds[key], generator.switched[key] = variant
                rate = expected_counts(generator.respond(key, cells).log_rate, cells.depth)
                counts = draw_counts(
                    rate, factor, generator.dropout(key, rate), stream(world.seed, TRUTH_COUNTS, block)
                )
                total[key, variant] = total.get((key, variant), 0.0) + log_normalise(counts).mean(axis=0)
    generator.kinds = kinds
    return {key: value / -(-n_cells // BLOCK) for key, value in total.items()}


def geometric_median(points: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Point of least weighted distance to `points`, by Weiszfeld's iteration."""
    found = weights @ points
    for _ in range(200):
        pull = weights / np.maximum(np.linalg.norm(points - found, axis=1), 1e-9)
        found = pull @ points / pull.sum()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=8000, help="cells of each noise-free mean")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--doubles", type=int, default=36)
    arguments = parser.parse_args()
    generator = open_generator(arguments.seed, arguments.doubles)
    kinds, switched = dict(generator.kinds), dict(generator.switched)
    means = average(generator, arguments.cells)
    control, names, rows = means[(), None], [], []
    for key, kind in kinds.items():
        chances = variants_of(generator, key)
        points = np.stack([means[key, variant] for variant in chances])
        weights = np.array(list(chances.values()))
        effects = np.stack([means[(gene,), None] - control for gene in key])
        predictions = {
            "additive": control + effects.sum(axis=0),
            "link": control + add_on_link(effects, control, 0.1),
            "log-rate": means[key, ("additive", -1)],
            "expected": weights @ points,
            "median": geometric_median(points[weights > 0], weights[weights > 0]),
        }
        truth = means[key, (kind, switched[key] if kind == "threshold" else -1)]
        names.append(generator.world.name(key))
        rows.append([float(np.linalg.norm(prediction - truth)) for prediction in predictions.values()])
    scores, plan = np.array(rows), plan_draws(names, 4000, (0, 1))
    for column, name in enumerate(predictions):
        gain = estimate_mean(plan, scores[:, :1], scores[:, [column]], names=("additive", name))
        own = {kind: scores[np.array(list(kinds.values())) == kind] for kind in sorted(set(kinds.values()))}
        by_kind = ", ".join(f"{kind} {(s[:, 0] - s[:, column]).mean():+.3f}" for kind, s in own.items())
        interval = f"{gain.value:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}]" if column else ""
        print(f"{name:<10} L2 {scores[:, column].mean():.3f}  gain {interval}  {by_kind}")


if __name__ == "__main__":
    main()
