"""Small tokenizers of every kind, trained in a moment on English, Chinese, code and emoji."""

from __future__ import annotations

import base64
import io
import json

from tests.data.conftest import make_texts

ENGLISH = "It's a quick brown fox; the dog wasn't lazy.  Numbers like 1,024 and 3.5%.\n\n"
CHINESE = "你好，世界。今天的天气很好，我们去公园散步吧！模型在训练中学习语言。\n"
CODE = "def f(x, *, y=2):\n\treturn [x ** y for _ in range(10)]  # ok\n    \n"
EMOJI = "😀👍🏽 👨\u200d👩\u200d👧 naïve café Größe ½ ™\n"
TEXTS = [
    *(one * count for one in (ENGLISH, CHINESE, CODE, EMOJI) for count in (1, 3, 9)),
    *(ENGLISH + CHINESE + CODE + EMOJI for _ in range(6)),
    *make_texts(20),
]
HOSTILE = [
    "a",
    "你",
    "😀",
    "\n",
    "a  b",
    "\t\tx",
    "\0",
    "e\u0301",
    "\U0010ffff",
    "x" * 3000,
    "</s><0x41>",
]
SPECIAL = ["<unk>", "<s>", "</s>"]


def trained(model, trainer, pre=None, normalizer=None):
    from tokenizers import Tokenizer

    made = Tokenizer(model)
    if pre is not None:
        made.pre_tokenizer = pre
    if normalizer is not None:
        made.normalizer = normalizer
    made.train_from_iterator(TEXTS, trainer)
    return made


def bpe(pre=None, normalizer=None, **options):
    from tokenizers import models, trainers

    given = {"vocab_size": 700, "special_tokens": SPECIAL, "show_progress": False}
    return trained(models.BPE(), trainers.BpeTrainer(**{**given, **options}), pre, normalizer)


def byte_level(pre=None, **options):
    from tokenizers import pre_tokenizers

    pre = pre or pre_tokenizers.ByteLevel(add_prefix_space=False)
    return bpe(pre, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **options)


def with_bytes(made):
    """The BPE with the 256 byte tokens of Llama behind its vocabulary."""
    settings = json.loads(made.to_str())
    vocabulary = settings["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    settings["model"].update(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    return json.dumps(settings)


def gpt2_like():
    return byte_level().to_str()


def roberta_like():
    from tokenizers import pre_tokenizers

    return byte_level(pre_tokenizers.ByteLevel(add_prefix_space=True)).to_str()


def llama3_like():
    from tokenizers import Regex, pre_tokenizers

    cut = pre_tokenizers.Split(Regex(r"\s?\p{L}+|\p{N}{1,3}|\s?[^\s\p{L}\p{N}]+|\s+"), "isolated")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return byte_level(pre_tokenizers.Sequence([cut, whole])).to_str()


def with_added_tokens():
    """Literal tokens whose characters also stand for bytes."""
    made = byte_level()
    made.add_tokens(["é", "你好", "range"])
    return made.to_str()


def llama2_like():
    from tokenizers import normalizers

    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    return with_bytes(bpe(normalizer=normalizers.Sequence(steps), limit_alphabet=90))


def gemma_like():
    from tokenizers import normalizers, pre_tokenizers

    cut = pre_tokenizers.Split(" ", "merged_with_previous")
    return with_bytes(bpe(cut, normalizers.Replace(" ", "▁"), limit_alphabet=90))


def metaspace():
    from tokenizers import pre_tokenizers

    return with_bytes(bpe(pre_tokenizers.Metaspace(), limit_alphabet=90))


def unigram_with_bytes():
    from tokenizers import Tokenizer, models, pre_tokenizers

    content = sentencepiece_model(model_type="unigram", byte_fallback=True)
    processor = build(content)
    pieces = [(processor.id_to_piece(i), processor.get_score(i)) for i in range(len(processor))]
    made = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.add_special_tokens(SPECIAL)
    return made.to_str()


def word_piece():
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    names = [*SPECIAL, "[UNK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=names, show_progress=False)
    model = models.WordPiece(unk_token="[UNK]")
    return trained(
        model, trainer, pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()
    ).to_str()


def word_level():
    """No unknown token: its library raises on an unknown word."""
    from tokenizers import models, pre_tokenizers, trainers

    trainer = trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    return trained(models.WordLevel(), trainer, pre_tokenizers.WhitespaceSplit()).to_str()


def suffixed():
    from tokenizers import pre_tokenizers

    return bpe(pre_tokenizers.WhitespaceSplit(), end_of_word_suffix="</w>").to_str()


def unigram_nfkc():
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    return trained(
        models.Unigram(), trainer, pre_tokenizers.Metaspace(), normalizers.NFKC()
    ).to_str()


def sentencepiece_model(**options) -> bytes:
    import sentencepiece

    content = io.BytesIO()
    given = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    given |= {"hard_vocab_limit": options.get("model_type") == "bpe"}
    given |= {"vocab_size": 600, "character_coverage": 0.98, "minloglevel": 2, "num_threads": 1}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*(TEXTS * 3)]), model_writer=content, **{**given, **options}
    )
    return content.getvalue()


def build(content: bytes):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=content)


def sp_llama():
    return sentencepiece_model(model_type="bpe", byte_fallback=True)


def sp_unigram():
    return sentencepiece_model(model_type="unigram", byte_fallback=True, add_dummy_prefix=False)


def sp_nfkc():
    return sentencepiece_model(
        model_type="unigram", normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True
    )


def tiktoken_ranks() -> str:
    tokens = [bytes([byte]) for byte in range(256)] + [b" the", "你".encode(), b"  ", b"\xe5\xa5"]
    return "".join(f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(tokens))


EXACT = {
    "gpt2": ("HuggingFaceTokenizer", gpt2_like),
    "llama3": ("HuggingFaceTokenizer", llama3_like),
    "roberta": ("HuggingFaceTokenizer", roberta_like),
    "added tokens": ("HuggingFaceTokenizer", with_added_tokens),
    "llama2": ("HuggingFaceTokenizer", llama2_like),
    "gemma": ("HuggingFaceTokenizer", gemma_like),
    "metaspace": ("HuggingFaceTokenizer", metaspace),
    "unigram with bytes": ("HuggingFaceTokenizer", unigram_with_bytes),
    "sentencepiece": ("SentencePieceTokenizer", sp_llama),
    "sentencepiece with bos": ("Llama2Tokenizer", sp_llama),
    "sentencepiece unigram": ("GPTSentencePieceTokenizer", sp_unigram),
    "tiktoken": ("TikTokenizer", tiktoken_ranks),
}
SPACE_WHERE_NONE = ("roberta", "metaspace", "unigram with bytes")
"""These put a space before texts that begin with none; ids do not tell " a" from "a"."""
BY_REPORT = {
    "wordpiece": ("HuggingFaceTokenizer", word_piece),
    "suffixes": ("HuggingFaceTokenizer", suffixed),
    "unigram nfkc": ("HuggingFaceTokenizer", unigram_nfkc),
    "sentencepiece nfkc": ("GPTSentencePieceTokenizer", sp_nfkc),
}
KINDS = {**EXACT, **BY_REPORT}
