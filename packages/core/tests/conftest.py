"""Tiny random models with tokenizers of a few words, made where the test runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

WORDS = """
good bad film plot the a is was not very cat dog sat ran green ideas sleep runs well badly
sentence: sentence1: sentence2: premise: hypothesis: question: question1: question2:
cola rte mrpc sst2 stsb mnli qnli qqp negative positive entailment not_entailment neutral contradiction
equivalent not_equivalent acceptable unacceptable duplicate not_duplicate
"""


def tokenizer(directory: Path, *, pair: bool) -> int:
    """Save a word-level tokenizer; return its number of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ratings = [f"{fifth / 5:.1f}" for fifth in range(26)]
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "<s>", *WORDS.split(), *ratings])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if pair:
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 3), ("</s>", 1)]
        )
    else:
        raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=128,
        model_input_names=["input_ids", *(["token_type_ids"] if pair else []), "attention_mask"],
    )
    wrapped.save_pretrained(directory)
    return len(vocabulary)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models are slower on several threads, far slower where other processes use the cores too."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a random T5 of 2 + 2 layers, 32 wide."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    directory = tmp_path_factory.mktemp("t5")
    config = T5Config(
        vocab_size=tokenizer(directory, pair=False),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    torch.manual_seed(0)
    T5ForConditionalGeneration(config).save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Directory of a random BERT encoder of 2 layers, 32 wide."""
    import torch
    from transformers import BertConfig, BertModel

    directory = tmp_path_factory.mktemp("bert")
    config = BertConfig(
        vocab_size=tokenizer(directory, pair=True),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        pad_token_id=0,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    BertModel(config).save_pretrained(directory)
    return str(directory)
