import ast
import json

from data import corpus


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_domains_the_same_bytes_each_time(tmp_path):
    manifest = corpus.build(tmp_path / "a", max_bytes=200_000)
    corpus.build(tmp_path / "b", max_bytes=200_000)
    for domain in ("code", "english"):
        content = (tmp_path / "a" / f"{domain}.jsonl").read_bytes()
        assert content == (tmp_path / "b" / f"{domain}.jsonl").read_bytes()
        records = read(tmp_path / "a" / f"{domain}.jsonl")
        texts = [record["text"] for record in records]
        assert len(set(texts)) == len(texts) == manifest["domains"][domain]["documents"]
        size = sum(len(text.encode()) for text in texts)
        assert size == manifest["domains"][domain]["bytes"]
        assert 100_000 < size <= 200_000


def test_code_is_python_without_docstrings(tmp_path):
    corpus.build(tmp_path, max_bytes=100_000)
    records = read(tmp_path / "code.jsonl")
    assert records
    with_docstring = sum(ast.get_docstring(ast.parse(r["text"])) is not None for r in records)
    assert with_docstring == 0


def test_docstrings_go_to_the_english_domain():
    function = 'def f(x):\n    """Adds the number one to x."""\n    return x + 1\n'
    source = function + '\n\nclass E:\n    """Only this text here."""\n'
    tree = ast.parse(source)
    assert corpus.docstrings(tree) == "Adds the number one to x.\n\nOnly this text here."
    assert corpus.without_docstrings(source, tree) == (
        'def f(x):\n    return x + 1\n\n\nclass E:\n    """Only this text here."""\n'
    )
