"""A YAML file is argv from a file: the same flags, parser and errors.

    tensor-model-parallel-size: 2      -> --tensor-model-parallel-size 2
    swiglu: true                       -> --swiglu
    bf16: false                        -> --no-bf16
    data-path: [0.7, code, 0.3, text]  -> --data-path 0.7 code 0.3 text
    moe: {num-experts: 8}              -> --num-experts 8   (one level of sections, for the eye)
    lr: null                           -> --lr null: the default, whatever an earlier file says

Keys are flag names with ``-`` or ``_``.  What ``--print-config yaml`` prints can be read back.
"""

from __future__ import annotations

from megatron_ext.config.argv import NO, UNSET, YES, nearest, spellings_table
from megatron_ext.config.flags import GENERATED, OURS
from megatron_ext.config.text_file import read_text
from megatron_ext.errors import ConfigError, Violation

MOST_NODES = 100_000
"""Values that a file may stand for once its aliases are written out."""
SECTIONS = frozenset({*OURS, *GENERATED, "megatron_only"})


def words_of_file(path: str) -> tuple[list[str], list[Violation]]:
    """The words that the file stands for, and its unknown keys and unusable values.

    Raises:
        ConfigError: the file is missing or is not YAML.
    """
    mapping = _load(path)
    pairs: list[tuple[str, object]] = []
    for key, value in mapping.items():
        if isinstance(value, dict) and key in SECTIONS:
            pairs += value.items()
        else:
            pairs.append((key, value))
    words: list[str] = []
    violations: list[Violation] = []
    for key, value in pairs:
        try:
            words += _words(str(key), value)
        except ValueError as error:
            rule, _, use = str(error).partition(" | ")
            violations.append(Violation(f"{path}: {key}", None, rule, use))
    return words, violations


def _load(path: str) -> dict:
    import yaml

    try:
        text = read_text(path)
    except ValueError as error:
        raise ConfigError(f"--config: {error}", do="give a YAML file", path=path) from None
    try:
        mapping = yaml.load(text, Loader=_strict_loader())
    except RecursionError:
        raise ConfigError("--config: nested too deep", do="write key: value", path=path) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--config: not YAML: {error}", do="fix the file", path=path) from None
    if mapping is None:
        return {}
    if not isinstance(mapping, dict):
        raise ConfigError("--config: must be a mapping of flags", do="write key: value", path=path)
    return mapping


def _strict_loader() -> type:
    """A safe loader that refuses a key given twice instead of keeping the last one silently, and
    aliases of aliases that stand for more than `MOST_NODES` values.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
            if not hasattr(self, "sizes"):
                self.sizes: dict[int, int] = {}
            node = super().compose_node(parent, index)
            if id(node) not in self.sizes:
                self.sizes[id(node)] = 1 + sum(map(self._size, _children(node)))
            if self._size(node) > MOST_NODES:
                message = f"its aliases stand for more than {MOST_NODES} values"
                raise yaml.composer.ComposerError(None, None, message, node.start_mark)
            return node

        def _size(self, node: yaml.Node) -> int:
            return self.sizes.get(id(node), MOST_NODES)  # unknown: it is inside itself

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
        keys = [loader.construct_object(k) for k, _ in node.value]
        twice = sorted({str(k) for k in keys if keys.count(k) > 1})
        if twice:
            message = f"the key {twice[0]} is given twice"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
        loader.flatten_mapping(node)
        return {
            loader.construct_object(k, deep=True): loader.construct_object(v, deep=True)
            for k, v in node.value
        }

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    return Loader


def _children(node) -> list:
    """The nodes of a sequence, the keys and values of a mapping, nothing of a scalar."""
    if not isinstance(node.value, list):
        return []
    return [n for item in node.value for n in (item if isinstance(item, tuple) else (item,))]


def _words(key: str, value: object) -> list[str]:
    """The words of one pair.  ValueError carries ``rule | way out``."""
    name = "--" + key.replace("_", "-").removeprefix("--")
    flag = spellings_table().get(name)
    if flag is None or flag.section == "program":
        close = nearest(name, spellings_table())
        raise ValueError(f"is not a flag | use {close[2:] if close else 'a flag of --help'}")
    if value is None or value == []:
        return [f"{name}={UNSET}"]
    if flag.kind.base == "bool":
        return [_bool_word(name, flag.names, flag.negatives, value)]
    if isinstance(value, bool | dict):
        raise ValueError(f"needs a value, not {value} | write {key}: VALUE")
    if isinstance(value, list) and flag.kind.many is None:
        if flag.kind.base not in ("pattern", "pair"):
            raise ValueError(f"takes one value, not {len(value)} | write {key}: VALUE")
        return [f"{name}={value}"]
    if isinstance(value, list):
        return [name, *(str(v) for v in value)]
    return [name, str(value)] if flag.kind.many else [f"{name}={value}"]


def _bool_word(name: str, names: tuple, negatives: tuple, value: object) -> str:
    if not isinstance(value, bool):
        text = str(value).lower()
        meant = {**dict.fromkeys(YES, "true"), **dict.fromkeys(NO, "false")}.get(text)
        use = "true or false"
        if meant:
            on = (meant == "true") == (name in names)
            use = f"{meant}, without quotes ({(names if on else negatives)[0]})"
        raise ValueError(f"is a switch, not {value!r} | write {use}")
    if value:
        return name
    return negatives[0] if name in names else names[0]
