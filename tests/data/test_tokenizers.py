import base64
import hashlib
import json
import random

import pytest

from data import foreign_tokenizers, sentencepiece_model
from data.tokenizer import build_tokenizer
from megatron_ext.errors import ConfigError, DataError

HOSTILE = [
    "",
    " ",
    "  ",
    "\n",
    "\r\n",
    "\t\t x\t",
    "   a    b  \n\n\n  c ",
    "a\u2581b\u2581\u2581",
    "\u2581",
    "\u2585",
    "\0x\0",
    "\ufeffbom",
    "\u2028\u2029\x85",
    "e\u0301 ﬁ ① Å",
    "👨‍👩‍👧 𝔘𝔫𝔦",
    "</s><s><unk><0x41><eod>",
    "日本語 العربية עברית",
    "\x7f\x1b[0m",
    "\U0010ffff\uffff",
    "a" * 5000,
    " " * 777,
]


@pytest.fixture(scope="module")
def tokenizer(bpe_path):
    return build_tokenizer("SentencePieceTokenizer", bpe_path)


@pytest.mark.parametrize("text", HOSTILE)
def test_sentencepiece_loses_nothing(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.pieces.of_text(ids) == len(text.encode())
    assert tokenizer.processor.unk_id() not in ids
    assert tokenizer.eod not in ids


def test_sentencepiece_loses_nothing_of_random_unicode(tokenizer):
    chance = random.Random(0)
    for _ in range(300):
        points = (
            chance.choice((chance.randrange(0xD800), chance.randrange(0xE000, 0x110000)))
            for _ in range(chance.randrange(40))
        )
        text = "".join(map(chr, points)) + chance.choice(("", " ", "\u2581 ", "\n "))
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.pieces.of_text(ids) == len(text.encode())


def test_encoding_by_units_equals_sentencepiece(tokenizer, texts):
    pytest.importorskip("google.protobuf")
    assert tokenizer._units is not None
    for text in [*HOSTILE, *texts, " x  y\n   z ", "\n  \n\t  a"]:
        if "\u2581" not in text:
            assert tokenizer.encode(text) == tokenizer.processor.encode(text)
            assert tokenizer.encode(text) == tokenizer.processor.encode(text)
    assert 10 < len(tokenizer._units) < 10_000


def test_training_is_deterministic_and_exact(tmp_path, texts, bpe_path, tokenizer):
    sentencepiece_model.train(texts, 400, tmp_path / "elsewhere.model")
    assert (tmp_path / "elsewhere.model").read_bytes() == bpe_path.read_bytes()
    assert tokenizer.vocab_size == 400
    assert (tokenizer.bos, tokenizer.eod) == (1, 2)
    assert len(tokenizer.encode(texts[0])) < len(texts[0]) / 3


def test_training_refuses_what_cannot_be(tmp_path, texts):
    with pytest.raises(ConfigError, match="260 = 256 bytes"):
        sentencepiece_model.train(texts, 259, tmp_path / "m")
    with pytest.raises(DataError, match="--vocab-size 60000"):
        sentencepiece_model.train(texts[:2], 60000, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_llama2_begins_with_bos(bpe_path, tokenizer):
    llama = build_tokenizer("Llama2Tokenizer", bpe_path)
    assert llama.encode("a b") == [1, *tokenizer.encode("a b")]
    assert llama.decode(llama.encode("a b")) == "a b"
    assert llama.fingerprint != tokenizer.fingerprint
    assert build_tokenizer("GPTSentencePieceTokenizer", bpe_path).encode("a b") == tokenizer.encode(
        "a b"
    )


def test_decode_shows_ids_beyond_the_vocabulary(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("ab"), 511, *tokenizer.encode("c")]) == "ab\ufffdc"


def bytelevel(tmp_path, texts):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    made.save(str(tmp_path / "tokenizer.json"))
    made.model.save(str(tmp_path))
    return made


@pytest.mark.parametrize("text", HOSTILE)
def test_huggingface_and_gpt2_agree(tmp_path_factory, texts, text):
    folder = tmp_path_factory.getbasetemp() / "hf"
    if not folder.exists():
        folder.mkdir()
        bytelevel(folder, texts)
    hugging = build_tokenizer("HuggingFaceTokenizer", folder)
    gpt2 = build_tokenizer(
        "GPT2BPETokenizer", None, vocab_file=folder / "vocab.json", merge_file=folder / "merges.txt"
    )
    assert hugging.encode(text) == gpt2.encode(text)
    assert hugging.decode(hugging.encode(text)) == gpt2.decode(gpt2.encode(text)) == text
    assert hugging.pieces.of_text(hugging.encode(text)) == len(text.encode())
    assert hugging.eod == gpt2.eod == 0


def test_a_document_cannot_forge_its_end(tmp_path, texts):
    bytelevel(tmp_path, texts)
    hugging = build_tokenizer("HuggingFaceTokenizer", tmp_path / "tokenizer.json")
    assert hugging.eod not in hugging.encode("a<|endoftext|>b")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "a"}}')
    assert build_tokenizer("HuggingFaceTokenizer", tmp_path).eod == hugging.tokenizer.token_to_id(
        "a"
    )


