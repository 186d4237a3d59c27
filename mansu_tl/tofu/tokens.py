"""The small TOFU models' tokenizer: byte-level BPE, trained on the text itself."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from mansu_tl.data.answers import joined

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
CONTEXT = 256
VOCABULARY = 4096


def train_tokenizer(texts: Sequence[str], size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `size` tokens; it puts BOS in front and can write any text."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    first = core.token_to_id(BOS)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, first)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=CONTEXT,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )


def answer_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str, end: bool = True
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt (BOS in front where the tokenizer has one) and of the answer that follows it.

    Args:
        end: close the answer with the end-of-sequence token, as in training.
    """
    before = tokenizer.encode(prompt, add_special_tokens=False)
    joint = tokenizer.encode(joined(tokenizer, prompt, f" {answer}"), add_special_tokens=False)
    # A tokenizer that merges across the seam leaves the longest common start as the prompt.
    shared = next((i for i, (a, b) in enumerate(zip(before, joint, strict=False)) if a != b), len(before))
    head = [] if tokenizer.bos_token_id is None else [int(tokenizer.bos_token_id)]
    tail = [int(tokenizer.eos_token_id)] if end and tokenizer.eos_token_id is not None else []
    return [*head, *joint[:shared]], [*joint[shared:], *tail]


def text_of(tokenizer: PreTrainedTokenizerBase, row: Sequence[int]) -> str:
    """The text of token ids, special tokens left out."""
    return str(tokenizer.decode(list(row), skip_special_tokens=True))
