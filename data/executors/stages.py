"""The stages of one job: each is a datatrove pipeline and its number of tasks.

exact: datatrove's three url-deduplication blocks with the text in the place of the url: documents
with equal 64 bits of the SHA-1 of their text are one, the first in the order of the input stays.

minhash: datatrove's four blocks, with its settings: words of the simplified text, 5-grams, 14
buckets of 8 hashes (two texts of similarity 0.8 meet with probability 0.92).  Of documents that are
alike one stays, the same at every run, not always the first.  Texts below 5 words have no
signature and stay.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline import dedup
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import url_dedup
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer

from data.executors.blocks import Dropped, OneByOne, ReadShard, WriteShard
from data.executors.filters import make_filter, name_of
from data.executors.flags import Asked
from data.executors.words import words_of
from data.shards import Recipe

HIGHEST_PRIORITY = 65535
HASH = HashConfig(hash_fc="sha1")
"""datatrove 0.6.0's other hash hands str to xxhash, which version 4 of that package refuses."""
FINDERS = 16


@dataclass(frozen=True)
class Stage:
    """One run of an executor."""

    name: str
    pipeline: list[PipelineStep]
    tasks: int


Chain = Callable[[], list[PipelineStep]]


def stages_of(
    asked: Asked, recipe: Recipe, shards: int, flags: Namespace, fingerprint: str
) -> list[Stage]:
    """All stages, the one that writes the shards last."""
    words = words_of(asked.words)

    def chain() -> list[PipelineStep]:
        reader = ReadShard(recipe)
        return [reader, *(_filter(text, words, reader) for text in asked.filters)]

    folder = recipe.folder / asked.dedup
    last = chain()
    stages: list[Stage] = []
    if asked.dedup == "exact":
        stages = _exact(chain, folder, shards)
        last.append(_exact_filter(folder, last[0]))
    elif asked.dedup == "minhash":
        stages = _minhash(chain, folder, shards, words)
        dropped = Dropped(last[0], "near duplicate")
        last.append(dedup.MinhashDedupFilter(str(folder / "remove"), exclusion_writer=dropped))
    last.append(WriteShard(recipe, last[0], flags, fingerprint))
    return [*stages, Stage("shards", last, shards)]


def _filter(text: str, words: WordTokenizer, reader: ReadShard) -> PipelineStep:
    name = name_of(text)
    return OneByOne(make_filter(text, words, Dropped(reader, name)), reader, name)


def first_shard_first(document: Document) -> int:
    """datatrove keeps the document of the highest priority, a uint16 from 1."""
    return max(1, HIGHEST_PRIORITY - document.metadata["rank"])


class TextAsUrl(PipelineStep):
    """Puts the text where datatrove's url-deduplication looks for the url."""

    type = "FORMAT"
    name = "text as url"

    def run(self, data=None, rank: int = 0, world_size: int = 1):
        """Yields the documents."""
        for document in data:
            document.metadata["url"] = document.text
            yield document


def _exact_config() -> url_dedup.UrlDedupConfig:
    return url_dedup.UrlDedupConfig(document_priority=first_shard_first, hash_config=HASH)


def _exact(chain: Chain, folder: Path, shards: int) -> list[Stage]:
    config = _exact_config()
    finders = min(FINDERS, shards)
    signatures, duplicates = str(folder / "signatures"), str(folder / "duplicates")
    sign = url_dedup.UrlDedupSignature(signatures, finders, config)
    find = url_dedup.UrlFindDedups(signatures, duplicates, config=config)
    return [
        Stage("exact-signatures", [*chain(), TextAsUrl(), sign], shards),
        Stage("exact-duplicates", [find], finders),
    ]


def _exact_filter(folder: Path, reader: ReadShard) -> PipelineStep:
    (folder / "duplicates").mkdir(parents=True, exist_ok=True)
    dropped = Dropped(reader, "duplicate")
    return url_dedup.UrlDedupFilter(
        str(folder / "duplicates"), _exact_config(), exclusion_writer=dropped
    )


def _minhash(chain: Chain, folder: Path, shards: int, words: WordTokenizer) -> list[Stage]:
    config = dedup.MinhashConfig(hash_config=HASH)
    signatures, pairs, remove = (str(folder / part) for part in ("signatures", "pairs", "remove"))
    sign = dedup.MinhashDedupSignature(signatures, config, language=words)
    return [
        Stage("minhash-signatures", [*chain(), sign], shards),
        Stage(
            "minhash-pairs",
            [dedup.MinhashDedupBuckets(signatures, pairs, config=config)],
            config.num_buckets,
        ),
        Stage("minhash-clusters", [dedup.MinhashDedupCluster(pairs, remove, config=config)], 1),
    ]
