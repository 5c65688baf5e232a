#!/usr/bin/env python3
"""Reference runs of CMA-ES, from `pycma`, for the tests of crates/tune.

Its default parameters for several sizes; short runs with every candidate, to be replayed; and how fast it converges on
standard functions. Run from the repository root, then commit what changed:

    python3 -m venv venv && venv/bin/pip install cma numpy
    venv/bin/python tools/pycma-vectors.py crates/tune/tests/vectors/pycma.json
"""
import json
import sys
import warnings

import numpy as np

warnings.filterwarnings("ignore")
import cma  # noqa: E402  (it warns of a missing plotting library)


def sphere(x):
    return float(np.sum(x**2))


def ellipsoid(x):
    return float(np.sum(10 ** (6 * np.arange(len(x)) / (len(x) - 1)) * x**2))


def rosenbrock(x):
    return float(np.sum(100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2))


CSA = cma.sigma_adaptation.CMAAdaptSigmaCSA
FUNCTIONS = dict(sphere=sphere, ellipsoid=ellipsoid, rosenbrock=rosenbrock)


def strategy(n, start, sigma, popsize, seed, **options):
    quiet = dict(verbose=-9, popsize=popsize, seed=seed, CMA_mirrors=0, AdaptSigma=CSA, maxiter=10**9, tolfun=0, tolfunhist=0, tolx=0)
    return cma.CMAEvolutionStrategy(n * [start], sigma, quiet | options)


def parameters(n, popsize):
    es = strategy(n, 0.0, 1.0, popsize, 1)
    es.tell(es.ask(), list(range(popsize)))  # learning rates are set lazily
    sampler = es.sm.parameters()
    return dict(
        dimension=n, population=popsize, weights=list(es.sp.weights), mueff=es.sp.weights.mueff, cc=es.sp.cc,
        c1=sampler["c1"], cmu=sampler["cmu"], cs=es.adapt_sigma.cs, damps=es.adapt_sigma.damps,
        gap=es.sm.lazy_update_gap,
    )


def replay(name, n, popsize, generations, gap):
    """A run with its candidates; `gap` is the generations between eigendecompositions."""
    es = strategy(n, 0.5, 0.7, popsize, 7, updatecovwait=gap)
    steps = []
    for _ in range(generations):
        candidates = es.ask()
        losses = [FUNCTIONS[name](x) for x in candidates]
        es.tell(candidates, losses)
        steps.append(dict(candidates=[list(x) for x in candidates], losses=losses, mean=list(es.mean), sigma=es.sigma))
    return dict(dimension=n, population=popsize, gap=gap, steps=steps, covariance=es.sm.C.tolist())


def curve(name, n, popsize, sigma, evaluations, every):
    """The best value so far at every `every` evaluations, for three seeds."""
    start = 0.0 if name == "rosenbrock" else 1.0
    runs = []
    for seed in (1, 2, 3):
        es, best, values = strategy(n, start, sigma, popsize, seed), np.inf, []
        while es.countevals < evaluations:
            candidates = es.ask()
            losses = [FUNCTIONS[name](x) for x in candidates]
            es.tell(candidates, losses)
            best = min(best, *losses)
            if es.countevals % every < popsize:
                values.append(best)
        runs.append(values)
    return dict(function=name, dimension=n, population=popsize, sigma=sigma, every=every, runs=runs)


def main(path):
    out = dict(
        version=cma.__version__,
        parameters=[parameters(n, p) for n, p in [(2, 6), (5, 8), (10, 10), (40, 15), (500, 20), (500, 100), (3, 50)]],
        replays=[
            replay("ellipsoid", 4, 8, 25, 0), replay("rosenbrock", 5, 20, 15, 0), replay("ellipsoid", 6, 9, 24, 3),
        ],
        curves=[curve(f, 10, 10, 0.5, 6000, 500) for f in FUNCTIONS]
        + [curve(f, 500, 20, 1.0, 4000, 400) for f in FUNCTIONS],
    )
    with open(path, "w") as file:
        json.dump(out, file)
        file.write("\n")


if __name__ == "__main__":
    main(sys.argv[1])
