"""Words and sentences without a language package, for datatrove's filters and minhash."""

from __future__ import annotations

import re

from datatrove.utils.word_tokenizers import WordTokenizer, load_word_tokenizer

from megatron_ext.errors import ConfigError

SENTENCE = re.compile(r"[^.!?\n]*[.!?\n]+[\"'”)]*|[^.!?\n]+$")


class WhitespaceWords(WordTokenizer):
    """Words lie between whitespace; a sentence ends with ``.``, ``!``, ``?`` or its line."""

    def word_tokenize(self, text: str) -> list[str]:
        """The words, with the punctuation that touches them."""
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        """The sentences, stripped."""
        return [text[start:end].strip() for start, end in self.span_tokenize(text)]

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """(first, one past the last character) of each sentence that is not blank."""
        return [match.span() for match in SENTENCE.finditer(text) if match.group().strip()]


def words_of(language: str) -> WordTokenizer:
    """The tokenizer of --words."""
    if language == "whitespace":
        return WhitespaceWords()
    try:
        return load_word_tokenizer(language)
    except ValueError:
        raise ConfigError(
            f"--words {language} is no language of datatrove",
            do="--words whitespace, or en, de, ...",
        ) from None
    except ImportError as error:
        raise ConfigError(
            f"--words {language}: {error}", do="install what it names, or --words whitespace"
        ) from None
