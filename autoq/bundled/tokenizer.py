"""The tokenizer of the bundled model: byte-level pair encoding trained on the language."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from autoq.bundled.language import documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCABULARY_SIZE = 768
MAXIMUM_LENGTH = 1024

# Digits stay single tokens, so that numbers are aligned; words keep their leading space.
_PIECES = r"[0-9]| ?[a-z]+| ?[^ a-z0-9\n]| |\n"
_TRAINING_DOCUMENTS = 8000


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train the tokenizer on documents of the training split."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = itertools.islice(documents(seed, "train"), _TRAINING_DOCUMENTS)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    make: Any = PreTrainedTokenizerFast
    result: PreTrainedTokenizerFast = make(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=MAXIMUM_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    return result
