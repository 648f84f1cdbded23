"""Evolutionary search: mutation and crossover, judged by the cost model before any build."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dop.cost_model.base import CostModel, FloatArray
from dop.cost_model.metric import spearman
from dop.effort import SearchEffort
from dop.scenario import Scenario
from dop.search.crossover import cross
from dop.search.history import History, PointKey, Result, point_key
from dop.search.mutator import MUTATORS
from dop.search.mutator.structure import change_sketch
from dop.search.repair import repaired
from dop.search.selection import acquisition, diverse, tournament
from dop.search.strategy import Strategy
from dop.space.early import may_serve, plainly
from dop.space.sketch import Annotation, Candidate, Sketch, Space
from dop.target import Target
from dop.workload import Workload

_HINTED = 10
"""Candidates behind the warm-up among which hints still come first."""

_RECENT = 64
"""Predictions over which the model's error is estimated."""

_STRANGERS = 768
"""Random points among which the least known are sought. With 192 the rank correlation after 100
measurements was below 0.8 in 3 searches of 16 on a recorded CPU table, with 768 in none."""

_DOUBT = 3.0
"""By how much the model's deviation is taken to be too small where it promises nothing. The
recorded CPU tables took 62 and 42 measurements (means of 32 seeds) with 3, 64 and 43 with 1."""

_RIVAL = 1.6
"""A sketch whose best takes at most this times the best of a scenario may win there once tuned."""

_VARIANTS = 48
"""Points of a sketch among which its next trial is chosen."""

_COMPROMISES = 3
"""Elites for each number of tokens that lose least whatever the mix."""

_NO_USE = 3.0
"""What is expected of a point where it may not serve: log(time / best time)."""

_MIN_SIGMA = 0.02
"""Noise of a measurement: no prediction is trusted beyond it."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A valid point whose trace was not bound yet: most are never built."""

    sketch: Sketch
    annotation: tuple[tuple[str, int], ...]

    @staticmethod
    def of(sketch: Sketch, values: Annotation) -> Draft | None:
        """The draft of an annotation, or None if it breaks a limit."""
        if sketch.broken_limit(values) is not None:
            return None
        return Draft(sketch, tuple(sorted(values.items())))

    @property
    def key(self) -> PointKey:
        """Identity of the point."""
        return point_key(self)


@dataclass(frozen=True, slots=True)
class Pool:
    """Points of one evolution and what each promises."""

    drafts: dict[PointKey, Draft]
    scores: dict[PointKey, float]

    def ranked(self) -> list[PointKey]:
        """The points, those that promise most first."""
        return sorted(self.scores, key=lambda k: -self.scores[k])

    def promising(self, history: History) -> int:
        """How many unseen points score above 0.

        Such a point's expected gain outweighs a hundredth of how much slower it should be.
        """
        return sum(score > 0 and not history.saw(key) for key, score in self.scores.items())


