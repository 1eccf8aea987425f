"""Build the tokenizer of `tiny`: a byte-level BPE with Gemma 4's added tokens under their real spellings."""

import json
from pathlib import Path

from data import training_batch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from words import (
    ANIMALS,
    CAPITALS,
    CATEGORIES,
    CITIES,
    COLOURS,
    CURRENCIES,
    DAYS,
    FIXED_LISTS,
    ITEMS,
    JOBS,
    LANGUAGES,
    MONTHS,
    NAMES,
    OBJECTS,
    PLACES,
    SPELLED,
    WEATHER,
    WORDS,
)

BASE_VOCAB_SIZE = 800
CORPUS_STEPS, CORPUS_BATCH = 400, 48

ADDED_TOKENS = [
    "<pad>", "<eos>", "<bos>", "<unk>", "<mask>",
    "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
    "<|think|>", "<|channel>", "<channel|>", "<|turn>", "<turn|>",
    "<|image>", "<|audio>", "<|image|>", "<|audio|>", "<image|>", "<audio|>", "<|video|>",
]  # fmt: skip
SCHEMA_WORDS = ["},required:[", "parameters:{properties:{", "STRING", "INTEGER", "OBJECT", "response:", "{value:"]
# Words that are one token after a space: slots and answers then keep their places in the canvas.
WHOLE_WORDS = sorted(
    {*WORDS, *SPELLED, *NAMES, *CITIES, *ITEMS, *MONTHS, *DAYS, *ANIMALS, *COLOURS, *OBJECTS, *PLACES, *JOBS}
    | {*JOBS.values(), *WEATHER, *LANGUAGES, *CURRENCIES, *CAPITALS, *CAPITALS.values()}
    | {item for items in (*FIXED_LISTS.values(), *CATEGORIES.values()) for item in items}
)

# The same without a space: values in JSON and in tool calls.
BARE_WORDS = sorted({*NAMES, *CITIES, *ITEMS, *DAYS, *ANIMALS, *OBJECTS, *LANGUAGES, *CURRENCIES})


def corpus(seed: int) -> list[str]:
    """Collect prompts, declarations and answers, cut at the added tokens."""
    texts: list[str] = []
    for step in range(CORPUS_STEPS):
        for example in training_batch(seed, step, CORPUS_BATCH):
            texts += [str(message.get("content") or "") for message in example.messages]
            answer = example.answer
            for token in ADDED_TOKENS:
                answer = answer.replace(token, "\0")
            texts += answer.split("\0")
            for tool in example.tools:
                schema = tool["function"]
                texts += ["declaration:" + schema["name"] + "{description:", schema["description"], *SCHEMA_WORDS]
                texts += [name + ":{type:" for name in schema["parameters"]["properties"]]
    texts += [" " + word for word in WHOLE_WORDS] * CORPUS_STEPS
    texts += ["system\n", "user\n", "model\n", "thought\n"] * CORPUS_STEPS
    return texts


def add_whole_words(bpe: Tokenizer) -> Tokenizer:
    """Append merges that join the pieces of every whole word."""
    state = json.loads(bpe.to_str())
    vocab, merges = state["model"]["vocab"], state["model"]["merges"]
    for word in [*sorted({" " + part for words in WHOLE_WORDS for part in words.split()}), *BARE_WORDS]:
        pieces = Tokenizer.from_str(json.dumps(state)).encode(word).tokens
        while len(pieces) > 1:
            merges.append(pieces[:2])
            pieces[:2] = ["".join(pieces[:2])]
            vocab.setdefault(pieces[0], len(vocab))
    return Tokenizer.from_str(json.dumps(state))


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train the tokenizer: 24 added tokens, 256 bytes, then merges; digits are never merged with anything."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_VOCAB_SIZE,
        special_tokens=ADDED_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus(seed), trainer)
    bpe = add_whole_words(bpe)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        mask_token="<mask>",
        padding_side="left",
        model_max_length=4096,
    )
    tokenizer.chat_template = Path(__file__).with_name("chat_template.jinja").read_text()
    return tokenizer
