"""What all decoders raise."""

from __future__ import annotations


class CodecError(ValueError):
    """A file can't be decoded, or holds something else than expected.

    Args:
        problem: what is wrong, to be put after "sample 000042.png".
        hint: what to do about it.
    """

    def __init__(
        self, problem: str, hint: str = "Restore the shard from a copy, or pack again"
    ) -> None:
        super().__init__(problem)
        self.hint = hint
