"""``generate`` with transformers' arguments and results, on the runtime's engine.

Arguments, as in ``GenerationConfig``: max_length, max_new_tokens, min_length, min_new_tokens, do_sample, temperature,
top_k, top_p, min_p, repetition_penalty, num_beams, length_penalty, early_stopping, num_return_sequences, eos_token_id,
pad_token_id, stop_strings (with ``tokenizer``); and ``generation_config``, ``streamer``, ``stopping_criteria``,
``generator`` (a torch generator that the seeds of sampling are drawn from). What else is asked for is refused, never
ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pareto_core.errors import ConfigError, DataError, UnsupportedError, suggest
from pareto_cpu_runtime.batching import Handle, Request
from pareto_cpu_runtime.runtime import Runtime, token_arrays
from pareto_cpu_runtime.sampling import Sampling

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

#: what is done where neither the caller nor the model's generation config says anything
DEFAULTS: dict[str, Any] = {
    "max_length": None,
    "max_new_tokens": None,
    "min_length": 0,
    "min_new_tokens": None,
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "min_p": None,
    "repetition_penalty": 1.0,
    "num_beams": 1,
    "length_penalty": 1.0,
    "early_stopping": False,
    "num_return_sequences": 1,
    "eos_token_id": None,
    "pad_token_id": None,
    "stop_strings": None,
}
#: fields of a generation config that ask for nothing when they have one of these values
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_cache": (True, False),
    "bos_token_id": (),
    "decoder_start_token_id": (),
    "transformers_version": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "remove_invalid_values": (False,),
    "renormalize_logits": (False,),
    "output_scores": (False,),
    "output_logits": (False,),
    "output_attentions": (False,),
    "output_hidden_states": (False,),
    "return_dict_in_generate": (False,),
    "token_healing": (False,),
    "is_assistant": (False,),
    "low_memory": (False,),
    "disable_compile": (False, True),
    "_from_model_config": (False, True),
    "cache_implementation": ("hybrid", "dynamic"),
    "num_assistant_tokens": (20,),
    "num_assistant_tokens_schedule": ("constant",),
    "assistant_confidence_threshold": (0.4,),
    "assistant_lookbehind": (10,),
    "target_lookbehind": (10,),
}


def settings_of(model_config: Any, given_config: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """One value per option: the call's, else the given generation config's, else the model's, else the default.

    Raises :class:`UnsupportedError` for an option that transformers has and the runtime has not, and
    :class:`ConfigError` for one that nobody knows.
    """
    settings = dict(DEFAULTS)
    for config in (model_config, given_config):
        values = {} if config is None else config.to_dict()
        settings.update({name: _known(name, value) for name, value in values.items() if _asked(name, value)})
    for name, value in options.items():
        if name not in DEFAULTS and name not in NEUTRAL:
            _refuse_unknown(name)
        if name in DEFAULTS and value is None:
            settings[name] = DEFAULTS[name]
        elif _asked(name, value):
            settings[name] = _known(name, value)
    return settings


def _asked(name: str, value: Any) -> bool:
    if value is None or name in ("bos_token_id", "decoder_start_token_id", "transformers_version"):
        return False
    return name in DEFAULTS or value not in NEUTRAL.get(name, ())


def _known(name: str, value: Any) -> Any:
    if name not in DEFAULTS:
        raise UnsupportedError(f"generate has no {name} = {value!r} here; it has {', '.join(sorted(DEFAULTS))}")
    return value


def _refuse_unknown(name: str) -> None:
    from transformers import GenerationConfig

    if name in GenerationConfig().to_dict():
        raise UnsupportedError(f"generate has no {name} here; it has {', '.join(sorted(DEFAULTS))}")
    raise ConfigError("generate", name, "…", f"no such argument; {suggest(name, DEFAULTS)}")


class Plan:
    """The settings of one call, checked, with lengths in new tokens."""

    def __init__(self, runtime: Runtime, settings: dict[str, Any], width: int) -> None:
        self.settings = settings
        eos = settings["eos_token_id"]
        self.stop_tokens = () if eos is None else tuple(int(token) for token in np.asarray(eos).reshape(-1))
        pad = settings["pad_token_id"]
        self.pad = self.stop_tokens[0] if pad is None and self.stop_tokens else pad
        self.max_new = self._max_new(runtime, width)
        self.min_new = settings["min_new_tokens"]
        if self.min_new is None:
            self.min_new = max(0, settings["min_length"] - width)
        self.beams, self.returned = settings["num_beams"], settings["num_return_sequences"]
        self._check()

    def _max_new(self, runtime: Runtime, width: int) -> int:
        settings = self.settings
        if settings["max_new_tokens"] is not None:
            new = int(settings["max_new_tokens"])
        elif settings["max_length"] is not None:
            new = int(settings["max_length"]) - width
        else:
            new = min(20, runtime.decoder.positions - width)
        if new < 1:
            raise ConfigError(
                "generate", "max_length", settings["max_length"], f"leaves no new token after {width} of the prompt"
            )
        return new

    def _check(self) -> None:
        def require(field: str, holds: bool, allowed: str) -> None:
            if not holds:
                raise ConfigError("generate", field, self.settings[field], allowed)

        require("num_beams", self.beams >= 1, "must be at least 1")
        require("num_return_sequences", self.returned >= 1, "must be at least 1")
        if self.beams > 1:
            require("num_return_sequences", self.returned <= self.beams, f"at most num_beams = {self.beams}")
            require("do_sample", not self.settings["do_sample"], "beam search does not sample: use num_beams=1")
            require("stop_strings", self.settings["stop_strings"] is None, "not with beam search")
        elif not self.settings["do_sample"]:
            require("num_return_sequences", self.returned == 1, "greedy search gives one text: use do_sample or beams")
        require("early_stopping", self.settings["early_stopping"] in (True, False, "never"), 'True, False or "never"')

    def sampling(self, seed: int) -> Sampling:
        """How tokens are chosen, with a request's own seed."""
        s = self.settings
        if not s["do_sample"]:
            return Sampling(repetition_penalty=float(s["repetition_penalty"]))
        return Sampling(
            do_sample=True,
            temperature=float(s["temperature"]),
            top_k=int(s["top_k"] or 0),
            top_p=1.0 if s["top_p"] is None else float(s["top_p"]),
            min_p=0.0 if s["min_p"] is None else float(s["min_p"]),
            repetition_penalty=float(s["repetition_penalty"]),
            seed=seed,
        )


