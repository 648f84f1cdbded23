"""transformers' continuous batching with one adapter per request: an embedded engine.

    engine = LoraEngine(model, {"french": "adapters/french", "legal": "adapters/legal"})
    with engine:
        outputs = engine.generate([Request(ids, adapter="french"), Request(ids)])

Requests of any mix of adapters share every forward pass; each output equals that of the request
alone with its adapter merged. Runs wherever transformers runs, a CPU included.

The adapter of a request travels as one int32 per request in the buffers that continuous batching
keeps for logits processors, so it is there in chunked prefill, in CUDA graphs and in asynchronous
batches. Source: transformers 5.17, generation/continuous_batching.
"""

from __future__ import annotations

import itertools
import queue
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any

import torch

from dop.errors import ConfigError, DopError, MissingDependencyError
from dop.integrations.adapters import Adapter, read_adapter
from dop.integrations.lora_model import NO_ADAPTER, LoraModel

SLOT_KWARG = "lora_slot"


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        prompt: token ids, at least one.
        adapter: a name the engine knows; None for the base model.
        max_new_tokens: of the output; fewer come if the end token does.
    """

    prompt: Sequence[int]
    adapter: str | None = None
    max_new_tokens: int = 16


@dataclass(frozen=True)
class Output:
    """What came of a request.

    Attributes:
        tokens: generated token ids.
        start_s: when it was handed to the engine (time.perf_counter).
        token_s: when each token was known.
    """

    tokens: list[int]
    start_s: float
    token_s: list[float] = field(default_factory=list)


class Slots:
    """Which adapter is in which slot, and how many requests in flight use it."""

    def __init__(self, count: int) -> None:
        self._slot: dict[str, int] = {}  # oldest use first
        self._users: dict[str, int] = {}
        self._free = list(range(count))[::-1]

    def acquire(self, name: str) -> tuple[int, bool] | None:
        """Slot of an adapter and whether it has to be filled; None if all slots are in use."""
        filled = name in self._slot
        if not filled:
            if not self._free:
                idle = next((n for n in self._slot if not self._users.get(n)), None)
                if idle is None:
                    return None
                self.drop(idle)
            self._slot[name] = self._free.pop()
        self._slot[name] = slot = self._slot.pop(name)
        self._users[name] = self._users.get(name, 0) + 1
        return slot, not filled

    def release(self, name: str) -> None:
        """A request that used the adapter is done."""
        self._users[name] -= 1

    def in_use(self, name: str) -> bool:
        """Whether a request in flight uses the adapter."""
        return bool(self._users.get(name))

    def drop(self, name: str) -> None:
        """Forget an adapter that no request uses; its slot is free."""
        slot = self._slot.pop(name, None)
        if slot is not None:
            self._free.append(slot)


def _routed(processors: Any) -> Any:
    """A processor list that also carries each request's slot, as its last row of arguments."""
    from transformers.generation.continuous_batching import cb_logits_processors as cb

    class RoutedProcessors(cb.ContinuousBatchingLogitsProcessorList):  # type: ignore[misc]
        """transformers' processors, plus one row that no processor reads."""

        def __init__(self) -> None:
            self.__dict__.update(processors.__dict__)
            self.tensors_required = processors.tensors_required + 1
            self.supported_keys = {**processors.supported_keys, SLOT_KWARG: int}

        def fill_defaults(self, int32_tensor: torch.Tensor) -> None:
            super().fill_defaults(int32_tensor)
            int32_tensor[-1].fill_(NO_ADAPTER)

        def prepare_tensor_args(
            self, requests_in_batch: list[Any], arg_storage: torch.Tensor
        ) -> torch.Tensor:
            # Every request of the batch has a row here, one in the middle of its prompt too.
            super().prepare_tensor_args(requests_in_batch, arg_storage)
            slots = [
                r.state.logit_processor_kwargs.get(SLOT_KWARG, NO_ADAPTER)
                for r in requests_in_batch
            ]
            row = arg_storage[-1]
            row.fill_(NO_ADAPTER)
            row[: len(slots)] = torch.tensor(slots, dtype=torch.int32).to(row.device)
            return arg_storage

    return RoutedProcessors()


