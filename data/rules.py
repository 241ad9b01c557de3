"""What the end of a document does to positions, attention and loss."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rules:
    """What the loader makes of document ends."""

    eod: int
    reset_position_ids: bool = False
    """Positions start at 0 again after each document."""
    reset_attention_mask: bool = False
    """Batches carry document ids, so that attention stays inside a document."""
    eod_mask_loss: bool = False
    """No loss where the input is eod."""
