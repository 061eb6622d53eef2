"""`PalForConditionalGeneration`: a `PalModel` behind transformers' interface of multimodal language models."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from pal import bundle, source_tokenizer
from pal.backbone import adapters
from pal.errors import BundleError, ConfigError, PalError, PromptError
from pal.files import move_into, unlisted_files
from pal.hf.config import PalConfig
from pal.hf.inputs import PromptColumns, before_answers, read_prompts
from pal.hf.loading import LoadOptions, load_adapter
from pal.model import PalModel
from pal.types import AUDIO, IGNORE

_GENERATION_CONFIG = "generation_config.json"
_NOT_OPTIONS = {"transformers_version", "_from_model_config", "_commit_hash"}


class PalForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """transformers model that generates text from audio and text; its submodule `pal` is the `PalModel`.

    Its inputs are those that `PalProcessor` makes: `input_ids` [B, T] with `pal.types.AUDIO` (-1) as the placeholder of
    a clip, `attention_mask` [B, T], `input_values` [U, N] with one zero-padded waveform for each placeholder, in their
    order, and `audio_lengths` [U], the samples of each.
    """

    config_class = PalConfig
    main_input_name = "input_ids"
    input_modalities: Any = ("audio", "text")
    output_modalities: Any = ("text",)
    supports_gradient_checkpointing = True

    def __init__(self, config: PalConfig, pal: PalModel | None = None) -> None:
        """Build the model that a bundle's configuration describes, with random weights, or wrap `pal` if given."""
        super().__init__(config)
        self.pal = _untrained(config) if pal is None else pal
        self.generation_config = GenerationConfig(**self.pal.generation_options())
        self._digests: dict[str, str] | None = None
        self.post_init()
        self._copy_ties()

    @classmethod
    def wrap(cls, model: PalModel) -> PalForConditionalGeneration:
        """Wrap a model; the wrapper shares its weights."""
        wrapped = cls(PalConfig(**bundle.describe(model)), model).train(model.training)
        wrapped._digests = bundle.source_digests(model)
        return wrapped

    def _copy_ties(self) -> None:
        """Copy the LLM's list of tied weights to this class, where PEFT looks for it."""
        lm = self.pal.llm.lm
        tied = getattr(lm, "all_tied_weights_keys", None) or {}
        self.all_tied_weights_keys = {f"pal.llm.lm.{a}": f"pal.llm.lm.{b}" for a, b in tied.items()}
        self._tied_weights_keys = self.all_tied_weights_keys
        self.config.tie_word_embeddings = lm.config.tie_word_embeddings

    def train(self, mode: bool = True) -> PalForConditionalGeneration:
        """Set training mode for the parts that are trained; see `PalModel.train`."""
        super().train(mode)
        self._copy_ties()
        return self

    def init_weights(self) -> None:
        """Do nothing: `pal` initialises its own weights."""

    # Reading and writing

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *model_args: Any,
        config: PalConfig | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        other_weights: bool = False,
        **kwargs: Any,
    ) -> PalForConditionalGeneration:
        """Load a bundle from a folder or the Hub and check its digests; the model is in evaluation mode.

        Args:
            pretrained_model_name_or_path: folder or Hub id, as in `pal.load`.
            model_args: not supported.
            config: the bundle's configuration, if it was read before.
            dtype: dtype of all weights; None or "auto": as they were saved.
            device_map: a device, "auto" for the accelerator if there is one, or a dict that names one device.
            other_weights: as in `pal.load`.
            kwargs: transformers' options of downloads from the Hub.

        Raises:
            BundleError: see `pal.bundle.load`.
            PalError: an option that is not supported.
        """
        if model_args:
            raise PalError("from_pretrained: arguments by position are not supported; give them by name")
        options = LoadOptions.of(dtype, device_map, kwargs)
        folder = bundle.find(pretrained_model_name_or_path, **options.hub)
        model = bundle.load(folder, options.dtype, other_weights)
        if config is None:
            config = PalConfig(**bundle.read_description(folder))
        config.name_or_path = str(pretrained_model_name_or_path)
        config.dtype = next(model.parameters()).dtype
        loaded = cls(config, model).eval()
        if (folder / _GENERATION_CONFIG).is_file():
            loaded.generation_config = GenerationConfig.from_pretrained(folder)
        left_out = config.left_out
        if options.dtype is not None or other_weights:
            state = model.state_dict()
            left_out = {name: bundle.digest(state[name]) for name in left_out}
        loaded._digests = left_out
        if options.device is not None:
            loaded.to(options.device)
            loaded.hf_device_map = {"": options.device}
        if options.adapter is not None:
            load_adapter(loaded, options.adapter, options.adapter_hub, loaded.device)
        return loaded

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        full: bool = False,
        dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the same bundle as `PalModel.save_pretrained`.

        Args:
            save_directory: folder of the bundle. A bundle in it is replaced; other files stay.
            is_main_process: False writes nothing.
            state_dict: ignored; the model's own weights are written.
            push_to_hub: also upload the bundle, as `repo_id` or the folder's name.
            max_shard_size: largest size of a file of weights, in bytes or such as "2GB".
            full: also write weights that were not trained and can be read from their source.
            dtype: dtype of the weights on disk.
            kwargs: `repo_id` and `private` of the upload; other options of transformers are ignored.
        """
        if not is_main_process:
            return
        adapters.drop_empty(self)
        if self.pal.llm.lora is None and adapters.has_adapters(self):
            if getattr(self, "_hf_peft_config_loaded", False) and not push_to_hub:
                # as in transformers, whose `add_adapter` or `load_adapter` put it here: the adapter is saved alone
                super().save_pretrained(save_directory)
                return
            raise BundleError("the model has PEFT adapters; call merge_adapters() first, or save them alone with PEFT")
        self.pal.trained |= self._changed()
        options = self.generation_config.to_diff_dict()
        extra = {_GENERATION_CONFIG: json.dumps(options, indent=1) + "\n"} if options != self._default_options() else {}
        target = Path(save_directory).absolute()
        if target.exists() and unlisted_files(target):
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                new = Path(scratch) / "bundle"
                bundle.save(self.pal, new, full=full, dtype=dtype, max_shard_size=max_shard_size, extra=extra)
                move_into(new, target)
        else:
            bundle.save(self.pal, target, full=full, dtype=dtype, max_shard_size=max_shard_size, extra=extra)
        if push_to_hub:
            from pal.hub import push

            push(target, str(kwargs.get("repo_id") or target.name), private=kwargs.get("private"))

    def push_to_hub(self, repo_id: str, private: bool | None = None, **kwargs: Any) -> Any:  # type: ignore[override]
        """Write a bundle and upload it; `kwargs` are those of `save_pretrained`."""
        from pal.hub import push

        with tempfile.TemporaryDirectory() as scratch:
            self.save_pretrained(Path(scratch) / "bundle", **kwargs)
            return push(Path(scratch) / "bundle", repo_id, private=private)

    def merge_adapters(self) -> None:
        """Merge LoRA adapters, the bundle's or those that PEFT loaded, into the weights that they adapt."""
        self.pal.merge_adapters()
        if getattr(self, "_hf_peft_config_loaded", False):
            self._hf_peft_config_loaded = False
            del self.peft_config

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights named as in `state_dict()`, or as in a bundle's file of weights.

        Weights that a bundle leaves out are restored from their source. Wrong names and shapes are errors even with
        `strict=False`, with which transformers' Trainer loads the file of a checkpoint.

        Raises:
            BundleError: names or shapes of another model; weights that are missing in a bundle's file.
        """
        parts = {name for name, _ in self.pal.named_children()}
        of_bundle = any(name.split(".")[0] in parts for name in state_dict)
        wrapped = next(
            (x for x in state_dict if x.startswith(("module.", "_orig_mod.", "_fsdp_wrapped_module."))), None
        )
        if wrapped is not None:
            prefix = wrapped.split(".")[0]
            raise BundleError(
                f"weights of a wrapped model: their names begin with '{prefix}.'; remove that prefix, or save "
                "the model that accelerate's unwrap_model gives"
            )
        if strict and not of_bundle:
            return super().load_state_dict(state_dict, strict, assign)
        given = {f"pal.{name}" if name.split(".")[0] in parts else name: x for name, x in state_dict.items()}
        own = self.state_dict()
        for name, tensor in given.items():
            if name not in own:
                raise BundleError(
                    f"weights of another model: this one has no '{name}'; load a checkpoint of this model"
                )
            if own[name].shape != tensor.shape:
                raise BundleError(
                    f"weights of another model: '{name}' has shape {tuple(tensor.shape)}, not {tuple(own[name].shape)}"
                )
        restored = {f"pal.{name}": x for name, x in self._left_out(own, given).items()} if of_bundle else {}
        found = super().load_state_dict({**given, **restored}, strict=False, assign=assign)
        if of_bundle and found.missing_keys:
            raise BundleError(f"'{found.missing_keys[0]}' is missing in the weights; load a checkpoint of this model")
        return found

    def _left_out(self, own: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Tensor]:
        """Weights that a bundle's file leaves out, with the values of their source."""
        absent = {name.removeprefix("pal.") for name in own if name not in given} & set(self._digests or ())
        changed = {name for name in absent if bundle.digest(own[f"pal.{name}"]) != (self._digests or {})[name]}
        again = bundle.source_weights(self.pal, changed) if changed else {}
        for name, tensor in again.items():
            if bundle.digest(tensor) != (self._digests or {})[name]:
                raise BundleError(
                    f"'{name}' has changed in its source since the bundle; load the checkpoint by its folder"
                )
        return {name: again.get(name, own[f"pal.{name}"]) for name in absent}

    def _changed(self) -> set[str]:
        """Names in `pal` of the weights that differ from those of their source."""
        if self._digests is None:
            return set(self.pal.state_dict())
        state = self.pal.state_dict()
        # weights that are gone were merged into others, which `PalModel.merge_adapters` records
        present = {name: digest for name, digest in self._digests.items() if name in state}
        return {name for name, digest in present.items() if bundle.digest(state[name]) != digest}

    def _default_options(self) -> dict[str, Any]:
        return GenerationConfig(**self.pal.generation_options()).to_diff_dict()

    # Running

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        audio_lengths: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Logits [B, T, vocab] for the columns of `input_ids`, and the loss if there are labels.

        The logits of column t predict id t + 1. Those of a clip's column come from a row that sees the whole clip,
        however many rows the clip takes in the LLM. With labels, this holds only for clips whose next id is labelled,
        and for a clip at the end. Logits are 0 for padding, and for a clip that starts a conversation and has no rows.

        Args:
            input_ids: [B, T], with -1 for a clip.
            attention_mask: [B, T], 0 for padding, which may be on either side.
            input_values: [U, N], waveforms.
            audio_lengths: [U], samples of each waveform.
            labels: [B, T]; no loss on -100, clips and padding.
            logits_to_keep: number of columns at the end, or indices of columns, to compute logits for; 0: all.
            return_dict: False returns a tuple.
            kwargs: `num_items_in_batch` divides the summed loss, in place of the number of labels.

        Raises:
            PromptError: numbers of clips and placeholders differ.
        """
        for name in ("inputs_embeds", "past_key_values", "position_ids"):
            if kwargs.get(name) is not None:
                raise PalError(f"forward takes no '{name}'; give input_ids, or use generate")
        self.pal.llm.check_attention()
        prompts = self._prompts(input_ids, attention_mask, input_values, audio_lengths)
        kept = slice(None) if isinstance(logits_to_keep, int) and not logits_to_keep else logits_to_keep
        kept = slice(-kept, None) if isinstance(kept, int) else kept
        inputs = self.pal.inputs(
            prompts.clips, prompts.with_columns(_used_columns(prompts, labels, kept)), padding_side="right"
        )
        rows_BT, has_row_BT = (tensor.to(self.device) for tensor in prompts.predicting_rows(inputs))
        logits = self.pal.llm.logits_at(inputs, rows_BT[:, kept])
        logits = logits.masked_fill(~has_row_BT[:, kept, None], 0.0)
        loss = None
        if labels is not None:
            if logits.shape[1] != rows_BT.shape[1]:
                raise PalError("labels need all logits; leave logits_to_keep out")
            trained_BT = prompts.real_BT.to(self.device) & (prompts.ids_BT.to(self.device) != AUDIO)
            trained_BT[:, 1:] &= has_row_BT[:, :-1]
            labels = labels.to(self.device).masked_fill(~trained_BT, IGNORE)
            if int(labels.max()) >= logits.shape[-1]:
                raise PromptError(f"label {int(labels.max())} is outside of the LLM's vocabulary of {logits.shape[-1]}")
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=logits.shape[-1],
                num_items_in_batch=kwargs.get("num_items_in_batch"),
            )
        if return_dict is False:
            return (logits,) if loss is None else (loss, logits)
        return CausalLMOutputWithPast(loss=loss, logits=logits)

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        input_values: Tensor | None = None,
        audio_lengths: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Prompts with the generated ids behind them: [B x returned sequences, T + new], as in transformers.

        `generation_config` and `kwargs` are those of transformers' `generate`. By default, decoding is greedy and ends
        after 64 new ids. In `max_length` and `min_length`, a clip counts as one id.

        With `labels` [B, T], as `Seq2SeqTrainer` passes them, generation starts where the last labelled answer of each
        prompt begins; the ids from there on become padding.

        Raises:
            PromptError: numbers of clips and placeholders differ.
            PalError: an option that is not supported.
        """
        self.pal.llm.check_attention()
        labels = kwargs.pop("labels", None)
        given_BT = inputs if input_ids is None else input_ids
        if labels is not None and given_BT is not None:
            attention_mask = before_answers(given_BT, attention_mask, labels)
        prompts = self._prompts(given_BT, attention_mask, input_values, audio_lengths)
        options = self._options(generation_config, kwargs, prompts.ids_BT.shape[1])
        llm_inputs = self.pal.inputs(prompts.clips, prompts.conversations, self.pal.llm.prompt_side(**options))
        output = self.pal.llm.generate(llm_inputs, **options)
        new = output if isinstance(output, Tensor) else output.sequences
        given = prompts.ids_BT.to(new.device)
        if labels is not None:
            given = given.masked_fill(~prompts.real_BT.to(new.device), options["pad_token_id"])
        sequences = torch.cat((given.repeat_interleave(len(new) // len(given), dim=0), new), dim=1)
        if isinstance(output, Tensor):
            return sequences
        output.sequences = sequences
        return output

    def _prompts(
        self, ids: Tensor | None, mask: Tensor | None, values: Tensor | None, lengths: Tensor | None
    ) -> PromptColumns:
        if ids is None:
            raise PalError("give input_ids; PalProcessor makes them")
        return read_prompts(ids, mask, values, lengths, self.generation_config.pad_token_id)

    def _options(self, given: GenerationConfig | None, kwargs: dict[str, Any], width: int) -> dict[str, Any]:
        """Options for `Backbone.generate`, for prompts of `width` ids."""
        explicit = {**(given.to_diff_dict() if given is not None else {}), **kwargs}
        options = {**self.pal.generation_options(), **self.generation_config.to_diff_dict(), **explicit}
        # limits become numbers of new ids, since clips take another number of rows in the LLM's sequence
        for limit, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
            wanted = options.pop(limit, None)
            if wanted is None or explicit.get(new) is not None or (limit == "max_length" and limit not in explicit):
                continue
            if limit == "max_length" and wanted <= width:
                raise PalError(f"max_length {wanted} leaves no room after {width} ids; give max_new_tokens")
            options[new] = max(0, wanted - width)
        return {name: value for name, value in options.items() if name not in _NOT_OPTIONS}

    # Other methods of transformers' models

    def get_input_embeddings(self) -> nn.Module:
        """Embedding table of the LLM."""
        module: nn.Module = self.pal.llm.lm.get_input_embeddings()
        return module

    def get_output_embeddings(self) -> nn.Module:
        """LM head of the LLM."""
        module: nn.Module = self.pal.llm.lm.get_output_embeddings()
        return module

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the LLM ties its head and embeddings itself."""

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Resize the LLM's embeddings and head, for tokens that were added to the tokenizer.

        Args:
            new_num_tokens: number of rows; None: as it is.
            pad_to_multiple_of: round the number of rows up to a multiple.
            mean_resizing: sample new rows around the mean of the others.
        """
        self.pal.llm.resize_vocab(new_num_tokens, pad_to_multiple_of=pad_to_multiple_of, mean_resizing=mean_resizing)
        self.config.llm = self.pal.llm.lm.config.to_dict()
        table: nn.Embedding = self.pal.llm.lm.get_input_embeddings()
        return table

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Recompute each layer of the LLM in the backward pass."""
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise PalError("use_reentrant=True cannot be used with audio; leave it out")
        self.pal.llm.checkpoint_gradients(True)

    def gradient_checkpointing_disable(self) -> None:
        """Keep the layers' activations for the backward pass."""
        self.pal.llm.checkpoint_gradients(False)


def _used_columns(prompts: PromptColumns, labels: Tensor | None, kept: slice | Tensor) -> Tensor:
    """True for the columns whose predictions are used, by the loss or the caller: [B, T]."""
    predicts_after_BT = torch.zeros_like(prompts.real_BT)
    if labels is None:
        predicts_after_BT[:, kept if isinstance(kept, slice) else kept.cpu()] = True
    else:
        predicts_after_BT[:, :-1] = labels.cpu()[:, 1:] != IGNORE
    return predicts_after_BT


def _untrained(config: PalConfig) -> PalModel:
    if not config.model:
        raise ConfigError("a PalConfig without a model; read it from a bundle with PalConfig.from_pretrained")
    if not config.name_or_path:
        raise ConfigError("the configuration names no bundle to read the tokenizer from; use from_pretrained")
    return bundle.untrained(config.description(), source_tokenizer.load(config.tokenizer, config.name_or_path))
