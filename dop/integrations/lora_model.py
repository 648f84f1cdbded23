"""A transformers model whose linears add the adapter of each token of a packed batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from dop.errors import ConfigError
from dop.integrations.adapters import Adapter
from dop.integrations.stacks import LayerStack, stack_rank

NO_ADAPTER = -1


class LoraModel:
    """A model whose linears add the adapter of each token; the engine's half that computes.

    Args:
        model: a causal LM of transformers, in evaluation mode.
        modules: paths of the linears that some adapter changes.
        slots: adapters that can be in use at once.
        rank: largest rank of an adapter.
        apply: adds adapters to y in place; `dop.ops.add_lora` if None. Called as
            apply(y, x, a, b, plan) with y [tokens, out], x [tokens, in].
        make_plan: from token slots int32 [tokens]; `dop.ops.segment_plan` if None.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Iterable[str],
        slots: int,
        rank: int,
        apply: Callable[..., Any] | None = None,
        make_plan: Callable[..., Any] | None = None,
    ) -> None:
        from dop import ops

        self._apply = apply or ops.add_lora
        self._make_plan = make_plan or ops.segment_plan
        self._plan: Any = None
        self.slots = slots
        self.stacks: dict[str, LayerStack] = {}
        self._hooks = [model.register_forward_pre_hook(self._route, with_kwargs=True)]
        device = next(model.parameters()).device
        self._ranks = torch.ones(slots, dtype=torch.int32, device=device)
        self._scales = torch.ones(slots, dtype=torch.float32, device=device)
        known = dict(model.named_modules())
        for name in sorted(set(modules)):
            module = known.get(name)
            if not isinstance(module, nn.Linear):
                self.remove()
                raise ConfigError(
                    f"the model has no linear {name!r}, which an adapter changes.",
                    "Use adapters trained for this model.",
                )
            weight = module.weight
            shape = (module.in_features, module.out_features, weight.dtype, weight.device)
            stack = self.stacks[name] = LayerStack(slots, stack_rank(rank), *shape)
            self._hooks.append(module.register_forward_hook(self._linear(stack)))

    def fill(self, slot: int, adapter: Adapter) -> None:
        """Put an adapter into a slot and wait until it is there."""
        scale = next(iter(adapter.values())).scale or 1.0
        for name, stack in self.stacks.items():
            weights = adapter.get(name)
            if weights is None:
                stack.clear(slot)
            else:
                stack.write(slot, weights.a, weights.b, weights.scale / scale)
        self._ranks[slot] = max(weights.rank for weights in adapter.values())
        self._scales[slot] = scale
        if self._ranks.is_cuda:  # the forward passes run on another stream
            torch.cuda.current_stream(self._ranks.device).synchronize()

    def remove(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._plan = None

    def _route(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Before a forward pass: the slot of each token, and from them the plan of the pass."""
        slots = kwargs.get("logits_processor_args")
        if slots is None or not slots.shape[0]:
            self._plan = None  # a plain forward of the model
            return None
        tokens = token_slots(slots[-1], kwargs["cu_seq_lens_q"], kwargs["input_ids"].shape[-1])
        self._plan = self._make_plan(
            tokens, slots=self.slots, ranks=self._ranks, scale=self._scales
        )
        return None

    def _linear(self, stack: LayerStack) -> Callable[..., None]:
        a, b = stack.a, stack.b

        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], y: torch.Tensor) -> None:
            if self._plan is not None:
                x = args[0].view(-1, a.shape[2])
                self._apply(y.view(-1, b.shape[1]), x, a, b, self._plan)

        return hook


def token_slots(slots: torch.Tensor, starts: torch.Tensor, tokens: int) -> torch.Tensor:
    """Slot of each token, on the device, without synchronising; shapes depend on sizes only.

    Args:
        slots: int32 [requests], slot of each request.
        starts: int32 [requests + 1], first token of each request, then the number of tokens;
            padding requests are empty.
        tokens: length of the padded batch; tokens behind the last request get no adapter.
    """
    position = torch.arange(tokens, dtype=starts.dtype, device=starts.device)
    request = torch.searchsorted(starts[1:].contiguous(), position, right=True)
    padded = nn.functional.pad(slots[: starts.shape[0] - 1], (0, 1), value=NO_ADAPTER)
    return padded[request]
