"""The version, and the systems that qlora runs on."""

import sys

__version__ = "0.2.0"

SYSTEMS = {"linux": "Linux", "darwin": "macOS"}


def unsupported_reason() -> str | None:
    """Return why qlora can't run on this system, or None if it can: runs need POSIX signals and folders that sync."""
    if sys.platform in SYSTEMS:
        return None
    return f"qlora runs on {' and '.join(SYSTEMS.values())}, not on {sys.platform}; on Windows, install it in WSL 2."
