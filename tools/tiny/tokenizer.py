"""Build the tokenizer of `tiny`: a byte-level BPE with Gemma 4's added tokens under their real spellings."""

from pathlib import Path

from data import training_batch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 640
CORPUS_STEPS, CORPUS_BATCH = 400, 48

ADDED_TOKENS = [
    "<pad>", "<eos>", "<bos>", "<unk>", "<mask>",
    "<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>',
    "<|think|>", "<|channel>", "<channel|>", "<|turn>", "<turn|>",
    "<|image>", "<|audio>", "<|image|>", "<|audio|>", "<image|>", "<audio|>", "<|video|>",
]  # fmt: skip
SCHEMA_WORDS = ["},required:[", "parameters:{properties:{", "STRING", "INTEGER", "OBJECT", "response:", "{value:"]


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
    texts += ["system\n", "user\n", "model\n", "thought\n"] * CORPUS_STEPS
    return texts


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Train the tokenizer: 24 added tokens, 256 bytes, then merges; digits are never merged with anything."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=ADDED_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus(seed), trainer)
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
