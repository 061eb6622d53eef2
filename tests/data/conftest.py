"""Tiny tokenizers with the manners of real ones, made in memory."""

from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = ["what sound is this", "which digit do you hear", "a dog barks", "seven", "user assistant system"] * 3

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

MakeTokenizer = Callable[..., PreTrainedTokenizerFast]


def byte_level(specials: list[str], template: str | None, **names: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (as GPT-2's, Llama 3's and Qwen's are) with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    if "bos_token" in names:
        bos = names["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.chat_template = template
    return wrapped


@pytest.fixture(scope="session")
def make_tokenizer() -> MakeTokenizer:
    return byte_level


@pytest.fixture(scope="session")
def chatml() -> PreTrainedTokenizerFast:
    """Qwen-like: no start token, `<|im_end|>` and a line break end a turn."""
    return byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], CHATML, eos_token="<|im_end|>")


@pytest.fixture(scope="session")
def llama() -> PreTrainedTokenizerFast:
    """Llama-3-like: the template writes the start token, and ends a turn by another token than eos."""
    specials = ["<|begin|>", "<|end_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    return byte_level(specials, LLAMA, bos_token="<|begin|>", eos_token="<|end_of_text|>")


@pytest.fixture(scope="session")
def plain() -> PreTrainedTokenizerFast:
    """No chat template, so LTU's is used; adds a start token itself."""
    return byte_level(["<s>", "</s>"], None, bos_token="<s>", eos_token="</s>")