def generate(
    runtime: Runtime,
    input_ids: Any,
    attention_mask: Any = None,
    *,
    generation_config: Any = None,
    streamer: Any = None,
    stopping_criteria: Sequence[Callable[..., Any]] | None = None,
    tokenizer: Any = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> torch.Tensor:
    """Continue each row of ``input_ids`` (rows, length), padded on the left where ``attention_mask`` is 0.

    Returns int64 (rows * num_return_sequences, length + new tokens), prompt included, padded on the right with
    ``pad_token_id`` (the first ``eos_token_id`` where there is none), as transformers does.
    """
    if input_ids is None:
        raise DataError("generate needs input_ids")
    texts, masks = token_arrays(input_ids, attention_mask)
    settings = settings_of(runtime.generation_config, generation_config, options)
    plan = Plan(runtime, settings, texts.shape[1])
    if streamer is not None and (len(texts) > 1 or plan.beams > 1 or plan.returned > 1):
        raise ConfigError("generate", "streamer", type(streamer).__name__, "streams one text: one row, no beams")
    if plan.beams > 1:
        from pareto_cpu_runtime.beam import beam_search

        if stopping_criteria:
            raise UnsupportedError("stopping_criteria are not asked in beam search here: use eos_token_id")
        return _tensor(beam_search(runtime, texts, masks, plan))
    rows = np.repeat(np.arange(len(texts)), plan.returned)
    stop = _stopper(plan, tokenizer, stopping_criteria)
    if streamer is not None:
        streamer.put(_tensor(texts.astype(np.int64)))
    seeds = _seeds(plan, len(rows), generator)
    requests = [_request(plan, texts[row], masks[row], seed, stop) for row, seed in zip(rows, seeds, strict=True)]
    new = _run(runtime, requests, streamer)
    return _tensor(joined(texts[rows], new, plan.pad))


def _request(
    plan: Plan, text: NDArray[np.int32], mask: NDArray[np.bool_], seed: int, stop: Callable[..., bool] | None
) -> Request:
    whole = None if stop is None else lambda new: stop(np.append(text, np.asarray(new, dtype=np.int32)))
    return Request(
        tokens=text[mask],
        max_new_tokens=plan.max_new,
        min_new_tokens=plan.min_new,
        stop_tokens=plan.stop_tokens,
        stop=whole,
        sampling=plan.sampling(seed),
    )


def _run(runtime: Runtime, requests: list[Request], streamer: Any) -> list[list[int]]:
    put = None if streamer is None else lambda token: streamer.put(_tensor(np.array([token], dtype=np.int64)))
    handles: list[Handle] = []
    try:
        # One by one, so that those before a refused request are known, and cancelled.
        for request in requests:
            handles += [runtime.engine.submit(request, put)]
        return [handle.result() for handle in handles]
    finally:
        for handle in handles:
            handle.cancel()
        if streamer is not None:
            streamer.end()


def _seeds(plan: Plan, count: int, generator: torch.Generator | None) -> list[int]:
    """A seed per text, drawn from torch's generator, so that ``torch.manual_seed`` decides what is sampled."""
    if not plan.settings["do_sample"]:
        return [0] * count
    import torch

    return [int(seed) for seed in torch.randint(0, 2**63 - 1, (count,), generator=generator)]


def _stopper(
    plan: Plan, tokenizer: Any, criteria: Sequence[Callable[..., Any]] | None
) -> Callable[[NDArray[np.int32]], bool] | None:
    checks = list(criteria or ())
    strings = plan.settings["stop_strings"]
    if strings is not None:
        if tokenizer is None:
            raise ConfigError("generate", "stop_strings", strings, "needs the tokenizer argument")
        from transformers import StopStringCriteria

        checks.append(StopStringCriteria(tokenizer=tokenizer, stop_strings=strings))
    if not checks:
        return None

    def stops(text: NDArray[np.int32]) -> bool:
        ids = _tensor(text.astype(np.int64)[None])
        return any(bool(np.asarray(check(ids, None)).any()) for check in checks)

    return stops


def joined(prompts: NDArray[np.int32], new: list[list[int]], pad: int | None) -> NDArray[np.int64]:
    """Prompts (rows, length) with their new tokens, shorter ones padded on the right."""
    longest = max(len(tokens) for tokens in new)
    out = np.full((len(new), prompts.shape[1] + longest), 0 if pad is None else pad, dtype=np.int64)
    out[:, : prompts.shape[1]] = prompts
    for row, tokens in enumerate(new):
        out[row, prompts.shape[1] : prompts.shape[1] + len(tokens)] = tokens
    return out


def _tensor(array: NDArray[np.int64]) -> torch.Tensor:
    import torch

    return torch.from_numpy(np.ascontiguousarray(array))
