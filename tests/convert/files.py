"""Tiny files of other libraries, written by those libraries' own writers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, WhisperConfig
from transformers import WhisperForConditionalGeneration as Whisper

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)
VOCABULARY = 60


def whisper(**fields: Any) -> Whisper:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "num_mel_bins": 8,
        "max_source_positions": 20,
        "max_target_positions": 10,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id"), 0),
    }
    model = Whisper(WhisperConfig(**sizes | fields)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "embed_positions" not in name:
                weight.add_(0.1 * torch.randn(weight.shape))
    return model


def save_ct2(model: Whisper, folder: Path, quantization: str | None = "float16") -> Path:
    """A folder of CTranslate2, by its own converter."""
    from ctranslate2.converters.transformers import WhisperLoader

    words = [f"<{i}>" for i in range(VOCABULARY)]
    specification = WhisperLoader().get_model_spec(model)
    specification.register_vocabulary(words)
    specification.validate()
    specification.optimize(quantization=quantization)
    folder.mkdir()
    specification.save(str(folder))
    return folder / "model.bin"


def llama(rows: int, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 7777.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def save_gguf(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, path: Path, kind: str) -> dict[str, Any]:
    """Write an LLM as GGUF, with its matrices in the given type; the values that the file stands for, by name."""
    import gguf

    config, described = model.config, json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    special = {*tokenizer.all_special_tokens}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.CONTROL if word in special else gguf.TokenType.NORMAL for word in words])
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in described["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id or 0)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.eos_token_id)
    writer.add_chat_template(TEMPLATE)
    meant = {}
    for name, theirs in _names(config).items():
        tensor = model.state_dict()[name].numpy()
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs.split(".")[-2])
        stored = tensor if heads is None else _interleaved(tensor, heads)
        quantised = gguf.GGMLQuantizationType[kind if tensor.ndim == 2 else "F32"]
        raw = gguf.quantize(np.ascontiguousarray(stored), quantised)
        writer.add_tensor(theirs, raw, raw_dtype=quantised)
        values = gguf.dequantize(raw, quantised)
        meant[name] = torch.from_numpy(values if heads is None else _halves(values, heads)).clone()
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meant


def _names(config: LlamaConfig) -> dict[str, str]:
    """transformers' name of each weight -> GGUF's."""
    inside = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    found = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    if not config.tie_word_embeddings:
        found["lm_head.weight"] = "output.weight"
    for layer in range(config.num_hidden_layers):
        found |= {f"model.layers.{layer}.{a}.weight": f"blk.{layer}.{b}.weight" for a, b in inside.items()}
    return found


def _interleaved(weight_CD: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp rotates them: neighbours, where transformers rotates one half against the other."""
    return weight_CD.reshape(heads, 2, -1, weight_CD.shape[1]).swapaxes(1, 2).reshape(weight_CD.shape)


def _halves(weight_CD: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of `_interleaved`."""
    return weight_CD.reshape(heads, -1, 2, weight_CD.shape[1]).swapaxes(1, 2).reshape(weight_CD.shape)
