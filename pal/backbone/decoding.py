"""Options and state of our decoding loop: greedy search and sampling, with all state on the device."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

if TYPE_CHECKING:
    from pal.backbone.llm import Backbone

_OURS = frozenset(
    """max_new_tokens do_sample temperature top_k top_p num_return_sequences pad_token_id eos_token_id bos_token_id
    max_length cache_implementation compile_config disable_compile transformers_version _from_model_config""".split()  # noqa: SIM905
)
"""Options that our loop supports, or that do not change the generated tokens."""
_OFF = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "use_cache": True,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "diversity_penalty": 0.0,
    "typical_p": 1.0,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
}
"""Values, besides False, with which an option changes nothing."""


def resolved(llm: Backbone, kwargs: Mapping[str, Any]) -> GenerationConfig | None:
    """The generation options as transformers resolves them; None where it would refuse them, with its own message."""
    config = copy.deepcopy(kwargs.get("generation_config")) or GenerationConfig()
    try:
        config.update(**llm.lm.generation_config.to_dict(), defaults_only=True)
        config.update(**{name: value for name, value in kwargs.items() if name != "generation_config"})
    except (AttributeError, TypeError, ValueError):
        return None
    return config


@dataclass(frozen=True)
class DecodingOptions:
    """Options of our decoding loop."""

    tokens: int
    """Maximum number of new tokens."""
    ends: tuple[int, ...] = ()
    """Ids that end an answer."""
    pad: int = 0
    """Id of padding after the end of an answer."""
    copies: int = 1
    """Answers per prompt."""
    warpers: tuple[tuple[type, float], ...] | None = None
    """Logits warpers before sampling, with their values; None: greedy."""
    cache: str | None = None
    read_only_processors: Sequence[Callable[[Tensor, Tensor], Tensor]] = ()
    streamer: Any = None


def options_of(config: GenerationConfig | None, kwargs: Mapping[str, Any]) -> DecodingOptions | None:
    """Options for our loop; None where one is given that it does not support."""
    if config is None:
        return None
    given = {name: value for name, value in config.to_dict().items() if value is not None}
    more = {name: value for name, value in kwargs.items() if value is not None and not hasattr(config, name)}
    processors = list(more.pop("logits_processor", ()))
    streamer = more.pop("streamer", None)
    more.pop("generation_config", None)
    # not ==, by which a token's id of 0 would be False
    follows = all(
        name in _OURS or (_OFF[name] == value if name in _OFF else value is False) for name, value in given.items()
    )
    if more or not follows or not all(getattr(one, "read_only", False) for one in processors):
        return None
    tokens, copies, cache = config.max_new_tokens, config.num_return_sequences or 1, config.cache_implementation
    ends = config.eos_token_id
    ends = () if ends is None else tuple(ends) if isinstance(ends, list | tuple) else (ends,)
    pad = config.pad_token_id if config.pad_token_id is not None else ends[0] if ends else 0
    if not isinstance(tokens, int) or tokens < 1 or cache not in (None, "static", "dynamic"):
        return None
    if not all(isinstance(token, int) for token in (*ends, pad)) or (copies > 1 and not config.do_sample):
        return None
    if streamer is not None and copies > 1:
        return None
    return DecodingOptions(tokens, ends, pad, copies, _warpers(config), cache, processors, streamer)


def _warpers(config: GenerationConfig) -> tuple[tuple[type, float], ...] | None:
    """transformers' logits warpers, in its order and with its defaults."""
    if not config.do_sample:
        return None
    found: list[tuple[type, float]] = []
    if config.temperature is not None and config.temperature != 1.0:
        found.append((TemperatureLogitsWarper, config.temperature))
    top_k = 50 if config.top_k is None else config.top_k
    if top_k != 0:
        found.append((TopKLogitsWarper, top_k))
    if config.top_p is not None and config.top_p < 1.0:
        found.append((TopPLogitsWarper, config.top_p))
    return tuple(found)


class AnswerCache(Protocol):
    """What the loop needs to know of a cache."""

    @property
    def answers(self) -> int:
        """Number of rows of a decoding step."""
        ...

    @property
    def fixed_room(self) -> int | None:
        """Most rows that can be generated; None if the storage grows."""
        ...


class DecodingState:
    """Decoding state of each row, on the device; the host reads none of it during a step.

    Args:
        cache: of the prompts.
        options: end of an answer, and choice of a token.
        device: of the LLM.
    """

    def __init__(self, cache: AnswerCache, options: DecodingOptions, device: torch.device) -> None:
        rows = cache.answers
        room = options.tokens if cache.fixed_room is None else cache.fixed_room
        self.cache = cache
        self.pad = options.pad
        self.warpers = None if options.warpers is None else [kind(value) for kind, value in options.warpers]
        with torch.inference_mode(False):
            self.ends_X = torch.tensor(options.ends, dtype=torch.long, device=device)
            self.said_RN = torch.full((rows, room), options.pad, dtype=torch.long, device=device)
            self.next_R1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
            self.positions_R1 = torch.zeros(rows, 1, dtype=torch.long, device=device)
            self.ended_R = torch.zeros(rows, dtype=torch.bool, device=device)
            self.lengths_R = torch.zeros(rows, dtype=torch.long, device=device)
            self.count_1 = torch.zeros(1, dtype=torch.long, device=device)
        self.logits_RV: Tensor | None = None
        """Of the last token."""

    def begin(self, last_R1: Tensor) -> None:
        """Initialise before the first token, from the position of each answer's last row."""
        self.said_RN.fill_(self.pad)
        self.positions_R1.copy_(last_R1)
        for state in (self.ended_R, self.lengths_R, self.count_1):
            state.zero_()

    def choose(self, logits_RV: Tensor) -> None:
        """Choose a token of each row from its logits; after the end of an answer it is padding."""
        logits_RV = logits_RV.float()
        if self.warpers is None:
            next_R = logits_RV.argmax(-1)
        else:
            scores_RV = logits_RV
            for warper in self.warpers:
                scores_RV = warper(self.said_RN, scores_RV)
            # as torch.multinomial computes it, which on a GPU checks its input on the host
            p_RV = F.softmax(scores_RV, dim=-1)
            next_R = (p_RV / torch.empty_like(p_RV).exponential_(1)).argmax(-1)
        next_R = next_R.masked_fill(self.ended_R, self.pad)
        self.lengths_R += ~self.ended_R
        if len(self.ends_X):
            self.ended_R |= (next_R[:, None] == self.ends_X).any(1)
        self.said_RN.index_copy_(1, self.count_1, next_R[:, None])
        self.next_R1.copy_(next_R[:, None])
        self.positions_R1 += 1
        self.count_1 += 1
        self.logits_RV = logits_RV

    def step(self, lm: Any) -> None:
        """Decode one more token of each row."""
        out = lm(
            input_ids=self.next_R1,
            position_ids=self.positions_R1,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.choose(out.logits[:, -1])
