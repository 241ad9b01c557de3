"""Which layers each pipeline chunk holds."""

from __future__ import annotations

import pytest

from megatron_ext.config.stages import Split, parse_layout, split_layers


def layers(split: Split) -> list[list[tuple[int, ...]]]:
    return [[chunk.layers for chunk in rank] for rank in split_layers(split)]


def test_even_and_interleaved():
    assert layers(Split(4, pp=2)) == [[(0, 1)], [(2, 3)]]
    assert layers(Split(8, pp=2, vpp=2)) == [[(0, 1), (4, 5)], [(2, 3), (6, 7)]]


def test_uneven_ends():
    assert layers(Split(7, pp=3, first=1, last=2)) == [[(0,)], [(1, 2, 3, 4)], [(5, 6)]]
    assert layers(Split(5, pp=2, first=2)) == [[(0, 1)], [(2, 3, 4)]]
    assert layers(Split(8, pp=2, vpp=2, first=2)) == [[(0,), (4,)], [(1, 2, 3), (5, 6, 7)]]


def test_embedding_and_loss_count_as_layers():
    split = Split(6, pp=2, vpp=2, account_for_embedding=True, account_for_loss=True, mtp_layers=1)
    assert layers(split) == [[(0,), (3, 4)], [(1, 2), (5,)]]
    table = split_layers(split)
    assert table[0][0].embedding and table[1][1].loss and table[1][1].mtp_layers == 1


def test_layout():
    assert parse_layout("Et*3|(tt|)*2,m|L") == ["Ettt", "tt", "tt", "m", "L"]
    assert parse_layout("E|(t|)*3L") == ["E", "t", "t", "t", "L"]
    assert layers(Split(4, pp=2, vpp=2, layout="E|tt|t|tL")) == [[(), (2,)], [(0, 1), (3,)]]


@pytest.mark.parametrize(
    ("split", "said"),
    [
        (Split(5, pp=2), "5 layers for 2 pipeline ranks"),
        (Split(6, pp=2, vpp=2), "3 layers, not a multiple of vpp = 2"),
        (Split(4, pp=2, first=4), "without a layer"),
        (Split(4, pp=2, first=5), "leaves -1 layers"),
        (Split(1, pp=2, vpp=1, account_for_embedding=True), None),
        (Split(3, pp=2, layout="Et|ttL|t"), "3 stages, not a multiple of pp = 2"),
        (Split(3, pp=2, layout="Et|tL"), "holds 2 layers, but --num-layers is 3"),
        (Split(2, pp=2, layout="Et|tx"), "may hold only"),
        (Split(2, pp=2, layout="t|tEL"), "in the order"),
        (Split(2, pp=2, layout="Et|tmL"), "holds 1 MTP layers"),
        (Split(2, pp=2, vpp=2, layout="E|t|mt|L", mtp_layers=1), "in the order"),
        (Split(2, pp=2, vpp=2, layout="Et|t|m|L", mtp_layers=1), "first pipeline rank"),
    ],
)
def test_impossible_splits_say_why(split, said):
    if said is None:
        assert layers(split) == [[()], [(0,)]]
        return
    with pytest.raises(ValueError, match=said):
        split_layers(split)


@pytest.mark.parametrize("text", ["Et*3|(tt|)*2,m|L", "E|(t|)*6L", "Ettt|t*2|(tt|)*1L"])
def test_layouts_expand_as_in_megatron_core(text):
    pytest.importorskip("megatron.core")
    from megatron.core.transformer.pipeline_parallel_layer_layout import (
        PipelineParallelLayerLayout,
    )

    letter = {"embedding": "E", "decoder": "t", "mtp": "m", "loss": "L"}
    theirs = PipelineParallelLayerLayout.parse_str_to_list(text)
    assert parse_layout(text) == ["".join(letter[n.name] for n in stage) for stage in theirs]
