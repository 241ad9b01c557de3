"""Resume continues bit for bit: weights, optimizer, schedule, random streams, losses."""

import pytest

from tests.checkpoint.small_run import DIST, EP2, TP2, VPP2, checkpointer, small_run
from tests.ranks.harness import run_ranks

LAYOUTS = {
    "one rank": (1, ""),
    "tp2": (2, TP2),
    "pp2 vpp2, bf16": (2, f"{VPP2} --bf16"),
    "ep2": (2, EP2),
    "dp2, replicas written by the first": (2, "--no-ckpt-fully-parallel-save"),
    "dp2, distributed optimizer": (2, DIST),
    "dp2, distributed optimizer, bf16, overlapped": (
        2,
        f"{DIST} --bf16 --overlap-grad-reduce --overlap-param-gather",
    ),
    "pp2 vpp2 ep2, distributed optimizer, bf16": (4, f"{VPP2} {EP2} {DIST} --bf16"),
}


def _differing(one: dict, other: dict) -> list[str]:
    return [name for name in one.keys() | other.keys() if one.get(name) != other.get(name)]


def _save_and_go_on(flags, folder):
    with small_run(flags) as run:
        run.steps(2)
        with checkpointer(
            folder, ckpt_fully_parallel_save=run.cfg.checkpoint.ckpt_fully_parallel_save
        ) as saver:
            saver.save(run.state)
            marks = run.fingerprint()
            losses = run.steps(2)
    with small_run(flags) as run:
        with checkpointer(None, folder) as loader:
            assert loader.load(run.state)
        again = run.fingerprint()
        return _differing(marks, again), len(marks), losses, run.steps(2)


def _in_turn(names, folder):
    """Layouts of one world size, one after the other in the same ranks."""
    return {name: _save_and_go_on(LAYOUTS[name][1], folder / name) for name in names}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Layout -> what each rank found."""
    folder, found = tmp_path_factory.mktemp("round_trip"), {}
    for world in (1, 2, 4):
        names = [name for name, (size, _) in LAYOUTS.items() if size == world]
        ranks = run_ranks(_in_turn, world, names, folder, timeout_s=300)
        found |= {name: [rank[name] for rank in ranks] for name in names}
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_resume_is_bitwise(name, resumed):
    assert len(resumed[name]) == LAYOUTS[name][0]
    for differing, count, losses, again in resumed[name]:
        assert differing == []
        assert count > 40
        assert again == losses


def _resume_twice(folder):
    """Save at 1 and 2, resume from 1 by --ckpt-step, save 2 again."""
    with small_run("") as run, checkpointer(folder, folder) as saver:
        assert not saver.load(run.state), "an empty folder of the run itself is a fresh start"
        run.steps(1)
        saver.save(run.state)
        run.steps(1)
        saver.save(run.state)
        second = run.fingerprint()
    with small_run("") as run, checkpointer(folder, folder, ckpt_step=1) as saver:
        assert saver.load(run.state)
        assert run.state.progress.step == 1
        run.steps(1)
        saver.save(run.state)
        assert _differing(second, run.fingerprint()) == []
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_going_back_and_saving_the_same_step_again(tmp_path):
    (names,) = run_ranks(_resume_twice, 1, tmp_path / "ckpt")
    assert names == [
        "latest",
        "latest_checkpointed_iteration.txt",
        "ledger.jsonl",
        "step_00000001",
        "step_00000002",
    ]


def _parts_only(folder):
    """What --finetune, --no-load-optim and --no-load-rng leave out."""
    with small_run("--bf16") as run, checkpointer(folder) as saver:
        run.steps(2)
        saver.save(run.state)
        saved, weights = run.fingerprint(), run.gathered()
    found = {}
    for option in ("finetune", "no_load_optim", "no_load_rng"):
        with small_run("--bf16") as run, checkpointer(None, folder, **{option: True}) as loader:
            before = run.fingerprint()
            assert loader.load(run.state)
            after = run.fingerprint()
            optimizer_state = [k for k in saved if k.endswith(("exp_avg", "exp_avg_sq"))]
            found[option] = {
                "step": run.state.progress.step,
                "weights": all(after[k] == saved[k] for k in saved if k.startswith("0.")),
                "masters": all(
                    weights[k] == run.gathered()[k]
                    for k in weights
                    if not k.startswith("optimizer")
                ),
                "optimizer": bool(optimizer_state)
                and all(after.get(k) == saved[k] for k in optimizer_state),
                "rng": all(after[k] == saved[k] for k in saved if k.startswith("rng.")),
                "rng is fresh": all(after[k] == before[k] for k in saved if k.startswith("rng.")),
            }
            run.steps(1)
    return found


def test_parts_can_be_left_out(tmp_path):
    (found,) = run_ranks(_parts_only, 1, tmp_path / "ckpt")
    assert all(parts["weights"] and parts["masters"] for parts in found.values())
    assert [found[k]["step"] for k in ("finetune", "no_load_optim", "no_load_rng")] == [0, 2, 2]
    assert [found[k]["optimizer"] for k in ("finetune", "no_load_optim", "no_load_rng")] == [
        False,
        False,
        True,
    ]
    assert found["no_load_optim"]["rng"]
    assert found["finetune"]["rng is fresh"] and found["no_load_rng"]["rng is fresh"]
