"""PEFT's ways to say which modules and which ranks: names, suffixes and regular expressions.

A regular expression in somebody else's file can take exponential time. Those that could are
not run: what they would have restricted is then left to the tensors themselves.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Mapping

from dop.config.files import brief, whole
from dop.errors import ConfigError

MAX_PATTERN = 2000
_REPEATED_GROUP = re.compile(r"\)[*+{]")
_REPEAT = re.compile(r"(?<!\\)[*+]|\{\d*,\d*\}")
MAX_REPEATS = 6


def target_pattern(value: object, where: str) -> str | tuple[str, ...]:
    """`target_modules`: "all-linear", a regular expression, or a tuple of names.

    Raises:
        ConfigError: anything else.
    """
    if isinstance(value, str) and value:
        if value != "all-linear":
            _compiled(value, where)
        return value
    if isinstance(value, list) and value and all(isinstance(v, str) and v for v in value):
        return tuple(value)
    raise ConfigError(
        f"target_modules of {where} is {brief(value)}.",
        'Give a list of module names, a regular expression or "all-linear".',
    )


def unmatched_targets(targets: str | tuple[str, ...], modules: Collection[str]) -> list[str]:
    """Targets that none of the modules answers to.

    Embeddings and heads have tensors of another form and are not asked for.
    """
    if isinstance(targets, str):
        pattern = None if targets == "all-linear" else _compiled(targets, "")
        if pattern is None or any(pattern.fullmatch(module) for module in modules):
            return []
        return [targets]
    elsewhere = ("embed_tokens", "lm_head", "wte")
    return [
        target
        for target in targets
        if target.rpartition(".")[2] not in elsewhere
        and not any(m == target or m.endswith(f".{target}") for m in modules)
    ]


def rank_of(module: str, default: int, patterns: object, where: str) -> frozenset[int]:
    """Ranks that `r` and `rank_pattern` allow a module: one, unless a pattern was not run.

    Source: PEFT's get_pattern_key: the first pattern that matches the end of the path wins.

    Raises:
        ConfigError: `rank_pattern` is malformed.
    """
    if patterns is None:
        return frozenset((default,))
    if not isinstance(patterns, Mapping):
        raise ConfigError(
            f"rank_pattern of {where} is {brief(patterns)}.", "Give an object of ranks."
        )
    undecided = set()
    for text, value in patterns.items():
        rank = whole(value, f"rank_pattern {brief(text)} of {where}")
        pattern = _compiled(text, where, prefix=True)
        if pattern is None:
            undecided.add(rank)
        elif pattern.fullmatch(module):
            return frozenset((rank, *undecided))
    return frozenset((default, *undecided))


def _compiled(text: str, where: str, *, prefix: bool = False) -> re.Pattern[str] | None:
    """The expression; None if it might run for ever."""
    if len(text) > MAX_PATTERN or not text.isprintable():
        raise ConfigError(f"pattern {brief(text)} of {where} is no pattern.", "Correct it.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pattern = re.compile(rf"(?:.*\.)?(?:{text})$" if prefix else text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"pattern {brief(text)} of {where} is no regular expression ({brief(str(error))}).",
            "Correct it.",
        ) from error
    risky = _REPEATED_GROUP.search(text) or len(_REPEAT.findall(text)) > MAX_REPEATS
    return None if risky else pattern
