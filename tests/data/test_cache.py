import numpy as np
import pytest

from data.cache import IndexCache, key_of, manifest_of
from megatron_ext.errors import DiskError

ARRAYS = {"a": np.arange(1000, dtype=np.int32), "b": np.arange(12).reshape(3, 4)}


class Maker:
    """Counts how often the arrays are built."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        return {name: array.copy() for name, array in ARRAYS.items()}


def same(found):
    return all(
        np.array_equal(found[name], array) and found[name].dtype == array.dtype
        for name, array in ARRAYS.items()
    )


@pytest.fixture
def cache(tmp_path):
    return IndexCache(tmp_path / "cache", required=True)


def test_built_once_then_read(cache):
    make = Maker()
    for _ in range(3):
        cache.ensure("k", make)
    found = cache.load_or_make("k", make)
    assert make.calls == 1
    assert same(found)
    assert isinstance(found["a"], np.memmap)
    assert not found["a"].flags.writeable
    assert sorted(path.name for path in cache.folder.iterdir()) == ["k.a.npy", "k.b.npy", "k.json"]


def damages(folder):
    """Each way in which the files of an entry may go bad."""
    array, manifest = folder / "k.a.npy", folder / "k.json"
    good, text = array.read_bytes(), manifest.read_text()
    for size in (0, 10, 127, 128, 500, len(good) - 1):
        yield lambda size=size: array.write_bytes(good[:size])
    for offset in (0, 6, 20, 60, 128, 2000, len(good) - 1):
        yield lambda offset=offset: array.write_bytes(
            good[:offset] + bytes([good[offset] ^ 1]) + good[offset + 1 :]
        )
    yield array.unlink
    yield manifest.unlink
    yield lambda: np.save(array, np.arange(1000, dtype=np.int64))
    yield lambda: array.write_bytes((folder / "k.b.npy").read_bytes())
    for content in (
        "",
        "{}",
        "[]",
        text[: len(text) // 2],
        '{"format": 1, "arrays": {"a": 5}}',
        '{"format": 1, "arrays": []}',
        text.replace('"format": 1', '"format": 2'),
        text.replace("1000", "999"),
        text.replace("<i4", "<i8"),
    ):
        yield lambda content=content: manifest.write_text(content)


def test_every_damage_is_found_by_readers_and_repaired_by_the_builder(cache):
    cache.ensure("k", Maker())
    tried = 0
    for damage in list(damages(cache.folder)):
        damage()
        reader, builder = Maker(), Maker()
        assert same(cache.load_or_make("k", reader))
        assert reader.calls == 1
        cache.ensure("k", builder)
        assert builder.calls == 1
        after = Maker()
        assert same(cache.load_or_make("k", after))
        assert after.calls == 0
        tried += 1
    assert tried == 26


class Bomb:
    """A pickle that writes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_is_never_executed(cache, tmp_path):
    import hashlib
    import json
    import pickle

    cache.ensure("k", Maker())
    bomb = pickle.dumps(Bomb(tmp_path / "canary"))
    (cache.folder / "k.a.npy").write_bytes(bomb)
    manifest = json.loads((cache.folder / "k.json").read_text())
    manifest["arrays"]["a"]["sha256"] = hashlib.sha256(bomb).hexdigest()
    (cache.folder / "k.json").write_text(json.dumps(manifest_of(manifest["arrays"])))
    make = Maker()
    assert same(cache.load_or_make("k", make))
    assert make.calls == 1
    assert not (tmp_path / "canary").exists()


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    named = IndexCache(tmp_path / "file" / "cache", required=True)
    with pytest.raises(DiskError, match="while writing"):
        named.ensure("k", Maker())
    default = IndexCache(tmp_path / "file" / "cache", required=False)
    make = Maker()
    default.ensure("k", make)
    default.ensure("k2", make)
    assert len(default.warnings) == 1
    assert "--data-cache-path" in default.warnings[0]
    assert same(default.load_or_make("k", make))


def test_keys_differ_by_every_fact():
    keys = {key_of("x", a=1, b=2), key_of("x", a=1, b=3), key_of("y", a=1, b=2), key_of("x", a=1)}
    assert len(keys) == 4
    assert key_of("x", a=1, b=2) == key_of("x", b=2, a=1)


def test_a_note_is_believed_only_whole_and_under_its_own_name(cache):
    cache.note("a", lambda: {"error": "damaged"})
    cache.note("b", lambda: {"max_token_id": 5})
    path, good = cache.folder / "a.json", (cache.folder / "b.json").read_text()
    for content in (good, good.replace("5", "6"), "[" * 100_000, "", "[]", '{"value": {"x": 1}}'):
        path.write_text(content)
        assert cache.read_note("a") is None
    cache.note("a", lambda: {"error": "damaged"})
    assert cache.read_note("a") == {"error": "damaged"}
