"""Encoders and decoders of sample files. They take bytes, never a path."""


class CodecError(ValueError):
    """A file can't be decoded. ``problem`` follows "sample 000042.png" in messages."""

    def __init__(
        self, problem: str, hint: str = "Restore the shard from a copy, or pack again"
    ) -> None:
        super().__init__(problem)
        self.hint = hint