class LoraEngine:
    """Text generation for requests of many adapters in one process.

    Args:
        model: a causal LM of transformers.
        adapters: name -> PEFT folder or loaded weights; more can be added later.
        slots: adapters in use at once; requests of further ones wait. All of them if None.
        max_rank: largest rank to expect; that of `adapters` if None.
        max_requests: requests in one forward pass.
        max_length: longest prompt with its output, in tokens.
        max_batch_tokens: tokens of one forward pass; longer prompts are split.
        apply, make_plan: see LoraModel.
        config: further fields of transformers' ContinuousBatchingConfig.

    Raises:
        ConfigError: an adapter that does not fit, or sizes that make no sense.
        MissingDependencyError: transformers is missing or too old.
    """

    def __init__(
        self,
        model: Any,
        adapters: Mapping[str, str | Path | Adapter],
        *,
        slots: int | None = None,
        max_rank: int | None = None,
        max_requests: int = 32,
        max_length: int = 2048,
        max_batch_tokens: int = 512,
        apply: Callable[..., Any] | None = None,
        make_plan: Callable[..., Any] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        if min(max_requests, max_length, max_batch_tokens) < 1:
            raise ConfigError("the engine's sizes must be positive.", "Give larger ones.")
        self._model = model.eval()
        self._max_length = max_length
        self._adapters = {n: _loaded(a) for n, a in adapters.items()}
        self._counter = itertools.count()
        self._lora: LoraModel | None = None
        if self._adapters:
            rank = max(w.rank for a in self._adapters.values() for w in a.values())
            self._lora = LoraModel(
                model,
                (m for a in self._adapters.values() for m in a),
                slots or len(self._adapters),
                max(rank, max_rank or 0),
                apply,
                make_plan,
            )
        self._slots = Slots(self._lora.slots if self._lora else 0)
        self._manager: Any = None
        try:
            self._manager = self._start(max_requests, max_batch_tokens, dict(config or {}))
        except BaseException:
            self.close()
            raise

    def _start(self, max_requests: int, max_batch_tokens: int, extra: dict[str, Any]) -> Any:
        try:
            from transformers import ContinuousBatchingConfig, GenerationConfig
            from transformers.generation.continuous_batching.utils import WorkloadHints
        except ImportError as error:
            raise MissingDependencyError(
                "transformers with continuous batching is not installed.",
                'pip install "transformers>=5.17"',
            ) from error
        block = 32 if self._max_length >= 64 else 16
        per_request = -(-(self._max_length + 1) // block) + 1
        settings = {
            "block_size": block,
            "num_blocks": per_request * max_requests + 4,
            "max_batch_tokens": max(max_batch_tokens, max_requests),
            "max_requests_per_batch": max_requests,
            "allow_block_sharing": False,  # a prefix's hash knows nothing of adapters
        }
        hints = WorkloadHints(max_prompt_length=self._max_length, num_requests=max_requests)
        greedy = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        manager = self._model.init_continuous_batching(
            generation_config=greedy,
            continuous_batching_config=ContinuousBatchingConfig(
                **{**settings, **extra, "allow_block_sharing": False}
            ),
            workload_hints=hints,
        )
        if self._lora is not None:
            manager.logit_processor = _routed(manager.logit_processor)
        manager.warmup()
        manager.start()
        return manager

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the known adapters."""
        return tuple(self._adapters)

    def add_adapter(self, name: str, adapter: str | Path | Adapter) -> None:
        """Make an adapter known, or replace one of that name.

        Raises:
            ConfigError: it does not fit the engine's modules or rank, or is in use.
        """
        loaded = _loaded(adapter)
        if self._lora is None:
            raise ConfigError("the engine was made without adapters.", "Give it one at first.")
        rank = next(iter(self._lora.stacks.values())).rank
        unknown = [m for m in loaded if m not in self._lora.stacks]
        if unknown or max(w.rank for w in loaded.values()) > rank:
            raise ConfigError(
                f"adapter {name!r} changes {unknown[0] if unknown else 'modules'} "
                f"or has a rank above {rank}.",
                "Give the engine such an adapter, or max_rank, when it is made.",
            )
        self.remove_adapter(name)
        self._adapters[name] = loaded

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; one that is not known is no error.

        Raises:
            ConfigError: a request in flight uses it.
        """
        if self._slots.in_use(name):
            raise ConfigError(f"adapter {name!r} is in use.", "Wait for its requests.")
        self._adapters.pop(name, None)
        self._slots.drop(name)

    def generate(
        self, requests: Sequence[Request], *, concurrency: int | None = None
    ) -> list[Output]:
        """Outputs of the requests, in their order; greedy.

        Args:
            requests: served first come, first served; one whose adapter finds no slot waits.
            concurrency: requests handed to the engine at a time; all at once if None.

        Raises:
            ConfigError: a request that cannot be served (unknown adapter, too long).
            DopError: the engine failed.
        """
        for request in requests:
            self._check(request)
        waiting = deque(enumerate(requests))
        flying: dict[str, tuple[int, float]] = {}
        outputs: dict[int, Output] = {}
        try:
            while waiting or flying:
                while waiting and len(flying) < (concurrency or len(requests)):
                    index, request = waiting[0]
                    started = perf_counter()
                    request_id = self._submit(request)
                    if request_id is None:
                        break
                    waiting.popleft()
                    flying[request_id] = index, started
                result = self._next()
                if result.request_id not in flying:
                    continue  # of a call that was interrupted
                index, started = flying.pop(result.request_id)
                self._release(requests[index])
                if result.error is not None:
                    raise DopError(f"request {index} failed: {result.error}.")
                outputs[index] = Output(
                    list(result.generated_tokens), started, list(result.timestamps or ())
                )
        finally:
            for request_id, (index, _) in flying.items():
                self._manager.cancel_request(request_id)
                self._release(requests[index])
        return [outputs[i] for i in range(len(requests))]

    def _check(self, request: Request) -> None:
        if self._manager is None:
            raise ConfigError("the engine is closed.", "Make a new one.")
        if request.adapter is not None and request.adapter not in self._adapters:
            raise ConfigError(
                f"adapter {request.adapter!r} is unknown.",
                f"Known are {', '.join(list(self._adapters)[:8]) or 'none'}.",
            )
        length = len(request.prompt) + request.max_new_tokens
        if not request.prompt or request.max_new_tokens < 1 or length > self._max_length:
            raise ConfigError(
                f"a request of {len(request.prompt)} + {request.max_new_tokens} tokens.",
                f"Give at least 1 + 1 and at most {self._max_length} in all.",
            )

    def _submit(self, request: Request) -> str | None:
        kwargs: dict[str, Any] = {}
        if request.adapter is not None:
            assert self._lora is not None
            got = self._slots.acquire(request.adapter)
            if got is None:
                return None
            slot, empty = got
            if empty:
                self._lora.fill(slot, self._adapters[request.adapter])
            kwargs[SLOT_KWARG] = slot
        request_id: str | None = self._manager.add_request(
            list(request.prompt),
            request_id=f"dop-{next(self._counter)}",
            max_new_tokens=request.max_new_tokens,
            record_timestamps=True,
            **kwargs,
        )
        if request_id is None:
            self._release(request)
            raise DopError("transformers' generation thread has stopped.", "Make a new engine.")
        return request_id

    def _release(self, request: Request) -> None:
        if request.adapter is not None:
            self._slots.release(request.adapter)

    def _next(self) -> Any:
        # transformers' get_result would do, but it cannot tell a slow pass from a dead thread
        while True:
            try:
                return self._manager.output_router.output_queue.get(timeout=1)
            except queue.Empty:
                if not self._manager.is_running():
                    error = self._manager.background_thread_status.fatal_error
                    raise DopError(f"transformers' generation thread stopped: {error}.") from error

    def close(self) -> None:
        """Stop the engine and give the model back as it was; may be called twice."""
        manager, self._manager = self._manager, None
        if manager is not None:
            manager.stop(block=True)
            manager.destroy()
        if self._lora is not None:
            self._lora.remove()

    def __enter__(self) -> LoraEngine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _loaded(adapter: str | Path | Adapter) -> Adapter:
    found = read_adapter(adapter) if isinstance(adapter, (str, Path)) else adapter
    if not found:
        raise ConfigError("an adapter without weights.", "Leave it out.")
    return found