def truncation(settings):
    settings["truncation"] = {
        "direction": "Right",
        "max_length": 5,
        "strategy": "LongestFirst",
        "stride": 0,
    }


def padding(settings):
    settings["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|endoftext|>",
    }


def template(*around):
    def change(settings):
        from tokenizers import processors

        kind = processors.TemplateProcessing(
            single=" ".join(around), special_tokens=[("<|endoftext|>", 0)]
        )
        settings["post_processor"] = json.loads(kind.__getstate__())

    return change


def dropout(settings):
    settings["model"]["dropout"] = 0.5


def behind_bytes(settings):
    template("$A", "<|endoftext|>")(settings)
    first = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    }
    processors = [first, settings["post_processor"]]
    settings["post_processor"] = {"type": "Sequence", "processors": processors}


@pytest.mark.parametrize(
    "changes",
    [
        [truncation],
        [padding],
        [truncation, padding],
        [template("<|endoftext|>", "$A")],
        [template("$A", "<|endoftext|>")],
        [template("<|endoftext|>", "$A", "<|endoftext|>"), truncation],
        [behind_bytes],
        [dropout],
    ],
)
def test_settings_inside_a_tokenizer_json_do_not_change_what_training_sees(
    tmp_path, texts, changes
):
    made = bytelevel(tmp_path, texts)
    clean = build_tokenizer("HuggingFaceTokenizer", tmp_path)
    settings = json.loads(made.to_str())
    for change in changes:
        change(settings)
    (tmp_path / "tokenizer.json").write_text(json.dumps(settings))
    found = build_tokenizer("HuggingFaceTokenizer", tmp_path)
    for text in [*texts[:20], *HOSTILE]:
        ids = found.encode(text)
        assert ids == clean.encode(text) and found.eod not in ids
        assert found.decode(ids) == text
    assert found.eod == clean.eod


def test_unigram_sampling_is_off(tmp_path, texts):
    from tokenizers import Tokenizer, models, trainers

    made = Tokenizer(models.Unigram())
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    made.model.alpha, made.model.nbest_size = 0.1, 64
    foreign_tokenizers.only_the_text(made)
    assert made.model.alpha is None and made.model.nbest_size is None
    assert len({str(made.encode(texts[0]).ids) for _ in range(5)}) == 1


def test_a_clean_tokenizer_json_keeps_its_fingerprint(tmp_path, texts):
    """Data that an earlier version prepared with such a file is still known as its own."""
    made = bytelevel(tmp_path, texts)
    content = (tmp_path / "tokenizer.json").read_bytes()
    clean = build_tokenizer("HuggingFaceTokenizer", tmp_path).fingerprint
    assert clean == hashlib.sha256(b"huggingface0" + content).hexdigest()
    made.enable_truncation(5)
    made.save(str(tmp_path / "tokenizer.json"))
    content = (tmp_path / "tokenizer.json").read_bytes()
    changed = build_tokenizer("HuggingFaceTokenizer", tmp_path).fingerprint
    assert changed != hashlib.sha256(b"huggingface0" + content).hexdigest()


