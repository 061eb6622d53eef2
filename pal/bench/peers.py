"""Models of transformers beside ours, with the same LLM weights: the plain LLM, Qwen2Audio, Mllama.

They run as transformers makes them, with its attention `sdpa`, which picks fused kernels where there are some. What is
shared are the weights alone, so that a run holds an LLM once.
"""

from __future__ import annotations

from abc import abstractmethod
from copy import deepcopy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    MllamaForCausalLM,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig

from pal.backbone.llm import Backbone
from pal.backbone.regions import compile_layers
from pal.bench.models import BenchModel, PrefilledPrompt
from pal.bench.presets import Preset
from pal.bench.scene import BenchScene, Side
from pal.encoders.base import Encoder
from pal.integrations.plits import PLITS
from pal.types import IGNORE

_SELF_LAYERS = 4
"""Layers of self-attention for each of cross-attention in Mllama (Llama-3.2-11B-Vision: 32 and 8)."""


class ForwardOutput(NamedTuple):
    """What a forward pass gives."""

    logits_BXV: Tensor
    cache: Any


class PeerModel(BenchModel):
    """A model of transformers."""

    lm: Any
    """With the argument names that transformers' causal LLMs have."""

    hears_rows: bool = True
    """Whether audio makes rows."""

    @abstractmethod
    def given(self, scene: BenchScene, side: Side) -> dict[str, Tensor]:
        """Its arguments for a scene, with shorter rows filled up on a side."""

    def forward(self, scene: BenchScene, keep: Tensor | int, use_cache: bool) -> ForwardOutput:
        """Logits of the rows `keep`, which counts from the end where it is a number."""
        out = self.lm(**self.given(scene, "left"), use_cache=use_cache, logits_to_keep=keep)
        return ForwardOutput(out.logits, out.past_key_values)

    def length(self, scene: BenchScene) -> int:
        """Rows of a conversation that is not filled up."""
        return scene.audio_tokens * self.hears_rows + scene.text_tokens

    def read(self, scene: BenchScene) -> PrefilledPrompt:
        """One forward pass; positions go on from the number of rows."""
        made = self.forward(scene, keep=1, use_cache=True)
        if scene.ragged is not None:
            padded = scene.padded(self.hears_rows, "left")
            return PrefilledPrompt(made.logits_BXV[:, -1], made.cache, padded.mask_BT, padded.positions_BT[:, -1:] + 1)
        length_B1 = torch.full_like(scene.text_BT[:, :1], self.length(scene))
        return PrefilledPrompt(made.logits_BXV[:, -1], made.cache, self.mask(scene), length_B1)

    def write(self, reading: PrefilledPrompt, tokens: int) -> None:
        """So many more tokens, greedily."""
        for _ in range(tokens):
            ids_B1 = reading.logits_BV.argmax(-1, keepdim=True)
            reading.mask_BK = torch.cat((reading.mask_BK, torch.ones_like(ids_B1)), dim=1)
            reading.logits_BV = self.step(reading, ids_B1)
            reading.position_B1 = reading.position_B1 + 1

    def step(self, reading: PrefilledPrompt, ids_B1: Tensor) -> Tensor:
        """Logits [B, V] after one more token, which joins the cache."""
        out = self.lm(
            input_ids=ids_B1,
            attention_mask=reading.mask_BK,
            position_ids=reading.position_B1,
            past_key_values=reading.cache,
            use_cache=True,
        )
        logits_BV: Tensor = out.logits[:, -1]
        return logits_BV

    def loss(self, scene: BenchScene) -> Tensor:
        """From the logits of the rows that predict an answer's token, and only of those."""
        if scene.ragged is not None:
            padded = scene.padded(self.hears_rows, "right")
            hidden_BTD = self.lm.model(**self.given(scene, "right"), use_cache=False).last_hidden_state
            logits_XV = self.lm.lm_head(hidden_BTD.flatten(0, 1).index_select(0, padded.predicts_X))
            return F.cross_entropy(logits_XV.float(), padded.answers_X)
        last = self.length(scene) - 1
        keep_X = torch.arange(last - scene.answer, last, device=scene.text_BT.device)
        made = self.forward(scene, keep=keep_X, use_cache=False)
        return F.cross_entropy(made.logits_BXV.float().flatten(0, 1), scene.text_BT[:, -scene.answer :].flatten())

    def compile(self, **options: Any) -> None:
        """Each of its layers, as ours are."""
        compile_layers((layer for layer in self.lm.model.layers if "forward" not in vars(layer)), **options)

    def mask(self, scene: BenchScene) -> Tensor:
        """Of rows that are all real."""
        return torch.ones(scene.batch, self.length(scene), dtype=torch.long, device=scene.text_BT.device)

    def about_rows(self, scene: BenchScene, side: Side) -> dict[str, Tensor]:
        """Mask, and positions where rows begin later than others."""
        if scene.ragged is None:
            return {"attention_mask": self.mask(scene)}
        padded = scene.padded(self.hears_rows, side)
        given = {"attention_mask": padded.mask_BT}
        return given if side == "right" else {**given, "position_ids": padded.positions_BT}


