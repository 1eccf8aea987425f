"""Two small tokenizers built on the spot, so that tests do not depend on the bundled checkpoint.

Both know Gemma 4's control tokens, under different ids. `byte_level` is BPE over bytes, as in `tiny`; `byte_fallback`
is BPE over characters with byte tokens for the rest, spaces written "▁", as in Gemma.
"""

from functools import cache

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from mlx_diffusiongemma.tokenizer import SPELLINGS, Tokenizer

KINDS = ("byte_level", "byte_fallback")
CORPUS = ["thought model user hello world a stop call get_weather city Paris"] * 3
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?{}[]()_-<>|\"'\n▁é"


@cache
def backend(kind: str) -> str:
    """Return the tokenizer.json text of a kind."""
    special = [AddedToken(spelling, special=True, normalized=False) for spelling in SPELLINGS.values()]
    if kind == "byte_level":
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator(
            CORPUS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
        )
        made.add_tokens(special)  # after the rest
        return made.to_str()
    words = [token.content for token in special] + [f"<0x{byte:02X}>" for byte in range(256)] + sorted(set(LETTERS))
    vocabulary = {word: index for index, word in enumerate(words)}
    pairs = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("▁", "w"), ("t", "h")]
    vocabulary |= {"".join(pair): len(vocabulary) + index for index, pair in enumerate(pairs)}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_tokens(special)  # marks them
    return made.to_str()


@cache
def small_tokenizer(kind: str = "byte_level", chat_template: str | None = None) -> Tokenizer:
    """Build a tokenizer of a kind, with a chat template if one is given."""
    return Tokenizer(tokenizers.Tokenizer.from_str(backend(kind)), chat_template=chat_template)
