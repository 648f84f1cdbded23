"""The requests of a case: prompt and output lengths, and which adapter each request asks for."""

from __future__ import annotations

import random
from dataclasses import dataclass

from dop.errors import ConfigError
from dop.scenario import MIXES, named

PUNICA = "punica"
SEED = 0x0D0B


@dataclass(frozen=True)
class Job:
    """One request: token ids, number of tokens to generate, adapter (0, 1, ...; None: none)."""

    prompt: list[int]
    output: int
    adapter: int | None


@dataclass(frozen=True)
class Case:
    """One line of the result for each arm.

    Attributes:
        batch_size: requests in flight.
        popularity: how adapters are shared, one of the four named mixes.
        lengths: "punica", or "64:128" for prompts of 64 and outputs of 128 tokens.
    """

    batch_size: int
    popularity: str
    lengths: str = PUNICA

    def __post_init__(self) -> None:
        if self.popularity not in MIXES:
            raise ConfigError(
                f"--lora-popularity {self.popularity}.", f"Use one of {', '.join(MIXES)}."
            )
        if self.batch_size < 1:
            raise ConfigError(f"--batch-size {self.batch_size}.", "Give at least 1.")
        self.fixed  # noqa: B018 - refuses lengths that make no sense

    @property
    def key(self) -> str:
        """Short name: "b32/distinct/64:128"."""
        return f"b{self.batch_size}/{self.popularity}/{self.lengths}"

    @property
    def fixed(self) -> tuple[int, int] | None:
        """Prompt and output length, or None for Punica's distribution."""
        if self.lengths == PUNICA:
            return None
        try:
            prompt, output = (int(n) for n in self.lengths.split(":"))
            assert prompt >= 1
            assert output >= 1
        except (ValueError, AssertionError) as error:
            raise ConfigError(
                f"--lengths {self.lengths}.", 'Use "punica" or "PROMPT:OUTPUT", e.g. 64:128.'
            ) from error
        return prompt, output

    @property
    def decodes(self) -> bool:
        """Whether its requests have decode steps at all."""
        return self.fixed is None or self.fixed[1] > 1

    def tokens_in_flight(self, maxlen: int) -> int:
        """Tokens of prompts and outputs that `batch_size` requests can come to."""
        return self.batch_size * (sum(self.fixed) if self.fixed else maxlen)

    def in_flight(self, adapters: int) -> int:
        """Distinct adapters among `batch_size` requests, of `adapters` that there are."""
        return min(adapters, named(self.popularity, self.batch_size).adapters)


def punica_lengths(count: int, maxlen: int, seed: int = SEED) -> list[tuple[int, int]]:
    """Prompt and output lengths as in Punica's text-generation benchmark.

    Prompts are log-normal (shape 0.8, scale 18, shifted by -1), cut so that two tokens are left;
    prompt and output together are uniform up to `maxlen`, and the output has at least two.
    Source: punica, benchmarks/bench_textgen.py, generate_request_set.
    """
    if maxlen < 4:
        raise ConfigError(f"--maxlen {maxlen}.", "Give at least 4.")
    rng = random.Random(seed)
    lengths = []
    for _ in range(count):
        prompt = max(1, min(int(18.0 * rng.lognormvariate(0.0, 0.8) - 1.0), maxlen - 2))
        total = max(prompt + 2, rng.randrange(maxlen))
        lengths.append((prompt, total - prompt))
    return lengths


def waves(
    case: Case, batches: int, maxlen: int, adapters: int, vocab: int, seed: int = SEED
) -> list[list[Job]]:
    """The requests of a case, in the groups that are handed to an engine one after the other.

    Fixed lengths: a group is one batch of exactly the case's mix, so that all of its requests
    decode side by side. Punica's lengths: one group of all requests, adapters shared over all
    of them as Punica does, `batch_size` in flight. Adapter i of `adapters` stands in for
    i + adapters (Punica mirrors its weights so).
    """
    rng = random.Random(seed)

    def job(prompt: int, output: int, adapter: int) -> Job:
        return Job([rng.randrange(1, vocab) for _ in range(prompt)], output, adapter % adapters)

    if case.fixed is not None:
        prompt, output = case.fixed
        groups = []
        for wave in range(batches):
            ids = _adapters(case.popularity, case.batch_size, seed, wave)
            groups.append([job(prompt, output, i) for i in ids])
        return groups
    count = case.batch_size * batches
    lengths = punica_lengths(count, maxlen, seed)
    ids = _adapters(case.popularity, count, seed)
    return [[job(*pair, i) for pair, i in zip(lengths, ids, strict=True)]]


def _adapters(popularity: str, count: int, seed: int, wave: int = 0) -> list[int]:
    if popularity == "distinct":  # in order: neighbours stay distinct modulo the adapters
        return list(range(wave * count, (wave + 1) * count))
    return named(popularity, count).token_to_adapter(seed + wave)
