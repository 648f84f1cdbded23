"""How hard to search: every default of the engine, in one place.

A profile is a frozen value; `dop tune --effort` picks one by name. Nothing here was fitted to one
recorded space: docs/search.md says how each figure was chosen.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dop.errors import ConfigError


@dataclass(frozen=True, slots=True)
class ModelEffort:
    """How the cost model is trained.

    Attributes:
        objective: "lambdarank", "regression" (of the log of the relative time), or "mixed":
            members of both kinds, which ranked best (docs/search.md).
        min_samples: successful candidates before the trees are trained; until then a Gaussian
            process predicts alone, from three on.
        smooth_rows: most samples for which the Gaussian process has a say beside the trees; 0 is
            never.
        ensemble: models that differ in their seed; the mean ranks.
        rounds: boosting rounds of one model.
        leaves: leaves of a tree.
        learning_rate: shrinkage per round.
        leaf_samples: fewest rows in a leaf.
        feature_share: share of the features that a tree sees.
        max_work: most rows x rounds x models of one training; more rows are thinned. A fixed
            amount of work bounds the time and, unlike a clock, gives the same model every time.
        worst_ratio: slower than this times the best counts as this slow.
    """

    objective: str = "mixed"
    min_samples: int = 24
    smooth_rows: int = 384
    ensemble: int = 4
    rounds: int = 80
    leaves: int = 12
    learning_rate: float = 0.12
    leaf_samples: int = 3
    feature_share: float = 0.7
    max_work: int = 1_500_000
    worst_ratio: float = 20.0


@dataclass(frozen=True, slots=True)
class SearchEffort:
    """How the evolutionary strategy proposes.

    Attributes:
        warm_up: random candidates between the defaults and those that the model picks.
        first_batch: most candidates of a batch while little is known: each answer then counts
            for more than what a full batch saves in time.
        first_until: measured candidates from which batches have their full size; a family with
            as many defaults never has small ones.
        max_defaults: most defaults that are measured before anything else.
        population: candidates in a generation.
        elites: best measured candidates per scenario that enter the first generation.
        newcomers: share of random candidates in the first generation.
        generations: rounds of mutation and crossover per `ask`.
        tournament: contestants from which a parent is chosen.
        crossover: share of children with two parents.
        structural: share of mutations that change the sketch.
        repair: share of the invalid mutants and newcomers that further changes try to make valid.
        epsilon: share of every batch that is random, or goes where the model knows least if not
            every other pick promises a gain.
        explore: share of the picks without a promise that go where the model knows least; the
            others go to good predictions in doubt.
        hinted: share of a batch that neighbours' winners may take while little is known.
        adopted: share of a later batch that they may take, whatever the model thinks of them.
        try_out: share of a batch for sketches that came close with few trials.
        trials: measured candidates from which a sketch has had its try.
        spread: penalty, as a share of the score, for every earlier pick of the batch whose
            annotation differs in at most one value.
        prior_sigma: standard deviation of the model's log error until it was observed.
    """

    warm_up: int = 8
    first_batch: int = 2
    first_until: int = 16
    max_defaults: int = 32
    population: int = 192
    elites: int = 16
    newcomers: float = 0.3
    generations: int = 4
    tournament: int = 4
    crossover: float = 0.3
    structural: float = 0.1
    repair: float = 0.3
    epsilon: float = 0.2
    explore: float = 0.5
    hinted: float = 0.5
    adopted: float = 0.125
    try_out: float = 0.3
    trials: int = 16
    spread: float = 0.1
    prior_sigma: float = 0.25


@dataclass(frozen=True, slots=True)
class Effort:
    """A named profile.

    Attributes:
        name: what `--effort` is given.
        batch: candidates per visit of a family.
        budget_s: wall time if the user names none, in seconds.
        trials: most candidates over all families if the user names none; 0 is no bound.
        patience: visits without an improvement after which a family counts as settled.
        search: the strategy's part.
        model: the cost model's part.
    """

    name: str
    batch: int
    budget_s: float
    trials: int = 0
    patience: int = 12
    search: SearchEffort = field(default_factory=SearchEffort)
    model: ModelEffort = field(default_factory=ModelEffort)


QUICK = Effort("quick", batch=8, budget_s=120.0, patience=6)
FULL = Effort(
    "full",
    batch=16,
    budget_s=900.0,
    patience=20,
    search=SearchEffort(population=384, elites=24, generations=5),
    model=ModelEffort(ensemble=6, rounds=120, max_work=4_000_000),
)

TRANSFER = Effort(
    "transfer",
    batch=8,
    budget_s=60.0,
    patience=2,
    search=SearchEffort(max_defaults=2, hinted=1.0, first_batch=8),
)
"""For a log that holds similar workloads: their winners are measured first, little is searched."""

EFFORTS = {effort.name: effort for effort in (QUICK, FULL, TRANSFER)}


def effort_of(name: str) -> Effort:
    """The profile of a name.

    Raises:
        ConfigError: there is no such profile.
    """
    if name not in EFFORTS:
        raise ConfigError(f"effort {name!r} is unknown.", f"Use one of {', '.join(EFFORTS)}.")
    return EFFORTS[name]
