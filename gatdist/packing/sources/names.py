"""Names of files in folders and archives, whoever wrote them: Windows, macOS, a NAS, a phone."""

from __future__ import annotations

import re
import unicodedata

# What systems and tools leave among a user's files, in lower case.
_OF_A_SYSTEM = {
    # Windows
    *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "$recycle.bin", "recycler"),
    *("system volume information",),
    # macOS
    *("__macosx", "icon\r", "network trash folder", "temporary items"),
    # NAS: Synology, QNAP, NetApp
    *("@eadir", "@tmp", "@synoeastream", "#recycle", "#snapshot", "@recycle", "@recently-snapshot"),
    # Linux
    "lost+found",
}
_DRIVE = re.compile(r"^[A-Za-z]:/")


def system_file(name: str) -> str:
    """Why a file is not the user's own, but an operating system's or a tool's; "" where it is."""
    for part in name.replace("\\", "/").split("/"):
        if part.lower() in _OF_A_SYSTEM:
            return f"belongs to the operating system ({part.strip()})"
        if part.startswith(".") and part not in (".", ".."):
            return f"is hidden ({part})"
    return ""


def plain_path(name: str) -> str:
    """A path as the rest of packing expects it, for matching and for folders that are classes.

    Separators are ``/``, also where Windows wrote others, with no drive, no ``.`` and no ``/`` at
    the begin. Letters with accents are in one form (NFC): macOS writes another one.
    """
    path = _DRIVE.sub("", name.replace("\\", "/"))
    parts = [part for part in path.split("/") if part not in ("", ".")]
    return unicodedata.normalize("NFC", "/".join(parts))