class PlainLLM(PeerModel):
    """The LLM alone, on text or on the very rows that PLITS makes: what PLITS and text would cost without us."""

    def __init__(self, name: str, llm: Backbone, plain: Any, route: PLITS | None) -> None:
        super().__init__(name, llm, route)
        self.lm = plain
        self.route = route
        self.hears_rows = route is not None  # nothing else projects a clip

    def given(self, scene: BenchScene, side: Side) -> dict[str, Tensor]:
        """`inputs_embeds` where there is a clip, `input_ids` where there is none."""
        if self.route is None:
            return {"input_ids": text_ids(scene, side), **self.about_rows(scene, side)}
        rows_BTD = between(self.lm.get_input_embeddings(), scene, self.route.projector, side)
        return {"inputs_embeds": rows_BTD, **self.about_rows(scene, side)}


class Qwen2Audio(PeerModel):
    """PLITS as transformers has it: a linear layer, audio as rows.

    Given features, its projector, language model and head run by themselves, the head on the rows that are asked for.
    From frames its own forward runs, which knows no `logits_to_keep`: the head goes over every row.
    """

    def __init__(self, llm: Backbone, plain: Any, preset: Preset, encoder: Encoder | None) -> None:
        audio = {**preset.encoder, "encoder_layerdrop": 0.0}
        if encoder is None:
            audio["num_hidden_layers"] = 0
        config = Qwen2AudioConfig(
            audio_config={"model_type": "qwen2_audio_encoder", **audio},
            text_config={**llm.lm.config.to_dict(), "num_hidden_layers": 1},
            audio_token_index=llm.vocab - 1,
        )
        dtype = getattr(torch, preset.dtype)
        with torch.device(preset.device):
            self._whole: Any = Qwen2AudioForConditionalGeneration._from_config(
                config, attn_implementation="sdpa", dtype=dtype
            )
        self._whole.model.language_model = plain.model
        self._whole.lm_head = plain.lm_head
        if encoder is not None:
            tower: Any = encoder.network
            self._whole.model.audio_tower.load_state_dict(tower.state_dict(keep_vars=True), assign=True)
        self._whole.eval()
        super().__init__("qwen2audio", llm, self._whole.model.multi_modal_projector)
        self.lm = plain

    def forward(self, scene: BenchScene, keep: Tensor | int, use_cache: bool) -> ForwardOutput:
        """See the class."""
        if scene.frames is None:
            return super().forward(scene, keep, use_cache)
        out = self._whole(**self._processed(scene), attention_mask=self.mask(scene), use_cache=use_cache)
        return ForwardOutput(out.logits, out.past_key_values)

    def given(self, scene: BenchScene, side: Side) -> dict[str, Tensor]:
        """Rows of its projector among those of the text."""
        assert self.own is not None
        rows_BTD = between(self.lm.get_input_embeddings(), scene, self.own, side)
        return {"inputs_embeds": rows_BTD, **self.about_rows(scene, side)}

    def loss(self, scene: BenchScene) -> Tensor:
        """Its own from frames."""
        if scene.frames is None:
            return super().loss(scene)
        given = self._processed(scene)
        labels_BT = given["input_ids"].clone()
        labels_BT[:, : -scene.answer] = IGNORE
        loss: Tensor = self._whole(**given, attention_mask=self.mask(scene), labels=labels_BT, use_cache=False).loss
        return loss

    def _processed(self, scene: BenchScene) -> dict[str, Tensor]:
        """What its processor makes: the audio's id for each token, windows of full length, their real frames."""
        assert scene.frames is not None
        text_BT = scene.text_BT
        audio_BA = text_BT.new_full((scene.batch, scene.audio_tokens), self.llm.vocab - 1)
        network: Any = self._whole.model.audio_tower
        full = 2 * network.config.max_source_positions
        x_WFM = scene.frames.x_WFM[:, :full]
        x_WFM = F.pad(x_WFM, (0, 0, 0, full - x_WFM.shape[1]))
        real_WF = torch.arange(full, device=text_BT.device) < 4 * scene.frames.tokens_W[:, None]
        return {
            "input_ids": torch.cat((text_BT[:, : scene.before], audio_BA, text_BT[:, scene.before :]), dim=1),
            "input_features": x_WFM.mT,
            "feature_attention_mask": real_WF.long(),
        }


