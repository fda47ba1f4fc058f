"""Damage to valid values, bytes and files."""

import gzip
import json
from pathlib import Path
from random import Random
from typing import Any

ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf"),
    "", "x", "../x", "/etc/passwd", "a/b", "\ud800", "\0", "{{ x }}", "9" * 5000, "a" * 3000, [], {}, [[]], [None],
    {"x": 1}, [{}], "https://user:password@host/x", "*", "(", "model.safetensors",
]  # fmt: skip
ODD_BYTES = [
    b"", b"\0", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n", b'"', b"{", b"}", b"[", b"]", b",", b":",
    b"\\ud83d", b"NaN", b"1e999", b"-", b"&a ", b"*a ", b"!!python/object ", b"<<: ", b"? ", b"9" * 5000, b"[" * 3000,
    b"\x1f\x8b", b"PAR1", b"{% for x in ", b"%}", b"{{ ", b" }}", b"\x80" * 8, b"\xff" * 8,
]  # fmt: skip


def altered_value(rng: Random, value: Any) -> Any:
    """Return JSON values with one replaced by an odd one, one doubled, or one removed."""
    if not isinstance(value, dict | list) or not value or rng.random() < 0.15:
        return rng.choice(ODD_VALUES)
    if isinstance(value, dict):
        key = rng.choice(sorted(value))
        if rng.random() < 0.15:
            return {name: each for name, each in value.items() if name != key}
        other = rng.choice([key, key, key, "x", *ODD_VALUES[16:22]])
        return value | {other: altered_value(rng, value[key])}
    place = rng.randrange(len(value))
    kind = rng.random()
    middle = [] if kind < 0.15 else [value[place]] * 2 if kind < 0.3 else [altered_value(rng, value[place])]
    return [*value[:place], *middle, *value[place + 1 :]]


def altered_bytes(rng: Random, content: bytes) -> bytes:
    """Return bytes with some changed, doubled or removed, or odd ones inserted."""
    for _ in range(rng.randrange(1, 4)):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.choice([0, 1, 1, 2, 8, 64]))
        middle = rng.choice([b"", content[start:end] * 2, rng.randbytes(end - start), rng.choice(ODD_BYTES)])
        content = content[:start] + middle + (b"" if rng.random() < 0.05 else content[end:])
    return content


def altered_file(rng: Random, name: str, content: bytes) -> bytes:
    """Return a file with its values altered if its format is known, or its bytes."""
    kind = rng.random()
    if kind < 0.3:
        return altered_bytes(rng, content)
    if name.endswith(".safetensors"):
        length = 8 + int.from_bytes(content[:8], "little")
        header = dumped(rng, content[8:length])
        return len(header).to_bytes(8, "little") + header + content[length:]
    if name.endswith(".json"):
        return dumped(rng, content)
    if name.endswith(".jsonl"):
        lines = content.splitlines()
        place = rng.randrange(len(lines))
        lines[place] = dumped(rng, lines[place])
        return b"\n".join(lines)
    if name.endswith(".gz") and kind < 0.7:
        return gzip.compress(altered_bytes(rng, gzip.decompress(content)), mtime=0)
    return altered_bytes(rng, content)


def dumped(rng: Random, content: bytes) -> bytes:
    """Return JSON with some of its values altered."""
    value = json.loads(content)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        value = altered_value(rng, value)
    return json.dumps(value).encode()


def write_files(rng: Random, folder: Path, files: dict[str, bytes], others: tuple[str, ...] = ()) -> Path:
    """Write files of which one is altered or absent; `others` are always valid."""
    chosen = rng.choice([name for name in sorted(files) if name not in others])
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name != chosen:
            path.write_bytes(content)
        elif rng.random() < 0.97:
            path.write_bytes(altered_file(rng, name, content))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files in a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
