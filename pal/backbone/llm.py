"""`Backbone`: an unmodified Hugging Face LLM, and the only code that knows its insides."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pal.backbone import adapters, graphs, regions
from pal.backbone.attention import NAME, without_cudnn
from pal.backbone.cache import JointCache, Step
from pal.backbone.context import AudioContext, AudioView, Rope
from pal.backbone.folded import FoldedKV, fold, unhooked
from pal.backbone.generate import generate, prompt_side, stream
from pal.backbone.packed import PackedContext, Projection
from pal.backbone.reading import cache_for, through_cache
from pal.backbone.sources import first_sentence, more_layers, read_config
from pal.backbone.tied import TiedRows
from pal.backbone.varlen import has_kernel
from pal.config import StrictConfig
from pal.errors import ConfigError, PalError
from pal.transfer import to_device
from pal.types import IGNORE, LLMInputs, Targets

FAMILIES = ("gemma", "gemma3_text", "llama", "mistral", "qwen2", "qwen3")
"""transformers' `model_type` of the supported LLMs (Qwen2.5 is qwen2)."""

Trained = Literal["full", "no_ffn", "lora", "attention", "none"]
Kept = TypeVar("Kept")
Per = Literal["token", "answer"]
"""What counts alike in a loss: every token, so that long answers count most, or every answer."""


