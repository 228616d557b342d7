"""A decoder as a model of lm-evaluation-harness. Imported where that is installed only (:mod:`.evaluation`).

L. Gao et al., "The Language Model Evaluation Harness", 2024, https://doi.org/10.5281/zenodo.12608602.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from pareto_core.errors import ConfigError, DataError, UnsupportedError
from pareto_cpu_runtime.evaluation import prefix_token, score_continuations

#: keys of a task's ``generation_kwargs`` that are understood
_KEYS = {"until", "max_gen_toks", "do_sample", "temperature"}


class HarnessLM(TemplateLM):
    """Log-likelihoods and greedy generation by ``model``, texts in and out by ``tokenizer``."""

    def __init__(self, model: Any, tokenizer: Any, max_length: int, rows: int, max_new_tokens: int) -> None:
        super().__init__()
        for field, value, least in (("max_length", max_length, 2), ("rows", rows, 1)):
            if value < least:
                raise ConfigError("HarnessLM", field, value, f"must be at least {least}")
        if not 0 < max_new_tokens < max_length:
            raise ConfigError("HarnessLM", "max_new_tokens", max_new_tokens, f"must be from 1 to {max_length - 1}")
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self.rows, self.max_new_tokens = max_length, rows, max_new_tokens

    @property
    def eot_token_id(self) -> int:
        """The mark of an end."""
        token = self.tokenizer.eos_token_id
        return self.prefix_token_id if token is None else int(token)

    @property
    def prefix_token_id(self) -> int:
        """The mark that stands before a text that has no context."""
        return prefix_token(self.tokenizer)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Tokens of a text, without marks unless they are asked for."""
        found: list[int] = self.tokenizer(string, add_special_tokens=bool(add_special_tokens))["input_ids"]
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        found = score_continuations(self.model, pairs, self.rows, self.max_length)
        answers = [(item.nats, item.greedy) for item in found]
        for (key, _, _), answer in zip(requests, answers, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole text, in windows that share no predicted token."""
        answers = []
        for request in requests:
            (text,) = request.args
            tokens = self.tok_encode(text)
            windows = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            pairs = [make_disjoint_window(window) for window in windows]
            answers.append(
                sum(item.nats for item in score_continuations(self.model, pairs, self.rows, self.max_length))
            )
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), answers[-1])
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue each context greedily until one of its stop texts, which is cut off.

        Raises :class:`UnsupportedError` where a task asks for sampling or for what is not known here.
        """
        answers = []
        for request in requests:
            context, options = request.args
            answers.append(self._generated(context, options))
            self.cache_hook.add_partial("generate_until", (context, options), answers[-1])
        return answers

    def _generated(self, context: str, options: Mapping[str, Any]) -> str:
        import torch

        stops, count = self._understood(options)
        tokens = self.tok_encode(context)[-(self.max_length - count) :] or [self.prefix_token_id]
        ids = torch.tensor([tokens])
        stopping = {"stop_strings": stops, "tokenizer": self.tokenizer} if stops else {}
        made = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            do_sample=False,
            num_beams=1,
            eos_token_id=self.eot_token_id,
            pad_token_id=self.eot_token_id,
            **stopping,
        )
        text: str = self.tokenizer.decode(made[0, len(tokens) :], skip_special_tokens=True)
        for stop in stops:
            text = text.partition(stop)[0]
        return text

    def _understood(self, options: Mapping[str, Any]) -> tuple[list[str], int]:
        """Stop texts and the number of new tokens."""
        for key, value in options.items():
            if key not in _KEYS:
                raise UnsupportedError(f"generation option {key} = {value!r} is not one of {', '.join(sorted(_KEYS))}")
        if options.get("do_sample") or float(options.get("temperature") or 0.0) not in (0.0, 1.0):
            raise UnsupportedError("tasks that sample are not supported: generation is greedy")
        until = options.get("until") or []
        stops = [until] if isinstance(until, str) else [str(stop) for stop in until]
        count = int(options.get("max_gen_toks") or self.max_new_tokens)
        if not 0 < count < self.max_length:
            raise DataError(f"max_gen_toks = {count}: must be from 1 to {self.max_length - 1}")
        return [stop for stop in stops if stop], count
