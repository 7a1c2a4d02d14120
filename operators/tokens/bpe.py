"""A byte-level BPE tokenizer trained on a corpus.

Byte-pair encoding: Sennrich et al. 2016, arXiv:1508.07909; over bytes: Radford et al. 2019 (GPT-2), section 2.2.

The pre-tokenizer is the GPT-4 pattern with two changes for Chinese and Japanese. A run of Han, Hiragana or Katakana is
a unit of its own, so that `使用Python语言` never makes a token across scripts; and full-width punctuation does not
attach to the next word, so that no token is spent on `，我` beside `我`. Every byte is a token: any text encodes and
decodes to itself. Training counts words and breaks ties by the pair's ids, so the result depends on neither the order of
the documents nor threads.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from cluster import storage
from cluster.placement import placement
from operators import shards
from operators.ledger import Equation
from operators.stage import StageContext
from operators.tokens.encode import Encoder, single_threaded
from operators.tokens.sample import draw, limit_for

END_OF_TEXT, PAD, IM_START, IM_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, PAD, IM_START, IM_END)
"""Ids 0 to 3, in this order."""

LEAST_VOCABULARY = len(SPECIAL_TOKENS) + 256

_KANA_HAN = r"\p{Han}\p{Hiragana}\p{Katakana}"
PATTERN = "|".join(
    [
        r"'(?i:[sdmt]|ll|ve|re)",
        rf"[{_KANA_HAN}]+",
        rf"[^\r\n\p{{L}}\p{{N}}\u3000-\u303f\uff00-\uffef]?[[\p{{L}}\p{{M}}]&&[^{_KANA_HAN}]]+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{%- generation %}{{- (message['content'] or '') + '<|im_end|>' }}{%- endgeneration %}"
    "{%- else %}{{- (message['content'] or '') + '<|im_end|>' }}{%- endif %}"
    "{{- '\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
"""ChatML; the assistant's content and its `<|im_end|>` are marked, so that a loss on assistant tokens can be masked."""

_MEASURED_BYTES = 8 << 20  # of the sample, for tokens per character


def untrained() -> Tokenizer:
    """Byte-level BPE with the project's pre-tokenizer and no merges."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train(texts: Iterator[Sequence[str]], vocab_size: int, *, min_frequency: int = 2, max_token_bytes: int = 24) -> Tokenizer:
    """Train on batches of texts, held one at a time; memory grows with the number of distinct words.

    The vocabulary is smaller than `vocab_size` when the texts offer no more pairs of at least `min_frequency`.
    Raises ValueError when `vocab_size` is below the 256 bytes and 4 special tokens.
    """
    if vocab_size < LEAST_VOCABULARY:
        raise ValueError(f"vocab_size must be at least {LEAST_VOCABULARY} (256 bytes and 4 special tokens), got {vocab_size}")
    tokenizer = untrained()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=max_token_bytes,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def settings() -> dict[str, Any]:
    """The content of `tokenizer_config.json`, for `transformers.AutoTokenizer.from_pretrained`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": PAD,
        "additional_special_tokens": [IM_START, IM_END],
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 30,
        "chat_template": CHAT_TEMPLATE,
    }


def train_stage(
    context: StageContext,
    directories: Sequence[str],
    *,
    vocab_size: int,
    sample_bytes: int,
    document_characters: int,
    min_frequency: int,
    max_token_bytes: int,
) -> None:
    """Sample the kept rows of finished stages, train, and finish the stage with `tokenizer.json` and its settings.

    Raises ValueError when the inputs hold no text.
    """
    sample = draw(context, shards.parts(directories), sample_bytes, document_characters)
    if sample.bytes == 0:
        raise ValueError(f"stage {context.stage}: its inputs {sorted(context.inputs)} hold no text to train a tokenizer on")
    context.check_cancelled()
    context.log(f"training {vocab_size} tokens on {sample.documents} documents, {sample.bytes} bytes")
    measured = min(sample.limit, limit_for(sample.histogram, _MEASURED_BYTES))
    reference = _train.options(resources=placement("cpu")).remote(
        sample.paths, context.directory, vocab_size, min_frequency, max_token_bytes, measured
    )
    while not ray.wait([reference], timeout=0.5)[0]:
        try:
            context.check_cancelled()
        except BaseException:
            ray.cancel(reference, force=True)
            raise
    trained = ray.get(reference)
    if trained["vocab_size"] < vocab_size:
        context.log(f"the sample offers {trained['vocab_size']} tokens, fewer than the {vocab_size} asked for")
    context.finish(
        stats={
            **trained,
            "documents": sample.documents,
            "bytes": sample.bytes,
            "corpus_documents": sample.corpus_documents,
            "corpus_bytes": sample.corpus_bytes,
        },
        equations=[
            Equation(
                "documents in = documents sampled + documents left out",
                {"documents": sum(part.kept_rows for part in shards.parts(directories))},
                {"sampled": sample.documents, "left_out": sample.corpus_documents - sample.documents},
            ),
        ],
        files={"tokenizer": "tokenizer.json", "tokenizer_config": "tokenizer_config.json"},
    )


@ray.remote(num_cpus=1)
def _train(
    paths: list[str], directory: str, vocab_size: int, min_frequency: int, max_token_bytes: int, measured: int
) -> dict[str, Any]:
    single_threaded()
    tokenizer = train(_texts(paths), vocab_size, min_frequency=min_frequency, max_token_bytes=max_token_bytes)
    model = tokenizer.to_str(pretty=True).encode()
    storage.write_bytes(storage.join(directory, "tokenizer.json"), model)
    config = json.dumps(settings(), indent=1, ensure_ascii=False, sort_keys=True).encode()
    storage.write_bytes(storage.join(directory, "tokenizer_config.json"), config)
    encoder = Encoder(model)
    return {"vocab_size": encoder.vocab_size, "tokens_per_character": tokens_per_character(encoder, paths, measured)}


def _texts(paths: Sequence[str]) -> Iterator[list[str]]:
    for path in paths:
        with storage.open_input(path) as stream:
            for batch in pq.ParquetFile(stream).iter_batches(batch_size=256, columns=["text"]):
                yield batch["text"].to_pylist()


def tokens_per_character(encoder: Encoder, paths: Sequence[str], limit: int) -> dict[str, float]:
    """Tokens per Unicode character in each language ("" where it is unknown), over the sampled documents of bins below `limit`."""
    tokens: dict[str, int] = {}
    characters: dict[str, int] = {}
    for path in paths:
        with storage.open_input(path) as stream:
            for batch in pq.ParquetFile(stream).iter_batches(batch_size=1024):
                batch = batch.filter(pc.less(batch["bin"], limit))
                for lang in pc.unique(batch["lang"]).to_pylist():
                    texts = batch["text"].filter(pc.equal(batch["lang"], lang))
                    tokens[lang] = tokens.get(lang, 0) + len(encoder.encode(texts)[0])
                    characters[lang] = characters.get(lang, 0) + (pc.sum(pc.utf8_length(texts)).as_py() or 0)
    return {lang: round(tokens[lang] / characters[lang], 4) for lang in sorted(tokens) if characters[lang]}
