"""A `PalModel` behind the model interface of lmms-eval (version 0.7.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lmms_eval.api.model import lmms
from torch import Tensor
from tqdm import tqdm

import pal
from pal.clips import is_clip, read_waveform
from pal.data.prompts import encode, user_turn
from pal.errors import ConfigError
from pal.types import IGNORE, Tokens

_NOT_FOR_GENERATE = frozenset({"until", "max_new_tokens", "image_aspect_ratio"})
"""Generation options that are handled in this file, or that concern images."""


class Pal(lmms):
    """lmms-eval model of a bundle or run folder.

    Args:
        pretrained: folder or Hub id, as in `pal.load`; "tiny" and "smol" ship with the package.
        batch_size: questions that are answered in one batch.
        device: torch device; by default the one that accelerate gives the process.
    """

    is_simple = True

    def __init__(self, pretrained: str = "tiny", batch_size: int | str = 1, device: str | None = None) -> None:
        super().__init__()
        from accelerate import PartialState

        state = PartialState()
        self._rank, self._world_size = state.process_index, state.num_processes
        self.batch_size = int(batch_size)
        self.model = pal.load(pretrained).eval().to(device or state.device)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer to each request (context, generation options, doc_to_visual, doc_id, task, split), cut at `until`."""
        arguments = [request.args for request in requests]
        answers = [""] * len(arguments)
        # a batch has one set of options; sorting puts questions about a document together, so that they share its clip
        order = sorted(range(len(arguments)), key=lambda at: (repr(arguments[at][1]), *map(str, arguments[at][3:6])))
        with tqdm(total=len(order), desc="pal", unit="question", disable=self._rank != 0) as progress:
            for part in self._batches(order, arguments):
                options = dict(arguments[part[0]][1])
                for at, answer in zip(part, self._answers([arguments[at] for at in part], options), strict=True):
                    answers[at] = answer
                    self.cache_hook.add_partial("generate_until", (arguments[at][0], options), answer)
                progress.update(len(part))
        return answers

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """Log-likelihood of each request's continuation, and True if greedy decoding generates the continuation.

        A request is (context, target, doc_to_visual, doc_id, task, split). The continuation is the assistant's answer,
        with the tokens that end its turn.
        """
        scores = []
        for request in requests:
            context, target, to_visual, doc_id, task, split = request.args
            document = self.task_dict[task][split][doc_id]
            continuation = target if isinstance(target, str) else target(document)
            clips = self._clips(to_visual, document)
            conversation = self._conversation(context, list(range(len(clips))), continuation)
            scores.append(self._score(clips, conversation))
        return scores

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Not supported: lmms-eval's tasks with several rounds are about images."""
        raise NotImplementedError("pal supports no lmms-eval task with several rounds; choose a task with one round")

    def _answers(self, arguments: list[Any], options: dict[str, Any]) -> list[str]:
        waveforms: list[Tensor] = []
        conversations = []
        spans: dict[tuple[str, str, str], list[int]] = {}
        for context, _, to_visual, doc_id, task, split in arguments:
            document = (str(task), str(split), str(doc_id))
            if document not in spans:
                clips = self._clips(to_visual, self.task_dict[task][split][doc_id])
                spans[document] = list(range(len(waveforms), len(waveforms) + len(clips)))
                waveforms += clips
            conversations.append(self._conversation(context, spans[document]))
        until = options.get("until", [])
        stops = [until] if isinstance(until, str) else list(until)
        answers = self.model.generate(
            waveforms,
            conversations,
            max_new_tokens=int(options.get("max_new_tokens", 256)),
            **_generation_options(options),
        )
        return [_cut(answer, stops) for answer in answers]

    @torch.inference_mode()
    def _score(self, clips: list[Tensor], conversation: Tokens) -> tuple[float, bool]:
        total = float(self.model.answer_scores(clips, [conversation])[0])
        assert conversation.labels is not None
        target = [label for label in conversation.labels if label != IGNORE]
        first = next(place for place, label in enumerate(conversation.labels) if label != IGNORE)
        prompt = Tokens(conversation.ids[:first], conversation.clips)
        inputs = self.model.inputs(clips, [prompt], padding_side="left")
        greedy = self.model.llm.generate(inputs, max_new_tokens=len(target), do_sample=False, pad_token_id=0)
        return total, greedy[0].tolist()[: len(target)] == target

    def _conversation(self, context: str, clips: list[int], answer: str | None = None) -> Tokens:
        system = self.model.config.system
        talk = [{"role": "system", "content": system}] if system else []
        talk.append(user_turn(context, len(clips), self.model.config.after_clip))
        if answer is not None:
            talk.append({"role": "assistant", "content": answer.strip()})
        return encode(self.model.tokenizer, talk, clips, train=answer is not None)

    def _clips(self, to_visual: Any, document: Any) -> list[Tensor]:
        """Waveforms of a document's clips, at the model's rate."""
        clips = []
        for clip in to_visual(document) or []:
            if not is_clip(clip):
                raise ConfigError(
                    f"doc_to_visual gives a {type(clip).__name__}, not audio with array and sampling_rate; "
                    "choose a task about audio"
                )
            clips.append(read_waveform(clip, self.model.sampling_rate).samples_N)
        return clips

    def _batches(self, order: list[int], arguments: list[Any]) -> list[list[int]]:
        batches: list[list[int]] = []
        for at in order:
            if not batches or len(batches[-1]) == self.batch_size or arguments[batches[-1][0]][1] != arguments[at][1]:
                batches.append([])
            batches[-1].append(at)
        return batches


def _generation_options(options: dict[str, Any]) -> dict[str, Any]:
    """Convert lmms-eval's generation options to those of transformers; a temperature of 0 means greedy decoding."""
    kept = {key: value for key, value in options.items() if key not in _NOT_FOR_GENERATE and value is not None}
    if not kept.get("do_sample") or not kept.get("temperature"):
        for key in ("temperature", "top_p", "top_k", "do_sample"):
            kept.pop(key, None)
    return kept


def _cut(answer: str, stops: list[str]) -> str:
    for stop in stops:
        if stop:
            answer = answer.split(stop)[0]
    return answer