class LoRA(StrictConfig):
    """Low-rank adapters beside frozen weights; the defaults are LTU's."""

    rank: int = 8
    alpha: int = 16
    dropout: float = 0.05
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Names of the linear layers that get adapters."""


class _Hears:
    """Names the argument `audio` in a causal LLM's forward, without which `generate` refuses it."""

    plain: Any
    """transformers' class, which this is a subclass of."""

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, though its module is not transformers': the layers are all theirs."""
        return False

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # transformers looks into the text of the class's module
        return bool(cls.plain._can_set_attn_implementation())

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        audio: AudioContext | PackedContext | None = None,
        **kwargs: Any,
    ) -> Any:
        forward = partial(super().forward, labels=labels, use_cache=use_cache, logits_to_keep=logits_to_keep)  # type: ignore[misc]
        if isinstance(audio, AudioContext) and use_cache and past_key_values is None and not torch.is_grad_enabled():
            past_key_values = cache_for(audio, inputs_embeds, attention_mask, position_ids)
        if isinstance(past_key_values, JointCache):
            compiled = regions.is_compiled(self.model.layers[0])  # type: ignore[attr-defined]
            given = (input_ids, inputs_embeds, attention_mask, position_ids)
            return through_cache(forward, past_key_values, *given, kwargs, compiled)
        if audio is not None:
            if getattr(past_key_values, "is_compileable", False):
                raise PalError("this cache cannot be used with audio; leave cache_implementation out or say 'static'")
            if isinstance(audio, PackedContext):
                if past_key_values is not None or use_cache or attention_mask is None:
                    raise PalError("packed rows need their attention_mask and use_cache=False; generate keeps them")
                kwargs["audio"], attention_mask = audio, audio.mask(attention_mask)
            else:
                kwargs["audio"] = audio.view(attention_mask, position_ids)
        with without_cudnn():
            return forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                **kwargs,
            )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """transformers' inputs of the next forward, with the mask that `generate` drops where it is all ones."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, inputs_embeds=inputs_embeds, **kwargs
        )
        if inputs.get("audio") is not None and inputs.get("attention_mask") is None:
            positions_BQ = inputs["position_ids"]
            cache = inputs.get("past_key_values")
            seen = positions_BQ.shape[1] + (0 if cache is None else cache.get_seq_length())
            inputs["attention_mask"] = positions_BQ.new_ones((positions_BQ.shape[0], seen))
        return inputs


class Backbone(nn.Module):
    """A causal LLM that can hear.

    Attributes:
        lm: the Hugging Face model, its weights and names untouched.
        width: D. n_layers: L. heads: H. kv_heads: G. head_width: C.
        ffn_width: inside the feed-forward networks.
        key_norm: whether queries and keys are normed before RoPE.
        norms_each: norms that each half of a layer has.
        layer_types: per layer, the key of its rotary embedding in `rope`.
        dropout: of attention probabilities, while it trains.
        windows: per layer, how many positions back a query sees, itself included; None means all.
        recomputes_audio: whether what makes a layer's audio K/V (its projector's activations) is dropped and made
            again in the backward pass, so that only one layer's lives at a time. K/V and text are kept.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        assert isinstance(lm, _Hears), "make it with Backbone.load"
        self.lm: Any = lm  # transformers' classes are too dynamic for types
        self.lora: LoRA | None = None
        self.recomputes_audio = True
        self._tied: TiedRows | None = None
        self._packs: bool | None = None
        config = lm.config
        self.width: int = config.hidden_size
        self.n_layers: int = config.num_hidden_layers
        self.ffn_width: int = config.intermediate_size
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.head_width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.dropout: float = config.attention_dropout
        self._typed_rope = config.model_type == "gemma3_text"
        self._gemma = config.model_type.startswith("gemma")
        kinds = config.layer_types if self._typed_rope else ["all"] * self.n_layers
        self.layer_types: tuple[str, ...] = tuple(kinds)
        first = lm.model.layers[0]
        self.key_norm: bool = hasattr(first.self_attn, "k_norm")
        self.norms_each: int = 2 if hasattr(first, "pre_feedforward_layernorm") else 1
        self.windows: tuple[int | None, ...] = tuple(_window(block.self_attn) for block in lm.model.layers)
        for block in lm.model.layers:
            block.register_forward_pre_hook(_enter, with_kwargs=True)

    @classmethod
    def load(
        cls,
        source: str | Path | Mapping[str, Any],
        *,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Backbone:
        """An LLM from the Hub or a local folder, or a fresh one with random weights.

        Args:
            source: Hub id, folder, or the fields of a configuration with its `model_type`.
            revision: branch, tag or commit on the Hub.
            dtype: of the weights.

        Raises:
            PalError: an unsupported family, a folder that is none, or weights that are missing.
        """
        if isinstance(source, Mapping):
            config = _config_from(source)
            return cls(_hearing_class(config)._from_config(config, attn_implementation=NAME, dtype=dtype))
        try:
            config = read_config(source, revision)
            _check_family(config)
            lm, report = _hearing_class(config).from_pretrained(
                source,
                revision=revision or "main",
                attn_implementation=NAME,
                dtype=dtype,
                use_safetensors=True,  # the others are pickle
                ignore_mismatched_sizes=True,  # refused below, by name
                output_loading_info=True,
            )
        except SafetensorError as error:
            reason = first_sentence(error)
            raise PalError(f"cannot load the LLM '{source}': {reason}; copy or download its weights again") from None
        except (OSError, RuntimeError) as error:
            raise PalError(f"cannot load the LLM '{source}': {first_sentence(error)}") from None
        if report["mismatched_keys"]:
            name, found, expected = sorted(report["mismatched_keys"])[0]
            raise PalError(
                f"the LLM '{source}': its weights are of another model than its config.json: {name} has shape "
                f"{tuple(found)}, not {tuple(expected)}; give both of one model"
            )
        more = more_layers(report["unexpected_keys"], lm.state_dict().keys())
        if more is not None:
            raise PalError(
                f"the LLM '{source}': its weights have more layers than its config.json, such as {more}; "
                "give both of one model"
            )
        if report["missing_keys"]:
            # transformers would go on with random weights and a log line
            raise PalError(f"the LLM '{source}' lacks weights, such as {sorted(report['missing_keys'])[0]}")
        return cls(lm)

    def save(self, folder: str | Path) -> None:
        """Write the LLM as a folder that transformers reads. Adapters are not part of it."""
        if self.lora is not None:
            raise PalError("an LLM with LoRA adapters cannot be saved alone; save the model")
        self.note_ties()
        self.lm.save_pretrained(folder)

    @property
    def device(self) -> torch.device:
        """Where the embeddings are."""
        return self._embedded.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the embeddings."""
        return self._embedded.dtype

    @property
    def vocab(self) -> int:
        """Rows of the embeddings: the size of the vocabulary."""
        return int(self.lm.config.vocab_size)

    def resize_vocab(self, rows: int | None = None, **options: Any) -> None:
        """Give embeddings and head another number of rows; `options` are those of transformers' method."""
        self.note_ties()  # which would tie again what the configuration calls tied
        self.lm.resize_token_embeddings(rows, **options)

    def note_ties(self) -> None:
        """Say in the configuration that head and embeddings are two matrices, where training has parted them.

        Whoever reads the configuration would make them one again.
        """
        table, head = (adapters.beneath(module) for module in self._ends())
        if self.lm.config.tie_word_embeddings and head.weight.data_ptr() != table.weight.data_ptr():
            self.lm.config.tie_word_embeddings = False
            self.lm.all_tied_weights_keys = {}

    def untie_head(self) -> None:
        """Give the head a matrix of its own, equal to the embeddings'."""
        head = adapters.beneath(self.lm.get_output_embeddings())
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        self.note_ties()

    def train(self, mode: bool = True) -> Backbone:
        """Training mode or not; a head that PEFT adapts apart from the embeddings is untied, so that it can be merged.

        PEFT says by this call that its adapters are in place.
        """
        super().train(mode)
        if mode:
            graphs.forget(self)
        adapters.check(*self._ends())
        self.note_ties()
        if self.lm.config.tie_word_embeddings and adapters.part(*self._ends()):
            self.untie_head()
        return self

    def _ends(self) -> tuple[Any, Any]:
        return self.lm.get_input_embeddings(), self.lm.get_output_embeddings()

    @property
    def layers(self) -> nn.ModuleList:
        """Its layers, in order, for who hooks onto them."""
        found: nn.ModuleList = self.lm.model.layers
        return found

    @property
    def _embedded(self) -> Tensor:
        """The embeddings' own weights, for their device and dtype; PEFT's, where it adapts them, come after."""
        weight: Tensor = next(self.lm.get_input_embeddings().parameters())
        return weight

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [...] -> embeddings [..., D] as the first layer gets them (Gemma's are scaled).

        Where the LM head has the same weights, their gradients are made together; see `TiedRows`.
        """
        table = self.lm.get_input_embeddings()
        if getattr(table, "neftune_noise_alpha", None) is not None:
            # its scale comes from the length of a padded text, and here the ids of all texts are one row
            raise PalError("neftune_noise_alpha is not supported: embeddings are made without padding; leave it out")
        tied = self._tied_rows()
        if tied is None:
            rows: Tensor = table(ids)
            return rows
        x = tied(ids, table.padding_idx)
        scale = getattr(table, "embed_scale", None)
        return x if scale is None else x * scale.to(x.dtype)

    def _tied_rows(self) -> TiedRows | None:
        """For embeddings that train together with the head; None where the module itself has to be called."""
        table, head = self._ends()
        if not isinstance(table, nn.Embedding):  # PEFT adapts it
            return None
        weight = table.weight
        if not (torch.is_grad_enabled() and weight.requires_grad and head is not None and head.weight is weight):
            return None
        # hooks, such as those that put a sharded weight together, belong to the module
        if type(weight) is not nn.Parameter or table._forward_hooks or table._forward_pre_hooks:
            return None
        if self._tied is None or self._tied.weight_VD is not weight:
            self._tied = TiedRows(weight)
        return self._tied

    def project_kv(self, layer: int, u_BAD: Tensor) -> tuple[Tensor, Tensor]:
        """What `layer` would make of `u` as its input, each [B, G, A, C]: keys before RoPE (after k_norm), values."""
        block = self.lm.model.layers[layer]
        x_BAD = block.input_layernorm(u_BAD.to(self.dtype))
        k_BGAC = self._keys(layer, block.self_attn.k_proj(x_BAD))
        # last, since a product of which nothing is kept is not made again in the backward pass
        return k_BGAC, self._heads(block.self_attn.v_proj(x_BAD))

    def fold_kv(self, layer: int, last: nn.Module) -> FoldedKV | None:
        """A projector's last layer and `project_kv` as one product; None where that does not pay or cannot be."""
        block = self.lm.model.layers[layer]
        return fold(last, block.input_layernorm, block.self_attn.k_proj, block.self_attn.v_proj)

    def holds(self, layer: int, folded: FoldedKV, last: nn.Module) -> bool:
        """Whether `fold_kv` would give the same now: whatever changed since, its weights and modules are compared."""
        block = self.lm.model.layers[layer]
        return folded.fresh(last, block.input_layernorm, block.self_attn.k_proj, block.self_attn.v_proj)

    def folded_kv(self, layer: int, folded: FoldedKV, h_BAM: Tensor) -> tuple[Tensor, Tensor]:
        """`project_kv` of what the projector's last layer makes of h."""
        k_BAX, v_BAX = folded(h_BAM)
        return self._keys(layer, k_BAX.to(self.dtype)), self._heads(v_BAX.to(self.dtype))

    def _keys(self, layer: int, k_BAX: Tensor) -> Tensor:
        norm = getattr(self.lm.model.layers[layer].self_attn, "k_norm", None)  # Qwen3 and Gemma3 have one
        k_BAGC = k_BAX.unflatten(-1, (self.kv_heads, self.head_width))
        return (k_BAGC if norm is None else norm(k_BAGC)).transpose(1, 2)

    def _heads(self, x_BAX: Tensor) -> Tensor:
        return x_BAX.unflatten(-1, (self.kv_heads, self.head_width)).transpose(1, 2)

    def attend_among(self, layer: int, u_BAD: Tensor, mask_BA: Tensor) -> Tensor:
        """`u` after `layer`'s attention among itself, without its feed-forward network -> [B, A, D].

        Causal, within the layer's window. Real rows come first. Positions count from 0: RoPE only sees differences.
        """
        block = self.lm.model.layers[layer]
        positions_1A = torch.arange(u_BAD.shape[1], device=u_BAD.device)[None]
        distance_AA = positions_1A.T - positions_1A
        window = self.windows[layer]
        seen_AA = (distance_AA >= 0) & (distance_AA < (window or u_BAD.shape[1]))
        # padding sees itself, since a row without any key would be NaN; no real row sees padding, which comes later
        added_BAD, _ = block.self_attn(
            hidden_states=block.input_layernorm(u_BAD),
            position_embeddings=self.rope(positions_1A)[self.layer_types[layer]],
            attention_mask=seen_AA.expand(u_BAD.shape[0], 1, -1, -1),
        )
        if hasattr(block, "pre_feedforward_layernorm"):  # Gemma3 norms what attention adds
            added_BAD = block.post_attention_layernorm(added_BAD)
        return u_BAD + added_BAD.masked_fill(~mask_BA[..., None], 0.0)

    def rope(self, positions_BA: Tensor) -> Rope:
        """The LLM's rotary embedding at any positions, per type of layer."""
        rotary = self.lm.model.rotary_emb
        like = self._embedded  # for its device and dtype
        if not self._typed_rope:
            return {"all": rotary(like, positions_BA)}
        return {kind: rotary(like, positions_BA, kind) for kind in sorted(set(self.layer_types))}

    @property
    def hears(self) -> bool:
        """Whether the attention function is the one that sees audio."""
        return bool(self.lm.config._attn_implementation == NAME)

    def check_ears(self) -> None:
        """Raises PalError when another attention function was set on the LLM, which would ignore audio silently."""
        found = self.lm.config._attn_implementation
        if found != NAME:
            raise PalError(f"the LLM's attention is '{found}', which cannot hear; set attn_implementation to '{NAME}'")

    def forward(self, inputs: LLMInputs, **kwargs: Any) -> Any:
        """transformers' output with logits [B, T, vocab]; `kwargs` go to the LLM."""
        return self.lm(
            inputs_embeds=inputs.inputs_embeds_BTD,
            attention_mask=inputs.attention_mask_BT,
            position_ids=inputs.position_ids_BT,
            audio=inputs.audio,
            **{"use_cache": False, **kwargs},
        )

    def loss(self, inputs: LLMInputs, per: Per = "token") -> tuple[Tensor, int]:
        """Sum of the cross-entropies of the labelled tokens, and their number; or of answers' means, and theirs.

        An answer is a run of labelled tokens.
        """
        targets = inputs.targets or _targets(inputs)
        losses_N = self._token_losses(inputs, targets)
        if per == "token":
            return losses_N.sum(), len(losses_N)
        shares_N = np.repeat(1.0 / np.array(targets.lengths or [1.0]), targets.lengths or [0])
        weights_N = to_device(torch.tensor(shares_N, dtype=losses_N.dtype), losses_N.device)
        return (losses_N * weights_N).sum(), len(targets.lengths)

    def label_scores(self, inputs: LLMInputs) -> Tensor:
        """Log-likelihood of each row's labelled tokens, summed: float32 [B]."""
        targets = inputs.targets or _targets(inputs)
        losses_N = self._token_losses(inputs, targets)
        scores_B = losses_N.new_zeros(targets.conversations)
        return scores_B.index_add(0, targets.conversations_N, -losses_N)

    def _token_losses(self, inputs: LLMInputs, targets: Targets) -> Tensor:
        """Cross-entropy of each labelled token; the head runs on the rows that predict one."""
        hidden_XD = self.hidden(inputs).flatten(0, 1)
        logits_NV = self._logits(hidden_XD.index_select(0, targets.rows_N))
        return F.cross_entropy(logits_NV.float(), targets.labels_N, reduction="none")

    def _logits(self, hidden_ND: Tensor) -> Tensor:
        """The head on a few rows."""
        head = self.lm.lm_head
        if type(head) is not nn.Linear or head.bias is not None or head._forward_hooks or head._forward_pre_hooks:
            logits_NV: Tensor = head(hidden_ND)
            return logits_NV
        if hidden_ND.device.type != "cpu":
            return F.linear(hidden_ND, head.weight)
        # the long side first: on a CPU up to 1.6 times as fast, and the weight's gradient comes out as it is stored,
        # so that autograd adds to it in place
        return (head.weight @ hidden_ND.T).T

    def logits_at(self, inputs: LLMInputs, rows_BK: Tensor) -> Tensor:
        """Logits of some rows of each sequence [B, K, vocab]; the head runs on these alone."""
        hidden_BTD = self.hidden(inputs)
        index_BKD = rows_BK[..., None].expand(-1, -1, hidden_BTD.shape[-1])
        logits: Tensor = self.lm.lm_head(hidden_BTD.gather(1, index_BKD))
        return logits

    def hidden(self, inputs: LLMInputs) -> Tensor:
        """What the head gets: [B, T, D] after the last norm."""
        audio, mask = inputs.audio, inputs.attention_mask_BT
        extra: dict[str, Any] = {}
        if isinstance(audio, PackedContext):
            self.check_ears()
            extra["audio"], mask = audio, audio.mask(mask)
        elif audio is not None:
            extra["audio"] = audio.view(mask, inputs.position_ids_BT)
        hidden_BTD: Tensor = self.lm.model(
            inputs_embeds=inputs.inputs_embeds_BTD,
            attention_mask=mask,
            position_ids=inputs.position_ids_BT,
            use_cache=False,
            **extra,
        ).last_hidden_state
        return hidden_BTD

    @contextmanager
    def counting_ffn_rows(self) -> Iterator[list[int]]:
        """Counts, while the block lasts, the rows that each layer's feed-forward network is given."""
        counts = [0] * self.n_layers

        def count(layer: int, network: nn.Module, given: tuple[Tensor, ...]) -> None:
            counts[layer] += given[0].shape[:-1].numel()

        blocks = self.lm.model.layers
        hooks = [block.mlp.register_forward_pre_hook(partial(count, layer)) for layer, block in enumerate(blocks)]
        try:
            yield counts
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def hidden_rows(self, inputs: LLMInputs, keep: Callable[[Tensor], Kept]) -> list[Kept]:
        """What `keep` takes of the rows [B, T, D] that enter the first layer and that leave each layer: L + 1 results.

        The rows are those of the residual stream; the last layer's are not normed yet. `keep` is called as each layer
        is done, so that one layer's rows live at a time.
        """
        kept = [keep(inputs.inputs_embeds_BTD)]
        hooks = [block.register_forward_hook(lambda _, __, out: kept.append(keep(out))) for block in self.layers]
        try:
            self.hidden(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return kept

    def generate(self, inputs: LLMInputs, **kwargs: Any) -> Tensor:
        """New token ids [B (times returned sequences), N] that continue each row; see `pal.backbone.generate`."""
        return generate(self, inputs, **kwargs)

    def prompt_side(self, **kwargs: Any) -> Literal["left", "none"]:
        """The `padding_side` of inputs for `generate` with these options."""
        return prompt_side(self, kwargs)

    def stream(self, inputs: LLMInputs, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> Iterator[str]:
        """`generate` for one row, as pieces of text when they are ready; together they equal its whole text."""
        return stream(self, inputs, tokenizer, **kwargs)

    def checkpoint_gradients(self, on: bool, audio: bool = True) -> None:
        """Recompute each layer, its audio K/V included, in the backward pass instead of keeping it.

        Args:
            on: whether to.
            audio: where layers are kept, whether what makes their audio K/V is recomputed all the same.
        """
        self.recomputes_audio = audio and not on
        if on:
            # the reentrant kind raises on arguments such as `audio`
            _renamed(self.lm, "activation_checkpointing_enable", "gradient_checkpointing_enable")(
                {"use_reentrant": False}
            )
            # only the reentrant kind needs gradients of the embeddings: with a frozen LLM they would take the
            # backward pass through layers that nothing trained comes before
            self.lm.disable_input_require_grads()
        else:
            _renamed(self.lm, "activation_checkpointing_disable", "gradient_checkpointing_disable")()

    def compile(self, **options: Any) -> None:
        """torch.compile each layer with its audio K/V (`pal.backbone.regions`); `options` go to torch.compile."""
        regions.compile_layers(self.layers, **options)

    def uncompile(self) -> None:
        """Take that back."""
        regions.uncompile_layers(self.layers)

    @property
    def packs(self) -> bool:
        """Whether conversations are best laid one after the other here (`Integration.forward` with "none").

        That is on a GPU, in a precision that its flash kernel takes. Set it to have it so or not; with dropout of
        attention it never is.
        """
        if self.dropout:  # of attention probabilities, which its kernel does not know
            return False
        if self._packs is not None:
            return self._packs
        device, dtype = self.device, self.dtype
        if device.type == "cuda" and torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
        return has_kernel(device, dtype, self.head_width)

    @packs.setter
    def packs(self, packs: bool | None) -> None:
        self._packs = packs

    @property
    def side(self) -> Literal["right", "none"]:
        """How rows are padded in training and scoring."""
        return "none" if self.packs else "right"

    def projection(self, layer: int, projector: nn.Module, x_ME: Tensor) -> Projection:
        """What `layer` makes audio K/V of, given features of tokens without padding."""
        norm: Any = self.layers[layer].input_layernorm
        gain = None
        # Gemma's weights are stored around 0, and transformers adds the 1 in float32
        if unhooked(norm) and type(norm).__name__.endswith("RMSNorm") and not self._gemma:
            gain = (norm.weight, norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)
        random = any(isinstance(part, nn.Dropout) and part.training and part.p for part in projector.modules())
        return Projection(x_ME, projector, norm, self.dtype, gain, self.recomputes_audio, random)

    def add_lora(self, options: LoRA) -> None:
        """Put adapters beside the named layers. The projection of audio goes through them too."""
        from peft import LoraConfig, inject_adapter_in_model

        if self.lora is not None:
            raise PalError("the LLM already has LoRA adapters")
        config = LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            target_modules=list(options.targets),
        )
        try:
            inject_adapter_in_model(config, self.lm)
        except ValueError as error:
            raise ConfigError(f"lora: {str(error).splitlines()[0]}") from None
        self.train(self.lm.training)  # adapters are made in training mode, where their dropout is on
        self.lora = options

    def merge_adapters(self) -> set[str]:
        """Fold all adapters into the weights beside them; names of the weights this changed."""
        changed = adapters.merge(self)
        self.lora = None
        self.note_ties()
        return changed

    def train_only(self, what: Trained) -> list[nn.Parameter]:
        """Make one part trainable and freeze the rest; returns what is trained.

        "full": everything. "no_ffn": everything but the feed-forward networks (the paper's frozen FFN). "lora": the
        adapters. "attention": the attention blocks alone, their adapters included. "none": nothing.
        """
        if what == "lora" and self.lora is None:
            raise ConfigError("the LLM has no LoRA adapters to train; add them first")
        chosen = []
        for name, parameter in self.lm.named_parameters():
            parts = name.split(".")
            adapter = any(part.startswith("lora_") for part in parts)
            train = {
                "full": True,
                "no_ffn": "mlp" not in parts,
                "lora": adapter,
                "attention": "self_attn" in parts,
                "none": False,
            }[what]
            parameter.requires_grad_(train)
            if train:
                chosen.append(parameter)
        return chosen


def _enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Let the blocks that an integration puts before a layer change the rows that go into it; tell it what it hears."""
    audio = kwargs.get("audio")
    if not isinstance(audio, AudioView | PackedContext | Step):
        return None
    layer: int = block.self_attn.layer_idx  # type: ignore[union-attr, assignment]
    if not isinstance(audio, PackedContext):
        return ((audio.cross(layer, args[0]), *args[1:]), kwargs) if audio.crosses(layer) else None
    cache = kwargs.get("past_key_values")
    caught = cache.catch(layer) if isinstance(cache, JointCache) else None
    if audio.crosses(layer):
        args = (audio.cross(layer, args[0], caught), *args[1:])
    return args, {**kwargs, "audio": audio.at(layer, caught), **({} if caught is None else {"past_key_values": caught})}


def _targets(inputs: LLMInputs) -> Targets:
    """What labels ask for that were not laid out on the host.

    A row's first token, which nothing predicts, does not count, nor one behind padding.
    """
    assert inputs.labels_BT is not None, "inputs without labels"
    T = inputs.labels_BT.shape[1]
    next_BT = inputs.labels_BT[:, 1:].masked_fill(inputs.attention_mask_BT[:, :-1] == 0, IGNORE)
    row_N, column_N = (next_BT != IGNORE).nonzero(as_tuple=True)
    starts_N = torch.ones_like(row_N, dtype=torch.bool)
    starts_N[1:] = (row_N[1:] != row_N[:-1]) | (column_N[1:] != column_N[:-1] + 1)
    answers_N = starts_N.cumsum(0) - 1
    lengths = tuple(answers_N.bincount().tolist())
    return Targets(row_N * T + column_N, next_BT[row_N, column_N], row_N, lengths, len(next_BT))


def _window(attention: Any) -> int | None:
    # Mistral's layers all follow the configuration; the other families' say it themselves
    if attention.config.model_type == "mistral":
        window: int | None = attention.config.sliding_window
    else:
        window = getattr(attention, "sliding_window", None)
    return window


def _renamed(lm: Any, new: str, old: str) -> Callable[..., None]:
    """The method under its name in this version of transformers."""
    return getattr(lm, new if hasattr(lm, new) else old)


def _config_from(fields: Mapping[str, Any]) -> PreTrainedConfig:
    fields = dict(deepcopy(fields))  # transformers completes nested ones, such as `rope_scaling`, in place
    family = fields.pop("model_type", None)
    if family not in FAMILIES:
        raise PalError(f"LLM family '{family}' is not supported; supported: {', '.join(FAMILIES)}")
    config = AutoConfig.for_model(family, **fields)
    _check_family(config)
    return config


def _check_family(config: PreTrainedConfig) -> None:
    if config.model_type not in FAMILIES:
        raise PalError(f"LLM family '{config.model_type}' is not supported; supported: {', '.join(FAMILIES)}")
    kinds = _rope_kinds(getattr(config, "rope_parameters", None) or {})
    changing = sorted(kinds & {"dynamic", "longrope"})
    if changing:
        # their frequencies depend on the longest position of a call, so stored keys would go stale
        raise PalError(f"rope type '{changing[0]}' is not supported: it changes with the length of the text")


def _rope_kinds(parameters: Mapping[str, Any]) -> set[str]:
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    return {str(entry.get("rope_type", "default")) for entry in [*nested, parameters]}


def _hearing_class(config: PreTrainedConfig) -> Any:
    """transformers' class for the family, with `audio` among its forward's arguments; the name stays."""
    _check_family(config)
    return _class_that_hears(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


@cache
def _class_that_hears(plain: Any) -> Any:
    # one class for all models, and found in this module under its name: pickle asks for both
    return type(plain.__name__, (_Hears, plain), {"__module__": __name__, "plain": plain})


def __getattr__(name: str) -> Any:
    """The class of an LLM that hears, by the name that transformers gives it, such as `LlamaForCausalLM`."""
    for family in FAMILIES:
        if MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family] == name:
            return _class_that_hears(MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]])
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
