"""What context parallelism asks of a configuration, before anything starts."""

import pytest

from megatron_ext.config import parse
from megatron_ext.errors import ConfigError
from tests.ranks.tiny import TINY

CP2 = "--context-parallel-size 2"
CP4 = "--context-parallel-size 4"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"

GOOD = {
    "default": CP4,
    "one name": f"{CP2} --cp-comm-type all_gather",
    "a name for each layer": f"{CP2} --cp-comm-type p2p a2a all_gather p2p",
    "more parts than key/value heads": f"{CP4} --cp-comm-type a2a",
    "two levels": f"{CP4} --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 2",
    "with tp": f"{CP2} {TP2} --seq-length 68 --max-position-embeddings 68",
}
BAD = {
    f"{CP4} --seq-length 60": "--seq-length 60 must be a multiple of 2*cp = 8 (cp 4, tp 1) do=use"
    " 56 or 64",
    f"{CP2} {TP2} --seq-length 62": "must be a multiple of cp*tp = 4 with --sequence-parallel"
    " (cp 2, tp 2) do=use 60 or 64",
    f"{CP2} --attention-dropout 0.1": "--attention-dropout 0.1 must be 0",
    f"{CP2} --cp-comm-type ring": "--cp-comm-type ring is no strategy",
    f"{CP2} --cp-comm-type p2p a2a": "names 2 layers of --num-layers 4",
    f"{CP4} --cp-comm-type a2a+p2p": "must be two sizes, a2a and p2p, whose product is"
    " --context-parallel-size = 4 do=use 2 2",
    f"{CP4} --cp-comm-type a2a+p2p --hierarchical-context-parallel-sizes 2 4": "do=use 2 2",
    f"{CP2} --cp-comm-type a2a+p2p": "do=use --cp-comm-type p2p or a2a",
    f"{CP4} {TP2} --cp-comm-type a2a": "cuts the 2 heads and 1 key/value heads of a tp rank into 4",
    f"{CP4} --num-attention-heads 6 --num-query-groups 3 --cp-comm-type a2a": "cuts the 6 heads",
}


def _parse(flags: str):
    return parse([*TINY, *flags.split()], environ={"WORLD_SIZE": "8"})


@pytest.mark.parametrize("flags", GOOD.values(), ids=GOOD)
def test_what_works_is_accepted(flags):
    _parse(flags)


@pytest.mark.parametrize(("flags", "said"), BAD.items(), ids=lambda text: text[:50])
def test_what_does_not_is_named_with_a_way_out(flags, said):
    with pytest.raises(ConfigError) as error:
        _parse(flags)
    assert any(said in line for line in error.value.lines()), error.value.lines()


def test_an_odd_tp_asks_for_both_divisors():
    """cp 2 and tp 3: a multiple of 4 and of 6, so 12."""
    flags = f"{CP2} --tensor-model-parallel-size 3 --sequence-parallel --num-attention-heads 6"
    with pytest.raises(ConfigError) as error:
        parse([*TINY, *flags.split()], environ={"WORLD_SIZE": "6"})
    said = "a multiple of 2*cp*tp = 12 with --sequence-parallel (cp 2, tp 3) do=use 60 or 72"
    assert any(said in line for line in error.value.lines())
