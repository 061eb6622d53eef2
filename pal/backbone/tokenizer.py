"""Training of a byte-level BPE tokenizer, for models trained from scratch."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD, EOS, USER, ASSISTANT, SYSTEM = "<pad>", "<eos>", "<user>", "<assistant>", "<system>"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '<assistant> ' + message['content'] + '<eos>' }}"
    "{% else %}{{ '<' + message['role'] + '>' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
"""`<user>question<assistant> answer<eos>` for each turn. The space gives a word the same token as within a text."""


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, chat_template: str = CHAT_TEMPLATE
) -> PreTrainedTokenizerFast:
    """Train a tokenizer on texts; deterministic.

    Args:
        texts: training texts. Every byte is in the vocabulary, so any text can be encoded.
        vocab_size: maximum number of tokens, at least 261 (256 bytes and 5 special tokens).
        chat_template: Jinja template, as transformers uses it.
    """
    special = [PAD, EOS, SYSTEM, USER, ASSISTANT]
    if vocab_size < 256 + len(special):
        raise ValueError(f"vocab_size {vocab_size} is too small; give at least {256 + len(special)}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = chat_template
    return fast