class EvolutionaryStrategy(Strategy):
    """Evolves the best measured candidates and random newcomers towards a high predicted gain.

    The order is: the defaults, random ones until `warm_up` more than the defaults were measured,
    then batches that the model picked, a share of them random. Hints are half of every batch as
    long as there are any. Sketches that were hardly tried have a share of every batch. Where
    nothing promises a gain, about half of a batch goes where the model knows least. See
    docs/search.md.
    """

    def __init__(
        self,
        space: Space,
        workload: Workload,
        target: Target,
        scenarios: Sequence[Scenario],
        rng: random.Random,
        model: CostModel,
        effort: SearchEffort,
    ) -> None:
        super().__init__(space, workload, target, scenarios, rng, effort.max_defaults)
        self.model = model
        self._effort = effort
        self._hints: list[Candidate] = []
        by_tokens: dict[int, list[int]] = {}
        for i, scenario in enumerate(self.scenarios):
            by_tokens.setdefault(scenario.tokens, []).append(i)
        self._mixes = [columns for columns in by_tokens.values() if len(columns) > 1]
        self._compromises: list[tuple[list[int], list[tuple[float, Candidate]]]] = []
        self._warm_until = len(self._defaults) + effort.warm_up
        self._predicted: dict[tuple[PointKey, str], float] = {}
        self._correlation: float | None = None
        self._outcomes: list[tuple[str, float, float]] = []

    def ask(self, n: int) -> list[Candidate]:
        """As Strategy.ask; `first_batch` at most behind the defaults while little is known."""
        known = len(self.history)
        if known < self._effort.first_until:
            n = min(n, max(self._effort.first_batch, len(self._defaults)))
        return super().ask(n)

    def tell(self, results: Sequence[Result]) -> None:
        fresh = len(self.history.samples)
        super().tell(results)
        for sample in self.history.samples[fresh:]:
            guess = self._predicted.get((point_key(sample.point), sample.scenario_key))
            if guess is not None and math.isfinite(sample.seconds):
                self._outcomes.append((sample.scenario_key, guess, sample.seconds))
        if len(self.history.samples) > fresh:
            self.learn()

    def learn(self) -> None:
        """Train the model anew on all samples."""
        self.model.update(self.history.samples)
        self._compromises = [
            (
                columns,
                self.history.compromises([self.scenarios[i].key for i in columns], _COMPROMISES),
            )
            for columns in self._mixes
        ]
        self._correlation = self._correlate()

    def hint(self, candidates: Sequence[Candidate]) -> None:
        """Candidates that did well for a neighbouring workload.

        They are half of what follows the defaults at first. Later they join the first generation,
        where the model judges them like any other, and a few are measured whatever it thinks: of
        a corner of the space where nothing good was met so far it expects nothing good. What the
        neighbours have found by then replaces what they had found before.
        """
        if not self.is_new:
            self._hints.clear()
        waiting = {point_key(c) for c in self._hints}
        for found in candidates:
            candidate = found if self._of_use(found.annotation) else plainly(found)
            key = point_key(candidate)
            if key not in waiting and not self.history.saw(key):
                waiting.add(key)
                self._hints.append(candidate)

    def predicted_s(self, candidate: Candidate, scenario: Scenario) -> float | None:
        return self._predicted.get((point_key(candidate), scenario.key))

    def rank_correlation(self) -> float | None:
        return self._correlation

    def _correlate(self) -> float | None:
        """Spearman of predicted against measured, per scenario, then averaged; None below 8."""
        by_scenario: dict[str, list[tuple[float, float]]] = {}
        for key, guess, seconds in self._outcomes:
            by_scenario.setdefault(key, []).append((guess, seconds))
        values = [
            spearman([g for g, _ in pairs], [s for _, s in pairs])
            for pairs in by_scenario.values()
            if len(pairs) >= 8
        ]
        finite = [v for v in values if math.isfinite(v)]
        return sum(finite) / len(finite) if finite else None

    @property
    def sigma(self) -> float:
        """Standard deviation of the model's recent errors in log time."""
        errors = [math.log(seconds / guess) for _, guess, seconds in self._outcomes[-_RECENT:]]
        if len(errors) < 8:
            return self._effort.prior_sigma
        return max(_MIN_SIGMA, float(np.sqrt(np.mean(np.square(errors)))))

    def _propose(self, n: int) -> list[Candidate]:
        early = self.is_new or not self.model.trained
        chosen: list[Candidate] = []
        if self._hints:
            effort = self._effort
            share = math.ceil(n * effort.hinted) if early else self._rounded(n * effort.adopted)
            chosen = self._take_hints(share)
        if len(self.history) >= self._warm_until and self.model.trained:
            chosen += self._tried_out(self._effort.try_out * (n - len(chosen)))
            chosen += self._judged(n - len(chosen))
        chosen += self._newcomers(n - len(chosen))
        self._remember(chosen)
        return chosen

    @property
    def is_new(self) -> bool:
        """Whether half of what is proposed are hints."""
        return len(self.history) < self._warm_until + _HINTED

    def _judged(self, n: int) -> list[Candidate]:
        """Up to `n` candidates that the model picked; what is missing is the random share.

        Where nothing promises a gain the random share, and `explore` of the picks without a
        promise, go where the model knows least: another neighbour of the best, which the model
        is sure is slower, would teach nothing, and nobody waits for it.
        """
        picks = n - self._rounded(self._effort.epsilon * n)
        if picks <= 0:
            return []
        pool = self._evolved()
        promising = pool.promising(self.history)
        if promising >= picks:
            return self._picked(pool, picks)
        chosen = self._picked(pool, promising)
        strange = self._rounded(self._effort.explore * (picks - promising))
        doubted = Pool(pool.drafts, self._scored(pool.drafts, _DOUBT))
        chosen += self._picked(doubted, picks - promising - strange)
        return chosen + self._least_known(strange + n - picks)

    def _tried_out(self, share: float) -> list[Candidate]:
        """About `share` candidates of sketches that came close with few trials.

        What the model expects of a sketch that it has seen once is what it knows of the others,
        so the first sketch that was tuned would win for good.
        """
        chosen: list[Candidate] = []
        rivals = self._rivals()
        if not rivals:
            return chosen
        for known in itertools.islice(itertools.cycle(rivals), self._rounded(share)):
            drafts: dict[PointKey, Draft] = {}
            for _ in range(_VARIANTS):
                draft = self._mutant(self.rng.choice(known), structural=0.0)
                if draft is not None and not self.history.saw(draft.key):
                    drafts.setdefault(draft.key, draft)
            chosen += self._picked(Pool(drafts, self._scored(drafts)), 1)
        return chosen

    def _rivals(self) -> list[list[Draft]]:
        """Points that come close to the best of some scenario, of sketches with fewer than `trials`
        candidates: a list for each sketch, the closest first."""
        if len(self.space.sketches) < 2:
            return []
        ratios = self.history.ratios()
        counts = Counter(candidate.sketch.name for candidate, _ in ratios)
        near: dict[str, list[tuple[float, Draft]]] = {}
        for candidate, ratio in ratios:
            name = candidate.sketch.name
            if counts[name] < self._effort.trials and ratio <= _RIVAL:
                draft = Draft(candidate.sketch, candidate.annotation)
                near.setdefault(name, []).append((ratio, draft))
        found = sorted(near.values(), key=lambda drafts: min(ratio for ratio, _ in drafts))
        return [[draft for _, draft in drafts] for drafts in found]

    def _rounded(self, exact: float) -> int:
        """A number rounded up or down at random, right on average."""
        whole = int(exact)
        return whole + (self.rng.random() < exact - whole)

    def _take_hints(self, n: int) -> list[Candidate]:
        taken: list[Candidate] = []
        while self._hints and len(taken) < n:
            candidate = self._hints.pop(0)
            if self.history.mark(candidate):
                taken.append(candidate)
        return taken

    def _remember(self, candidates: Sequence[Candidate]) -> None:
        """Keep what the model expects, for the log and for judging the model later."""
        if not self.model.trained or not candidates:
            return
        predicted = self.model.predict(candidates, self.scenarios)
        for candidate, row in zip(candidates, predicted, strict=True):
            for scenario, value in zip(self.scenarios, row, strict=True):
                best = self.history.best_s(scenario.key)
                if math.isfinite(best):
                    key = (point_key(candidate), scenario.key)
                    self._predicted[key] = best * math.exp(float(value))

    def _evolved(self) -> Pool:
        """All points of some generations with their acquisition."""
        population = self._first_generation()
        scores = self._scores(population)
        pool = Pool(
            {d.key: d for d in population},
            dict(zip((d.key for d in population), scores, strict=True)),
        )
        for _ in range(self._effort.generations):
            children = self._children(population, scores)
            fresh = {c.key: c for c in children if c.key not in pool.drafts}
            pool.drafts.update(fresh)
            pool.scores.update(self._scored(fresh))
            population, scores = self._survivors(pool)
        return pool

    def _least_known(self, n: int) -> list[Candidate]:
        """Up to `n` unseen candidates of which the model knows least, far from each other."""
        if n <= 0:
            return []
        found = {d.key: d for d in self._random_drafts(_STRANGERS)}
        drafts = [d for key, d in found.items() if not self.history.saw(key)]
        picks = (drafts[i] for i in self.model.least_known(drafts, self.scenarios, n))
        candidates = [Candidate.of(d.sketch, dict(d.annotation)) for d in picks]
        return [c for c in candidates if self.history.mark(c)]

    def _first_generation(self) -> list[Draft]:
        """Elites and hints, their mutants, and newcomers; each point once."""
        effort = self._effort
        middle = [candidate for _, best in self._compromises for _, candidate in best]
        known = [*self._hints, *middle, *self.history.elites(effort.elites)]
        elites = [Draft(c.sketch, c.annotation) for c in known[: effort.population // 2]]
        wanted = int(effort.population * effort.newcomers)
        newcomers = list(self._random_drafts(wanted))
        found = {d.key: d for d in (*elites, *newcomers)}
        for _ in range(2 * effort.population):
            if len(found) >= effort.population or not elites:
                break
            child = self._mutant(self.rng.choice(elites))
            if child is not None:
                found.setdefault(child.key, child)
        return list(found.values())

    def _random_drafts(self, n: int) -> Iterable[Draft]:
        for _ in range(n):
            sketch = self.rng.choice(self.space.sketches)
            draft = self._valid(sketch, sketch.sample(self.rng))
            if draft is not None:
                yield draft

    def _valid(
        self, sketch: Sketch, values: Annotation, parent: Draft | None = None
    ) -> Draft | None:
        """The draft of a point; one that breaks a limit is repaired now and then, by parameters in
        which it does not differ from its parent."""
        draft = Draft.of(sketch, values)
        if draft is None and self.rng.random() < self._effort.repair:
            before = values if parent is None else dict(parent.annotation)
            moved = (name for name, value in values.items() if before.get(name) != value)
            better = repaired(sketch, values, frozenset(moved), self.rng)
            draft = Draft.of(sketch, better) if better else None
        return draft if draft is not None and self._of_use(draft.annotation) else None

    def _children(self, population: Sequence[Draft], scores: FloatArray) -> list[Draft]:
        found: dict[PointKey, Draft] = {}
        for _ in range(2 * self._effort.population):
            if len(found) >= self._effort.population:
                break
            child = self._child(population, scores)
            if child is not None:
                found.setdefault(child.key, child)
        return list(found.values())

    def _child(self, population: Sequence[Draft], scores: FloatArray) -> Draft | None:
        size = self._effort.tournament
        parent = tournament(population, scores, self.rng, size)
        if self.rng.random() >= self._effort.crossover:
            return self._mutant(parent)
        other = tournament(population, scores, self.rng, size)
        joined = cross(
            (parent.sketch, dict(parent.annotation)),
            (other.sketch, dict(other.annotation)),
            self.space.sketches,
            self.rng,
        )
        return Draft.of(*joined) if joined else None

    def _mutant(self, parent: Draft, structural: float | None = None) -> Draft | None:
        """One change, sometimes more: after each another follows with probability 0.4.

        Args:
            structural: probability of another sketch; None is the effort's.
        """
        sketch, values = parent.sketch, dict(parent.annotation)
        structural = self._effort.structural if structural is None else structural
        if len(self.space.sketches) > 1 and self.rng.random() < structural:
            sketch, values = change_sketch(sketch, values, self.space.sketches, self.rng)
        open_domains = [d for d in sketch.domains if len(d.choices) > 1]
        while open_domains:
            domain = self.rng.choice(open_domains)
            values = MUTATORS[domain.kind].mutate(sketch, values, domain, self.rng)
            if self.rng.random() >= 0.4:
                break
        return self._valid(sketch, values, parent)

    def _survivors(self, pool: Pool) -> tuple[list[Draft], FloatArray]:
        """The best-scored points so far, as the next generation."""
        keys = pool.ranked()[: self._effort.population]
        return [pool.drafts[k] for k in keys], np.array([pool.scores[k] for k in keys])

    def _scored(self, drafts: dict[PointKey, Draft], doubt: float = 1.0) -> dict[PointKey, float]:
        """Acquisition by point, in the same order."""
        return dict(zip(drafts, self._scores(list(drafts.values()), doubt), strict=True))

    def _scores(self, drafts: Sequence[Draft], doubt: float = 1.0) -> FloatArray:
        """Acquisition of each draft if the model's deviation were `doubt` times what it says."""
        if not drafts:
            return np.zeros(0)
        predicted = self.model.predict(drafts, self.scenarios)
        predicted = np.where(self._serving(drafts), predicted, _NO_USE)
        known = self.model.deviation(drafts, self.scenarios)
        sigma = np.where(known > 0, np.maximum(known, _MIN_SIGMA), self.sigma)
        weights = [s.weight for s in self.scenarios]
        for columns, best in self._compromises:
            if best:
                bests = [self.history.best_s(self.scenarios[i].key) for i in columns]
                taken = np.exp(predicted[:, columns]) @ np.divide(bests, sum(bests))
                lost = np.log(taken)[:, None] - best[0][0]
                unsure = sigma[:, columns].mean(axis=1, keepdims=True)
                predicted, sigma = np.hstack([predicted, lost]), np.hstack([sigma, unsure])
                weights.append(sum(self.scenarios[i].weight for i in columns))
        return acquisition(predicted, weights, doubt * sigma)

    def _serving(self, drafts: Sequence[Draft]) -> NDArray[np.bool_]:
        """Which draft may serve which scenario: [drafts, scenarios]."""
        tokens = [s.tokens for s in self.scenarios]
        return np.array([[may_serve(d.annotation, n) for n in tokens] for d in drafts])

    def _picked(self, pool: Pool, n: int) -> list[Candidate]:
        """The best unseen points, spread out; `n` of them if there are as many."""
        keys = [k for k in pool.ranked() if not self.history.saw(k)]
        keys = keys[: max(64, 8 * n)]
        marks = [frozenset([("sketch", k[0]), *k[1]]) for k in keys]
        scores = np.array([pool.scores[k] for k in keys])
        chosen: list[Candidate] = []
        for i in diverse(marks, scores, len(keys), self._effort.spread) if keys else ():
            if len(chosen) == n:
                break
            draft = pool.drafts[keys[i]]
            candidate = Candidate.of(draft.sketch, dict(draft.annotation))
            if self.history.mark(candidate):
                chosen.append(candidate)
        return chosen
