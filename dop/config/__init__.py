"""The input side: model configs, adapter folders and traffic files, read and checked.

Everything here turns a file that a person hands over into values (workloads, scenarios), or
into one `ConfigError` that says what is wrong and what to do. Standard library only.
"""

from __future__ import annotations

from dop.config.adapters import Adapter, AdapterSet, read_adapters
from dop.config.hf import (
    ModelShape,
    layers_of,
    model_shape,
    parse_ranks,
    shipped_models,
    workloads_from_model,
    workloads_of,
)
from dop.config.traffic import BUCKETS, bucketize, default_scenarios, left_out, read_traffic

__all__ = [
    "BUCKETS",
    "Adapter",
    "AdapterSet",
    "ModelShape",
    "bucketize",
    "default_scenarios",
    "layers_of",
    "left_out",
    "model_shape",
    "parse_ranks",
    "read_adapters",
    "read_traffic",
    "shipped_models",
    "workloads_from_model",
    "workloads_of",
]
