"""A config.json as it is read: keys that were used, that are missing, that must have one value."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_ext.errors import DataError

CONFIG = "config.json"
WITHOUT_EFFECT = frozenset(
    """architectures auto_map model_type transformers_version torch_dtype dtype use_cache
    pad_token_id bos_token_id eos_token_id initializer_range output_router_logits pretraining_tp
    rope_theta rope_scaling rope_parameters _name_or_path ep_size aux_loss_alpha seq_aux
    num_nextn_predict_layers initial_context_length max_window_layers experts_per_token sep_token_id
    decoder_start_token_id qk_head_dim layer_types sliding_window use_sliding_window norm_topk_prob
    topk_method n_group topk_group tie_word_embeddings rope_interleave num_key_value_heads head_dim
    """.split()
)
"""Keys that change no number of the forward pass, or that belong to what an architecture reads in
one of its ways only."""


class Source:
    """config.json of a folder, remembering what was read.

    Raises DataError (65) with the folder and the key where something is missing or not supported.
    """

    def __init__(self, values: dict[str, Any], path: Path) -> None:
        self.values = values
        self.path = path
        self._read: set[str] = set()

    @classmethod
    def of_folder(cls, folder: Path) -> Source:
        """Reads and checks config.json."""
        path = folder / CONFIG
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(
                "--model: no config.json", do="name a Hugging Face model folder", path=folder
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"config.json cannot be read: {error}", path=path) from error
        if not isinstance(values, dict):
            raise DataError("config.json is not an object", path=path)
        return cls(values, path)

    def need(self, key: str, *others: str) -> Any:
        """The value of a key (or of another spelling) that must be there."""
        for name in (key, *others):
            self._read.add(name)
            if self.values.get(name) is not None:
                return self.values[name]
        raise DataError(f"config.json has no {key}", do="use a complete folder", path=self.path)

    def get(self, key: str, default: Any) -> Any:
        """The value, or transformers' default where the file leaves it out."""
        self._read.add(key)
        value = self.values.get(key, default)
        return default if value is None else value

    def fixed(self, **wanted: Any) -> None:
        """Each key is absent, null or has the only value that our model computes."""
        for key, value in wanted.items():
            found = self.get(key, value)
            if found != value:
                self.refuse(f"{key} = {found!r}", f"only {value!r} is supported")

    def refuse(self, what: str, why: str) -> None:
        """Raises the error of a model that ours cannot express."""
        raise DataError(
            f"config.json: {what} cannot be imported: {why}",
            do="this model has no equal here (docs/huggingface.md lists what is supported)",
            path=self.path,
        )

    def unread(self) -> list[str]:
        """Keys that nothing here understands: they may change what the model computes."""
        return sorted(set(self.values) - self._read - WITHOUT_EFFECT)
