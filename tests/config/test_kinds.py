"""How words become values."""

from __future__ import annotations

import pytest

from megatron_ext.config import spellings
from megatron_ext.config.flags import section_fields
from megatron_ext.config.kinds import Kind, kind_of, pair, pattern, real_number, whole_number
from megatron_ext.config.mcore_fields import (
    ddp_fields,
    mla_fields,
    optimizer_fields,
    transformer_fields,
)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("[0,1,1]", [0, 1, 1]),
        ("([0]*3+[1]*58)", [0] * 3 + [1] * 58),
        ("([1]*3+[0]*1)*2", [1, 1, 1, 0] * 2),
        ("2*[0] + [1]", [0, 0, 1]),
    ],
)
def test_patterns(text, value):
    assert pattern(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "a", "[0", "[0.5]", "exit()", "[0]*10**9", "[[0]]", "[0]*999999999", "True", "-[1]"],
)
def test_hostile_patterns_are_refused(text):
    with pytest.raises(ValueError, match="pattern"):
        pattern(text)


def test_numbers():
    assert [whole_number(w) for w in ("5", "1e3", "-2", "1_000")] == [5, 1000, -2, 1000]
    assert real_number("1e-5") == 1e-5
    assert pair("(128,0)") == pair("128,0") == (128, 0)
    for reader, word in ((whole_number, "1.5"), (whole_number, "inf"), (real_number, "nan")):
        with pytest.raises(ValueError, match="must be"):
            reader(word)


def test_annotations():
    assert kind_of("Optional[int]") == Kind("int", optional=True)
    assert kind_of("str | None") == Kind("str", optional=True)
    assert kind_of("Literal['a', 'b']") == Kind("str", choices=("a", "b"))
    assert kind_of("Union[float, List[float]]") == Kind("float", "fold")
    assert kind_of("AttnBackend").choices == ("flash", "fused", "unfused", "local", "auto")
    assert kind_of("Optional[Callable]") is None
    assert Kind("float", "fold").convert(["1"]) == 1.0
    assert Kind("float", "fold").convert(["1", "2"]) == [1.0, 2.0]


def test_every_spelling_names_a_field_of_the_installed_megatron_core():
    known = {**transformer_fields(), **mla_fields(), **optimizer_fields(), **ddp_fields()}
    tables = (spellings.ALIASES, spellings.DEFAULTS, spellings.HELP, spellings.CHOICES)
    for table in (*tables, spellings.OPTIONAL, spellings.NOT_FLAGS, spellings.SAME_FLAG):
        assert not set(table) - set(known)


def test_docstrings_and_metadata_are_read():
    fields = transformer_fields()
    assert fields["layernorm_epsilon"].meta["arg_names"] == ["--norm-epsilon"]
    assert fields["num_layers"].meta["default"] is None
    assert fields["hidden_size"].help == "Transformer hidden size."
    assert optimizer_fields()["initial_loss_scale"].default == 2**32
    assert sum(len(f) for f in section_fields().values()) > 350
