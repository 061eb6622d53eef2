"""`Backbone`: an unmodified Hugging Face LLM, whose attention also sees audio keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pal.backbone import adapters, families, graphs, regions, tied
from pal.backbone.attention import NAME
from pal.backbone.attention_metadata import AttentionMetadata
from pal.backbone.cache import CapturingCache, DecodingStep, JointCache
from pal.backbone.causal_lm import AudioCausalLM
from pal.backbone.finetuning import LLMPart, LoRA, freeze_except, insert_lora
from pal.backbone.fused_kv import FusedKV, fold, unhooked
from pal.backbone.generate import (
    ReadPrefixes,
    continues,
    generate,
    generate_after,
    prompt_side,
    read_prefixes,
    stream,
)
from pal.backbone.interfaces import LaterRows, Rope
from pal.backbone.kernels import supports_split_attention
from pal.backbone.loading import load_lm
from pal.backbone.loss import Per, label_scores, loss
from pal.backbone.loss_graphs import LossGraphs
from pal.backbone.packed import PackedContext, Projection
from pal.backbone.prompt_graphs import PromptGraphs
from pal.backbone.shared_prefix import Continuations
from pal.backbone.varlen import has_kernel
from pal.errors import ConfigError, PalError
from pal.types import LLMInputs


class Backbone(nn.Module):
    """A Hugging Face causal LM whose attention also takes audio keys and values.

    Attributes:
        lm: the Hugging Face model, its weights and names untouched.
        width: D. n_layers: L. heads: H. kv_heads: G. head_width: C.
        ffn_width: inside the feed-forward networks.
        key_norm: queries and keys are normalised before RoPE.
        norms_each: norms in each half of a layer.
        layer_types: per layer, the key of its rotary embedding in `rope`.
        dropout: of attention probabilities, in training.
        windows: per layer, how many positions back a query sees, itself included; None means all.
        recomputes_audio: recompute projector activations in backward, so that only one layer's are in memory at a
            time. K/V and the text's activations are kept.
        shares_prefixes: conversations that begin alike, as questions about one clip do, share the rows, keys and values
            of what they have in common, in training and generation.
    """

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        assert isinstance(lm, AudioCausalLM), "make it with Backbone.load"
        self.lm: Any = lm  # transformers' classes are too dynamic for types
        self.lora: LoRA | None = None
        self.recomputes_audio = True
        self.shares_prefixes = True
        self._tied: tied.TiedRows | None = None
        self._packs: bool | None = None
        self.loss_graphs: LossGraphs | None = None
        self.prompt_graphs: PromptGraphs | None = PromptGraphs()
        config = lm.config
        self.width: int = config.hidden_size
        self.n_layers: int = config.num_hidden_layers
        self.ffn_width: int = config.intermediate_size
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.head_width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.dropout: float = config.attention_dropout
        self._family: str = config.model_type
        self._typed_rope = families.has_typed_rope(config)
        self.layer_types = families.layer_types(config)
        first = lm.model.layers[0]
        self.key_norm: bool = hasattr(first.self_attn, "k_norm")
        self.norms_each: int = 2 if hasattr(first, "pre_feedforward_layernorm") else 1
        self.windows: tuple[int | None, ...] = tuple(families.window(block.self_attn) for block in lm.model.layers)
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
            PalError: an unsupported family, not an LLM's folder, or missing weights.
        """
        return cls(load_lm(source, revision, dtype))

    def save(self, folder: str | Path) -> None:
        """Write the LLM as a folder that transformers reads. Adapters are not part of it."""
        if self.lora is not None:
            raise PalError("an LLM with LoRA adapters cannot be saved alone; save the model")
        self.note_ties()
        self.lm.save_pretrained(folder)

    @property
    def device(self) -> torch.device:
        """Device of the embeddings."""
        return self._embedded.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the embeddings."""
        return self._embedded.dtype

    @property
    def vocab(self) -> int:
        """Size of the vocabulary: rows of the embedding matrix."""
        return int(self.lm.config.vocab_size)

    def resize_vocab(self, rows: int | None = None, **options: Any) -> None:
        """Resize embeddings and head; `options` are those of transformers' method."""
        self.note_ties()  # transformers' method ties the two again if the configuration says so
        self.lm.resize_token_embeddings(rows, **options)

    def note_ties(self) -> None:
        """Set `tie_word_embeddings` to False in the configuration where head and embeddings are two matrices."""
        tied.note_ties(self.lm)

    def untie_head(self) -> None:
        """Give the head its own copy of the embeddings' matrix."""
        tied.untie_head(self.lm)

    def train(self, mode: bool = True) -> Backbone:
        """Set the mode; untie a head that PEFT adapts separately from the embeddings, so that it can be merged.

        PEFT calls this after adding its adapters.
        """
        super().train(mode)
        if mode:
            graphs.forget(self)
        tied.untie_adapted_head(self.lm)
        return self

    @property
    def layers(self) -> nn.ModuleList:
        """Decoder layers, in order."""
        found: nn.ModuleList = self.lm.model.layers
        return found

    @property
    def _embedded(self) -> Tensor:
        """The embeddings' base weight, for device and dtype; PEFT's weights follow it among the parameters."""
        table = self.lm.get_input_embeddings()
        weight: Tensor | None = table._parameters.get("weight")  # at once, where nothing wraps the embeddings
        return next(table.parameters()) if weight is None else weight

    @property
    def embedding_rms(self) -> float:
        """Root mean square of the elements of the first thousand embeddings; 1 for an LLM without weights."""
        with torch.no_grad():
            x_XD = self.embed(torch.arange(min(self.vocab, 1000), device=self.device))
            return 1.0 if x_XD.is_meta else float(x_XD.float().square().mean().sqrt())

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [...] -> embeddings [..., D], the first layer's input (Gemma's are scaled).

        If the LM head shares the weights, both gradients accumulate in one matrix; see `TiedRows`.
        """
        table = self.lm.get_input_embeddings()
        if getattr(table, "neftune_noise_alpha", None) is not None:
            # its noise is scaled by the length of a padded text, and here all texts are embedded as one row
            raise PalError("neftune_noise_alpha is not supported: embeddings are made without padding; leave it out")
        lookup = tied.tied_rows(self.lm, self._tied)
        if lookup is None:
            rows: Tensor = table(ids)
            return rows
        self._tied = lookup
        x = lookup(ids, table.padding_idx)
        scale = getattr(table, "embed_scale", None)
        return x if scale is None else x * scale.to(x.dtype)

    def project_kv(self, layer: int, u_BAD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys before RoPE (after k_norm) and values of `layer` for input `u`, each [B, G, A, C]."""
        block = self.lm.model.layers[layer]
        x_BAD = block.input_layernorm(u_BAD.to(self.dtype))
        k_BGAC = self._keys(layer, block.self_attn.k_proj(x_BAD))
        # last, since checkpointing stops recomputing at the last tensor that backward needs
        return k_BGAC, self._heads(block.self_attn.v_proj(x_BAD))

    def fold_kv(self, layer: int, last: nn.Module) -> FusedKV | None:
        """Fuse a projector's last layer with `project_kv`; None where that is not faster or not possible."""
        block = self.lm.model.layers[layer]
        return fold(last, block.input_layernorm, block.self_attn.k_proj, block.self_attn.v_proj)

    def holds(self, layer: int, folded: FusedKV, last: nn.Module) -> bool:
        """True if the fused product is still valid: weights and modules are compared with those that were fused."""
        block = self.lm.model.layers[layer]
        return folded.fresh(last, block.input_layernorm, block.self_attn.k_proj, block.self_attn.v_proj)

    def folded_kv(self, layer: int, folded: FusedKV, h_BAM: Tensor) -> tuple[Tensor, Tensor]:
        """`project_kv` of the projector's last layer applied to h, by the fused product."""
        k_BAX, v_BAX = folded(h_BAM)
        return self._keys(layer, k_BAX.to(self.dtype)), self._heads(v_BAX.to(self.dtype))

    def _keys(self, layer: int, k_BAX: Tensor) -> Tensor:
        norm = getattr(self.lm.model.layers[layer].self_attn, "k_norm", None)  # Qwen3 and Gemma3 have one
        k_BAGC = k_BAX.unflatten(-1, (self.kv_heads, self.head_width))
        return (k_BAGC if norm is None else norm(k_BAGC)).transpose(1, 2)

    def _heads(self, x_BAX: Tensor) -> Tensor:
        return x_BAX.unflatten(-1, (self.kv_heads, self.head_width)).transpose(1, 2)

    def self_attend(self, layer: int, u_BAD: Tensor, mask_BA: Tensor) -> Tensor:
        """Audio rows `u` after self-attention by `layer`'s weights, without feed-forward network -> [B, A, D].

        Causal, within the layer's window. Real rows come first. Positions count from 0: RoPE depends on differences.
        """
        block = self.lm.model.layers[layer]
        positions_1A = torch.arange(u_BAD.shape[1], device=u_BAD.device)[None]
        distance_AA = positions_1A.T - positions_1A
        window = self.windows[layer]
        seen_AA = (distance_AA >= 0) & (distance_AA < (window or u_BAD.shape[1]))
        # padding sees itself, since a row without any key would be NaN; no real row sees padding, which is last
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
    def attends_to_audio(self) -> bool:
        """True if the LLM uses our attention function, which sees audio keys."""
        return bool(self.lm.config._attn_implementation == NAME)

    def check_attention(self) -> None:
        """Raise PalError if another attention function is set on the LLM; it would ignore audio silently."""
        found = self.lm.config._attn_implementation
        if found != NAME:
            raise PalError(
                f"the LLM's attention is '{found}', which ignores audio; set attn_implementation to '{NAME}'"
            )

    def forward(self, inputs: LLMInputs, **kwargs: Any) -> Any:
        """transformers' output with logits [B, T, vocab]; `kwargs` go to the LLM."""
        return self.lm(
            inputs_embeds=inputs.inputs_embeds_BTD,
            attention_mask=inputs.attention_mask_BT,
            position_ids=inputs.position_ids_BT,
            audio_context=inputs.audio_context,
            **{"use_cache": False, **kwargs},
        )

    def loss(self, inputs: LLMInputs, per: Per = "token") -> tuple[Tensor, int]:
        """Sum of the cross-entropies of labelled tokens (or of the answers' means) and their number; see `loss`."""
        return loss(self, inputs, per)

    def label_scores(self, inputs: LLMInputs) -> Tensor:
        """Sum of the log-likelihoods of each conversation's labelled tokens: float32 [B]."""
        return label_scores(self, inputs)

    def logits_at(self, inputs: LLMInputs, rows_BK: Tensor) -> Tensor:
        """Logits of some rows of each sequence [B, K, vocab]; the head runs only on these."""
        hidden_BTD = self.hidden(inputs)
        index_BKD = rows_BK[..., None].expand(-1, -1, hidden_BTD.shape[-1])
        logits: Tensor = self.lm.lm_head(hidden_BTD.gather(1, index_BKD))
        return logits

    def hidden(self, inputs: LLMInputs) -> Tensor:
        """Hidden states after the final norm, the head's input: [B, T, D]."""
        context, mask = inputs.audio_context, inputs.attention_mask_BT
        extra: dict[str, Any] = {}
        if isinstance(context, PackedContext):
            self.check_attention()
            extra["attention_metadata"], mask = context, context.mask(mask)
        elif context is not None:
            extra["attention_metadata"] = context.attention_metadata(mask, inputs.position_ids_BT)
        hidden_BTD: Tensor = self.lm.model(
            inputs_embeds=inputs.inputs_embeds_BTD,
            attention_mask=mask,
            position_ids=inputs.position_ids_BT,
            use_cache=False,
            **extra,
        ).last_hidden_state
        return hidden_BTD

    def generate(self, inputs: LLMInputs, **kwargs: Any) -> Tensor:
        """New token ids [B (times returned sequences), N] that continue each row; see `pal.backbone.generate`."""
        return generate(self, inputs, **kwargs)

    def continues(self, **kwargs: Any) -> int | None:
        """Most new tokens of `generate_after` with these options; None if it does not support one."""
        return continues(self, kwargs)

    def read_prefixes(self, prefixes: LLMInputs, rows: int) -> ReadPrefixes | None:
        """Read common beginnings of conversations; see `pal.backbone.generate`."""
        return read_prefixes(self, prefixes, rows)

    def generate_after(self, read: ReadPrefixes, continuations: Continuations, **kwargs: Any) -> Tensor:
        """As `generate`, for continuations that share prefixes; see `pal.backbone.generate`."""
        return generate_after(self, read, continuations, **kwargs)

    def prompt_side(self, **kwargs: Any) -> Literal["left", "none"]:
        """The `padding_side` of inputs for `generate` with these options."""
        return prompt_side(self, kwargs)

    def stream(self, inputs: LLMInputs, tokenizer: PreTrainedTokenizerBase, **kwargs: Any) -> Iterator[str]:
        """Stream the answer to one prompt as pieces of text; joined, they are the whole answer of `generate`."""
        return stream(self, inputs, tokenizer, **kwargs)

    def checkpoint_gradients(self, on: bool, recompute_audio: bool = True) -> None:
        """Recompute each layer, its audio K/V included, in the backward pass instead of keeping it.

        Args:
            on: recompute whole layers.
            recompute_audio: with `on` False, still recompute projector activations in backward.
        """
        self.recomputes_audio = recompute_audio and not on
        families.set_checkpointing(self.lm, on)

    def compile(self, **options: Any) -> None:
        """torch.compile each layer with its audio K/V (`pal.backbone.regions`); `options` go to torch.compile."""
        regions.compile_layers(self.layers, **options)

    def uncompile(self) -> None:
        """Undo `compile`."""
        regions.uncompile_layers(self.layers)

    def capture(self, on: bool = True) -> None:
        """Turn CUDA graphs of training steps on or off (`pal.backbone.loss_graphs`); they need filled batches.

        For one process only: gradients bypass the hooks by which several processes average theirs.
        """
        self.loss_graphs = LossGraphs() if on else None

    def capture_prompts(self, on: bool = True) -> None:
        """Turn CUDA graphs of prefill off or on again (`pal.backbone.prompt_graphs`); they need packed prompts."""
        self.prompt_graphs = PromptGraphs() if on else None

    def captures(self, labelled: bool) -> bool:
        """True if training steps (conversations with labels), or prompts (without), run as CUDA graphs."""
        graphs = self.loss_graphs if labelled else self.prompt_graphs
        return graphs is not None and graphs.possible(self.device) and torch.is_grad_enabled() == labelled

    @property
    def packs(self) -> bool:
        """True if rows should be packed, without padding (`Integration.forward` with `padding_side="none"`).

        By default on a GPU, in a precision that its flash kernel supports. Can be set; with dropout of attention
        probabilities it is always False.
        """
        if self.dropout:  # of attention probabilities, which the kernel does not support
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
    def tiles(self) -> bool:
        """True if attention may be computed tile by tile (`pal.backbone.packed_tiles`)."""
        return supports_split_attention(self.device) and not self.dropout

    def projection(self, layer: int, projector: nn.Module, x_ME: Tensor) -> Projection:
        """Projection of packed features to audio K/V of `layer`."""
        norm: Any = self.layers[layer].input_layernorm
        # None calls the norm itself, so that its hooks run
        gain = families.plain_rms_norm(norm, self._family) if unhooked(norm) else None
        parts = graphs.modules_of([projector])
        random = any(isinstance(part, nn.Dropout) and part.training and part.p for part in parts)
        return Projection(x_ME, projector, norm, self.dtype, gain, self.recomputes_audio, random)

    def add_lora(self, options: LoRA) -> None:
        """Add LoRA adapters to the named linear layers. The projection of audio K/V uses them, too."""
        if self.lora is not None:
            raise PalError("the LLM already has LoRA adapters")
        insert_lora(self.lm, options)
        self.train(self.lm.training)  # adapters are made in training mode, where their dropout is on
        self.lora = options

    def merge_adapters(self) -> set[str]:
        """Merge all adapters into their base weights; names of the weights that changed."""
        changed = adapters.merge(self)
        self.lora = None
        self.note_ties()
        return changed

    def train_only(self, part: LLMPart) -> list[nn.Parameter]:
        """Freeze the LLM but for one part; returns that part's parameters."""
        if part == "lora" and self.lora is None:
            raise ConfigError("the LLM has no LoRA adapters to train; add them first")
        return freeze_except(self.lm, part)


def _enter(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Pre-hook of a layer: apply cross-attention blocks to its input rows, and give it its attention metadata."""
    metadata = kwargs.get("attention_metadata")
    if not isinstance(metadata, AttentionMetadata | PackedContext | DecodingStep | LaterRows):
        return None
    layer: int = block.self_attn.layer_idx  # type: ignore[union-attr, assignment]
    if not isinstance(metadata, PackedContext):
        return ((metadata.cross(layer, args[0]), *args[1:]), kwargs) if metadata.crosses(layer) else None
    cache = kwargs.get("past_key_values")
    captured = cache.capture_layer(layer) if isinstance(cache, JointCache | CapturingCache) else None
    if metadata.crosses(layer):
        args = (metadata.cross(layer, args[0], captured), *args[1:])
    return args, {
        **kwargs,
        "attention_metadata": metadata.at(layer, captured),
        **({} if captured is None else {"past_key_values": captured}),
    }