def ranks():
    tokens = [bytes([byte]) for byte in range(256)] + [b"th", b"the", b" the"]
    return list(enumerate(tokens))


@pytest.mark.parametrize("text", HOSTILE)
def test_tiktoken_both_formats(tmp_path, text):
    entries = [
        {"rank": rank, "token_bytes": base64.b64encode(token).decode(), "token_str": None}
        for rank, token in ranks()
    ]
    (tmp_path / "v.json").write_text(json.dumps(entries))
    (tmp_path / "v.tiktoken").write_text(
        "".join(f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in ranks())
    )
    as_json = build_tokenizer("TikTokenizer", tmp_path / "v.json", vocab_size=1259)
    as_text = build_tokenizer("TikTokenizer", tmp_path / "v.tiktoken")
    assert (as_json.vocab_size, as_json.eod, as_json.bos) == (1259, 2, 1)
    assert (as_text.vocab_size, as_text.eod, as_text.bos) == (260, 259, None)
    for made in (as_json, as_text):
        ids = made.encode(text)
        assert made.decode([*ids, made.eod]) == text
        assert made.pieces.of_text([*ids, made.eod]) == len(text.encode())
    assert as_json.encode("the") == [1257]


def test_null_tokenizer():
    null = build_tokenizer("NullTokenizer", None, vocab_size=100)
    assert (null.vocab_size, null.eod, null.encode("5 17 3")) == (101, 100, [5, 17, 3])
    assert null.decode([5, 100]) == "5"
    with pytest.raises(DataError, match="numbers only"):
        null.encode("word")


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer", "TikTokenizer"])
@pytest.mark.parametrize("content", [None, b"", b"not a model", b"[1, 2]", b"{}", b"\xff\xfe\x00"])
def test_bad_files_are_one_error(tmp_path, kind, content):
    path = tmp_path / "model"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        build_tokenizer(kind, path)
    assert str(path) in str(caught.value)


def damaged(content: bytes, number: int) -> bytes:
    """The content with some bytes set, taken out, put in, or the end cut."""
    chance = random.Random(number)
    at, some = chance.randrange(len(content)), bytes(chance.randrange(256) for _ in range(9))
    ways = [
        content[:at] + some[:1] + content[at + 1 :],
        content[:at] + content[at + 30 :],
        content[:at] + some + content[at:],
        content[:at] + b" ",
    ]
    return ways[number % len(ways)]


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer", "TikTokenizer"])
def test_damaged_files_are_refused_or_encode(tmp_path, texts, bpe_path, kind):
    """No damage is an error of another kind, the panic of a library included."""
    bytelevel(tmp_path, texts)
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in ranks()]
    (tmp_path / "v").write_text("\n".join(lines))
    sources = {"SentencePieceTokenizer": bpe_path, "HuggingFaceTokenizer": "tokenizer.json"}
    content = (tmp_path / sources.get(kind, "v")).read_bytes()
    refused = 0
    for number in range(120):
        (tmp_path / "damaged").write_bytes(damaged(content, number))
        try:
            build_tokenizer(kind, tmp_path / "damaged").encode("Hello \u4f60\u597d")
        except DataError:
            refused += 1
    assert refused > 30


def test_a_panic_of_a_library_is_one_error(tmp_path, texts, monkeypatch):
    class Panic(BaseException):
        """As pyo3 raises it."""

    def panics(tokenizer):
        raise Panic("range end index out of range")

    bytelevel(tmp_path, texts)
    monkeypatch.setattr(foreign_tokenizers, "only_the_text", panics)
    with pytest.raises(DataError, match="not a tokenizer.json: range end"):
        build_tokenizer("HuggingFaceTokenizer", tmp_path)


def test_usage_errors():
    with pytest.raises(ConfigError, match="is not known here"):
        build_tokenizer("BertWordPieceCase", "x")
    with pytest.raises(ConfigError, match="needs --tokenizer-model"):
        build_tokenizer("SentencePieceTokenizer", None)
    with pytest.raises(ConfigError, match="needs --vocab-size"):
        build_tokenizer("NullTokenizer", None)