class Mllama(PeerModel):
    """Gated cross-attention as transformers has it: layers of its own, here beside all of the LLM's.

    What MllamaModel does before its LLM is done here for audio: features go through a linear layer to the LLM's width,
    and a mask lets text look at the clips before it. (Without that mask the cross-attention would be causal by row.)
    """

    # a cache makes a graph of each layer and size of batch, a minute of compiling
    compiled_phases = ("train",)

    def __init__(self, llm: Backbone, plain: Any, preset: Preset) -> None:
        config = plain.config
        crossing = cross_layers(llm.n_layers)
        device, dtype = torch.device(preset.device), getattr(torch, preset.dtype)
        made = MllamaTextConfig(
            vocab_size=llm.vocab,
            hidden_size=llm.width,
            intermediate_size=llm.ffn_width,
            num_hidden_layers=llm.n_layers + len(crossing),
            num_attention_heads=llm.heads,
            num_key_value_heads=llm.kv_heads,
            rope_parameters=deepcopy(config.rope_parameters),
            rms_norm_eps=config.rms_norm_eps,
            max_position_embeddings=config.max_position_embeddings,
            cross_attention_layers=list(crossing),
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
        )
        with device:
            self.lm = MllamaForCausalLM._from_config(made, attn_implementation="sdpa", dtype=dtype)
            projector = nn.Linear(preset.width, llm.width, dtype=dtype)
        own = [layer for i, layer in enumerate(self.lm.model.layers) if i in crossing]
        shared = [layer for i, layer in enumerate(self.lm.model.layers) if i not in crossing]
        for layer, source in zip(shared, plain.model.layers, strict=True):
            layer.load_state_dict(source.state_dict(keep_vars=True), assign=True)
        self.lm.model.norm.load_state_dict(plain.model.norm.state_dict(keep_vars=True), assign=True)
        # without the eight rows that Mllama keeps for images
        self.lm.set_input_embeddings(plain.get_input_embeddings())
        self.lm.set_output_embeddings(plain.get_output_embeddings())
        self.lm.eval()
        super().__init__("mllama", llm, nn.ModuleList([projector, *own]))
        self.projector = projector
        self.hears_rows = False

    def given(self, scene: BenchScene, side: Side) -> dict[str, Tensor]:
        """Text with projected features beside it."""
        features = scene.features()
        audio_BAD = self.projector(features.x_BAE)
        place_BT = torch.arange(scene.text_tokens, device=audio_BAD.device)[None]
        before: int | Tensor = scene.before
        if scene.ragged is not None:
            place_BT = scene.padded(False, side).positions_BT
            before = scene.befores
        hears_BT = (place_BT >= before).to(audio_BAD.dtype).expand(scene.batch, -1)
        # rows that hear nothing look at everything, and the second mask drops what comes of it
        mask_B1TA = audio_BAD.new_zeros(scene.batch, 1, scene.text_tokens, scene.audio_tokens)
        if scene.ragged is not None:
            mask_B1TA = mask_B1TA.masked_fill(~features.mask_BA[:, None, None], torch.finfo(mask_B1TA.dtype).min)
        return {
            "input_ids": text_ids(scene, side),
            "cross_attention_states": audio_BAD,
            "cross_attention_mask": mask_B1TA,
            "full_text_row_masked_out_mask": hears_BT[:, None, :, None],
            **self.about_rows(scene, side),
        }


def cross_layers(layers: int) -> tuple[int, ...]:
    """Where Mllama's layers of cross-attention stand among all, one before the last of each group of the LLM's."""
    return tuple(i * (_SELF_LAYERS + 1) + _SELF_LAYERS - 1 for i in range(max(1, layers // _SELF_LAYERS)))


def plain_lm(llm: Backbone) -> Any:
    """transformers' own model with the backbone's weights, which both then share."""
    config = deepcopy(llm.lm.config)
    with torch.device(llm.device):
        lm: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=llm.dtype)
    lm.load_state_dict(llm.lm.state_dict(keep_vars=True), assign=True)
    return lm.eval()


def text_ids(scene: BenchScene, side: Side) -> Tensor:
    """The text's ids [B, T], filled up on a side."""
    if scene.ragged is None:
        return scene.text_BT
    return scene.text_BT.flatten()[scene.padded(False, side).source_BT]


def between(embedding: Any, scene: BenchScene, projector: nn.Module, side: Side) -> Tensor:
    """Embeddings [B, T + A, D] of the text with the projected clip at its place, filled up on a side."""
    text_BTD = embedding(scene.text_BT)
    audio_BAD = projector(scene.features().x_BAE)
    if scene.ragged is not None:
        table_XD = torch.cat((text_BTD.flatten(0, 1), audio_BAD.flatten(0, 1)))
        return table_XD[scene.padded(True, side).source_BT]
    return torch.cat((text_BTD[:, : scene.before], audio_BAD, text_BTD[:, scene.before :]), dim=1)
