"""data.prepare on datatrove's executors gives the bytes of one process, whatever is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from data import prepare, shards
from data.indexed import IndexedFile
from data.tokenizer import build_tokenizer
from megatron_ext.errors import ConfigError, DataError, DiskError, Fatal
from tests.data.conftest import make_texts
from tests.data.test_prepare import digests, flags, wait_for

pytest.importorskip("datatrove", reason="pip install -r requirements-data.txt")
ROOT = Path(__file__).parents[2]
LOCAL = ("--executor", "local")


@pytest.fixture(scope="module")
def several(tmp_path_factory, texts):
    """Two jsonl files of 1.3 MB, three shards, with a line that is no document."""
    folder = tmp_path_factory.mktemp("several")
    for number in range(2):
        lines = [
            json.dumps({"text": f"{number} {repeat} {text}"})
            for repeat in range(10)
            for text in texts
        ]
        (folder / f"{number}.jsonl").write_text("\n".join([*lines, "broken"]))
    return folder


@pytest.fixture(scope="module")
def whole(several, bpe_path, tmp_path_factory):
    """The pair that one process makes of it."""
    prefix = tmp_path_factory.mktemp("whole") / "p"
    prepare.main(flags([several], prefix, bpe_path))
    return prefix


def report(prefix) -> dict:
    """The report without what differs between runs."""
    found = json.loads(Path(f"{prefix}.report.json").read_text())
    return {key: value for key, value in found.items() if key != "run"}


def kept_shards(prefix) -> int:
    return json.loads(Path(f"{prefix}.report.json").read_text())["run"]["kept_shards"]


def documents_of(prefix, bpe_path) -> list[str]:
    """The texts in a pair."""
    tokenizer = build_tokenizer("SentencePieceTokenizer", bpe_path)
    file = IndexedFile(prefix)
    return [tokenizer.decode(file.document(n).tolist()[:-1]) for n in range(len(file))]


def write_jsonl(path, texts) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_the_local_executor_gives_the_bytes_of_one_process(
    tmp_path, several, whole, bpe_path, capfd
):
    prepare.main(flags([several], tmp_path / "p", bpe_path, *LOCAL, "--workers", 2))
    assert digests(tmp_path / "p") == digests(whole)
    assert report(tmp_path / "p") == report(whole)
    assert report(whole)["skipped"] == {"line is not JSON": 2}
    assert not (tmp_path / "p.parts").exists()
    assert capfd.readouterr().err == ""


def facts_in(parts: Path) -> list[Path]:
    return sorted(parts.glob("shard-*.json"))


def test_only_missing_shards_are_done_after_a_task_was_killed(tmp_path, several, whole, bpe_path):
    """The second shard dies in its middle; what was done before stays, byte by byte."""
    script = (
        "import os, signal, sys\nfrom data import prepare, shards\nreal = shards.encode_checked\n"
        "def dying(*given):\n"
        "    if given[1].startswith('1 '): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*given)\n"
        "shards.encode_checked = dying\nprepare.main(sys.argv[1:])"
    )
    arguments = flags([several], tmp_path / "p", bpe_path, *LOCAL)
    done = subprocess.run([sys.executable, "-c", script, *arguments], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    made = facts_in(tmp_path / "p.parts")
    before = [path.stat().st_mtime_ns for path in made]
    assert 1 <= len(made) < 4 and not (tmp_path / "p.bin").exists()
    lost = shards.shard_paths(tmp_path / "p.parts", 0)[0]
    lost.write_bytes(lost.read_bytes()[:-2])
    job, _ = prepare.job_of(prepare.parser().parse_args(arguments))
    total = len(shards.plan(job.sources))
    prepare.main(arguments)
    assert digests(tmp_path / "p") == digests(whole)
    assert kept_shards(tmp_path / "p") == len(before) - 1 < total


def test_workers_and_executors_take_over_from_each_other(tmp_path, several, whole, bpe_path):
    arguments = flags([several], tmp_path / "p", bpe_path)
    job, skipped = prepare.job_of(prepare.parser().parse_args(arguments))
    plan = shards.plan(job.sources)
    prepare.make_folder(job.prefix.parent)
    prepare.finished_report(job, overwrite=False)
    recipe = shards.Recipe(job.parts, job.key, job.append_eod)
    first = shards.write_shard(recipe, 0, plan[0], job.tokenizer)
    shards.append_to_journal(job.parts, first)
    prepare.main([*arguments, *LOCAL])
    assert kept_shards(tmp_path / "p") == 1 < len(plan)
    assert digests(tmp_path / "p") == digests(whole)


def test_a_worker_that_dies_is_one_error_and_no_wait(tmp_path, several, whole, bpe_path):
    arguments = flags([several], tmp_path / "p", bpe_path, *LOCAL, "--workers", "2")
    command = [sys.executable, "-m", "data.prepare", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    plan = tmp_path / "p.parts" / "plan.jsonl"

    def children() -> list[int]:
        text = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
        names = {int(pid): Path(f"/proc/{pid}/cmdline").read_text() for pid in text.split()}
        return [pid for pid, name in names.items() if "spawn_main" in name]

    wait_for(lambda: plan.exists() and len(children()) >= 2)
    os.kill(children()[0], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 69
    assert said.count("FATAL") == 1 and "a worker process died" in said
    prepare.main(arguments)
    assert digests(tmp_path / "p") == digests(whole)


def test_exact_duplicates_go_and_the_first_stays(tmp_path, bpe_path, capsys):
    unique = make_texts(1500, seed=1)
    copies = [unique[3], unique[700], unique[3]]
    source = write_jsonl(tmp_path / "in.jsonl", [*unique[:900], *copies, *unique[900:], unique[0]])
    found = set()
    for workers in (1, 2):
        prefix = tmp_path / f"p{workers}"
        arguments = flags([source], prefix, bpe_path, "--dedup", "exact", "--workers", workers)
        prepare.main(arguments)
        found.add(tuple(digests(prefix)))
    assert len(found) == 1
    assert documents_of(prefix, bpe_path) == unique
    assert report(prefix)["skipped"] == {"duplicate": 4}
    assert "documents=1500" in (said := capsys.readouterr().out) and "skipped: 4 duplicate" in said


def test_near_duplicates_go_one_of_each_stays(tmp_path, bpe_path):
    """Three copies with one word changed in 64; the rest shares words, but no order of them."""
    unique = make_texts(120, seed=2)
    near = [text.replace("\n", "\nbanana ", 1) for text in unique[:3]]
    source = write_jsonl(tmp_path / "in.jsonl", [*unique, *near])
    prepare.main(flags([source], tmp_path / "p", bpe_path, "--dedup", "minhash"))
    kept = documents_of(tmp_path / "p", bpe_path)
    assert report(tmp_path / "p")["skipped"] == {"near duplicate": 3}
    assert set(kept) <= {*unique, *near} and set(unique[3:]) <= set(kept)
    for pair in zip(unique[:3], near):
        assert len(set(pair) & set(kept)) == 1
    prepare.main(flags([source], tmp_path / "e", bpe_path, "--dedup", "exact"))
    assert report(tmp_path / "e")["documents"] == 123


PROSE = (
    "The people of a small town went to market before the sun rose over its hills. Bakers "
    "sold warm bread, farmers brought apples, cheese and wool, and an old man with grey hair "
    "played songs that nobody knew. When rain began, children ran home while their parents "
    "covered every table. Later somebody told of a river beyond seven valleys, where fish "
    "speak and stones can be heard singing."
)


def test_filters_drop_with_their_reasons(tmp_path, bpe_path):
    good = [f"{PROSE} Number {n} was told once." for n in "abc"]
    short, repeated = "Too short to be of the use that is wanted.", "the same line again\n" * 40
    source = write_jsonl(tmp_path / "in.jsonl", [good[0], short, good[1], repeated, good[2], short])

    def left(name, *flags_of_filters):
        prepare.main(flags([source], tmp_path / name, bpe_path, *flags_of_filters))
        return documents_of(tmp_path / name, bpe_path), report(tmp_path / name)["skipped"]

    kept, reasons = left("q", "--filter", "gopher-quality")
    assert kept == good
    short_reason, stop_reason = (
        "gopher-quality: gopher_short_doc",
        "gopher-quality: gopher_enough_stop_words",
    )
    assert reasons == {short_reason: 2, stop_reason: 1}
    kept, reasons = left("r", "--filter", "gopher-repetition", "--dedup", "exact")
    assert kept[-1] == good[2] and kept.count(short) <= 1
    assert reasons["gopher-repetition: dup_line_frac"] == 1
    kept, _ = left("l", "--filter", "gopher-quality:min_doc_words=3,min_avg_word_length=2")
    assert kept == [good[0], short, good[1], good[2], short]
    kept, reasons = left("two", "--filter", "regex:number [xy]", "--filter", "regex:Number [ab]")
    assert kept == [short, repeated, good[2], short] and reasons == {"regex": 2}
    assert report(tmp_path / "two")["filters"] == ["regex:number [xy]", "regex:Number [ab]"]


def test_other_filters_are_other_settings(tmp_path, jsonl, bpe_path):
    prepare.main(flags([jsonl], tmp_path / "p", bpe_path))
    with pytest.raises(DataError, match="--output was made from other"):
        prepare.main(flags([jsonl], tmp_path / "p", bpe_path, "--dedup", "exact"))


@pytest.mark.parametrize(
    ("given", "what", "do"),
    [
        (["--filter", "gopher-qualty"], "gopher-qualty is unknown", "gopher-quality"),
        (["--filter", "gopher-quality:min_words=3"], "has no setting min_words", "min_doc_words"),
        (["--filter", "gopher-quality:min_doc_words=x"], "must be a number", "50 is the default"),
        (["--filter", "regex:("], "is no regular expression", "correct it"),
        (["--filter", "c4-paragraph:x=1"], "has no setting x", "leave it out"),
        (["--filter", "gopher-quality", "--words", "klingon"], "is no language", "whitespace"),
        (["--executor", "local", "--workers", "0"], "--workers 0 must be at least 1", "use 1"),
        (["--slurm-partition", "gpu"], "is for --executor slurm", "add it"),
    ],
)
def test_wrong_flags_are_one_line(tmp_path, jsonl, bpe_path, given, what, do):
    with pytest.raises(ConfigError) as caught:
        prepare.main(flags([jsonl], tmp_path / "p", bpe_path, *given))
    assert what in caught.value.what and do in caught.value.do
    assert not (tmp_path / "p.bin").exists()


def test_a_missing_package_or_program_is_named(tmp_path, jsonl, bpe_path, monkeypatch):
    arguments = flags([jsonl], tmp_path / "p", bpe_path, "--executor")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no sbatch on the PATH"):
        prepare.main([*arguments, "slurm"])
    monkeypatch.setattr("data.executors.flags.find_spec", lambda name: name != "ray" or None)
    with pytest.raises(ConfigError, match="needs the package ray"):
        prepare.main([*arguments, "ray"])
    monkeypatch.setattr("data.executors.flags.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="need the package datatrove") as caught:
        prepare.main([*arguments, "local"])
    assert caught.value.do == "pip install -r requirements-data.txt"


def test_errors_of_tasks_come_out_as_they_are(tmp_path, several, jsonl, bpe_path, monkeypatch):
    monkeypatch.setattr("data.storage.free_bytes", lambda path: 1000)
    with pytest.raises(DiskError, match="No space left"):
        prepare.main(flags([several], tmp_path / "p", bpe_path, *LOCAL))
    monkeypatch.undo()
    real = prepare.shards.plan

    def changing(sources):
        made = real(sources)
        jsonl.write_text(jsonl.read_text() + '{"text": "one more"}\n')
        return made

    monkeypatch.setattr("data.shards.plan", changing)
    with pytest.raises(DataError, match="an input changed") as caught:
        prepare.main(flags([jsonl], tmp_path / "c", bpe_path, *LOCAL))
    assert isinstance(caught.value, Fatal) and caught.value.path == str(jsonl)
