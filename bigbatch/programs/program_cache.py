"""Keeps compiled programs on disk between starts, and makes sure that their files are complete.

JAX writes an entry of its compilation cache in place and never replaces one, so an entry that a
kill cut short would fail to load at every later start. Here each complete entry gets a seal, a file
beside it with its checksum. The next start removes entries without a seal, or with another
checksum, and compiles their programs again.
"""

import hashlib
import os
from pathlib import Path

import jax

from bigbatch.job.jax_private import decompress_executable
from bigbatch.mistake import Mistake

ENTRIES = "*-cache"
SEAL = ".whole"


def keep(folder: str) -> None:
    """Makes JAX keep compiled programs in `folder`, after removing its incomplete entries.

    Another process may use the folder at the same time. Entries that it has not sealed yet may be
    removed too, which does not disturb it; their programs are compiled again at the next start.

    Raises:
        Mistake: if the folder cannot be created or written.
    """
    path = Path(os.path.expanduser(folder))
    try:
        path.mkdir(parents=True, exist_ok=True)
        for entry in path.glob(ENTRIES):
            seal = entry.with_name(entry.name + SEAL)
            if not seal.exists() or seal.read_text(encoding="utf-8") != _digest(entry):
                entry.unlink(missing_ok=True)
                seal.unlink(missing_ok=True)
    except OSError as error:
        raise Mistake(
            f"the folder for compiled programs {path} cannot be used: {error.strerror}; give "
            "--compilation_cache a folder that can be written, or leave it empty for none."
        ) from None
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def seal() -> None:
    """Seals all complete entries. Raises nothing, as training can do without the cache."""
    folder = jax.config.jax_compilation_cache_dir
    if not folder:
        return
    for entry in Path(folder).glob(ENTRIES):
        sealed = entry.with_name(entry.name + SEAL)
        try:
            if sealed.exists():
                continue
            content = entry.read_bytes()
            decompress_executable(content)  # raises if the entry is incomplete
            sealed.write_text(hashlib.sha256(content).hexdigest(), encoding="utf-8")
        except Exception:  # OSError, or an error of the decompressor in use
            continue


def _digest(entry: Path) -> str:
    return hashlib.sha256(entry.read_bytes()).hexdigest()
