"""A call of ``generate()``, as far as a recorder must know of it: where its prompt ends, and who has finished."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from probe.schema import ProbeError


class GenerationError(ProbeError):
    """A kind of generation whose tokens cannot be told apart from outside."""


class Generation:
    """One call of ``generate()``.

    ``n_prompt`` counts the columns of its prompt: what a forward reads beyond them was generated.
    """

    def __init__(self, module: GenerationMixin, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = inspect.signature(type(module).generate).bind(module, *args, **kwargs).arguments
        given = {**bound, **bound.get("kwargs", {})}
        configs = (given.get("generation_config"), module.generation_config)

        def option(name: str) -> Any:
            if name in given:
                return given[name]
            values = (getattr(config, name, None) for config in configs)
            return next((value for value in values if value is not None), None)

        if (option("num_beams") or 1) > 1:
            raise GenerationError("beam search moves sequences between rows: record with num_beams=1")
        if given.get("assistant_model") is not None or option("prompt_lookup_num_tokens"):
            raise GenerationError("assisted generation takes back tokens that were run: record without an assistant")
        if option("use_cache") is False:
            raise GenerationError("without a cache every step runs the whole text again: record with use_cache=True")
        prompt = given.get("inputs") if given.get("inputs") is not None else given.get("input_ids")
        self.n_prompt = 1 if prompt is None else prompt.shape[1]
        end_ids = option("eos_token_id")
        self._end_ids = torch.as_tensor([] if end_ids is None else end_ids).flatten().cpu()
        self._finished: Tensor | None = None

    def unfinished(self, token_ids: Tensor) -> Tensor:
        """Which rows (row, 1) of a decode step still generate.

        A row that was fed an end of sequence is fed padding until the last one is done; the attention mask does not
        say so.
        """
        finished = torch.zeros(len(token_ids), 1, dtype=torch.bool) if self._finished is None else self._finished
        self._finished = finished | torch.isin(token_ids.cpu(), self._end_ids).any(dim=1, keepdim=True)
        return ~finished.to(token_ids.device)
