"""Keeps compiled programs on disk between starts, and makes sure that their files are complete.

JAX writes an entry of its compilation cache in place and never replaces one, so an entry that a
kill cut short would fail to load at every later start. Here each complete entry gets a seal, a file
beside it with its checksum. The next start removes entries without a seal, or with another
checksum, and compiles their programs again.
"""

import contextlib
import errno
import hashlib
import os
from pathlib import Path

import jax

from bigbatch.job.jax_private import decompress_executable
from bigbatch.mistake import Mistake
from bigbatch.storage import caches

VARIABLE = "JAX_COMPILATION_CACHE_DIR"  # JAX's own
ENTRIES = "*-cache"
SEAL = ".whole"


def keep(folder: str | None) -> str:
    """Makes JAX keep compiled programs in a folder, after removing its incomplete entries.

    The folder that JAX_COMPILATION_CACHE_DIR names is used as JAX uses it, without seals: entries
    of other programs may be in it.

    Another process may use the folder at the same time. Entries that it has not sealed yet may be
    removed too, which does not disturb it; their programs are compiled again at the next start.
    Entries that this user may not read or remove are left as they are.

    Args:
        folder: the user's choice, "" for none. None without a choice: then it is the one that
            JAX_COMPILATION_CACHE_DIR names, or else `caches.folder()`, and training can do without.

    Returns:
        A line for the user if that folder cannot be used, and nothing is kept; else "".

    Raises:
        Mistake: if the folder that the user chose cannot be created or written.
    """
    asked = os.environ.get(VARIABLE, caches.folder()) if folder is None else folder
    jax.config.update("jax_compilation_cache_dir", None)
    if not asked:
        return ""
    path = Path(os.path.expanduser(asked))
    try:
        if "://" in asked:
            raise OSError(errno.EINVAL, "it is no folder of this machine")
        if str(path).startswith("~"):
            raise FileNotFoundError(errno.ENOENT, "there is no such home folder")
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if not _shared(path):
            _remove_incomplete(path)
    except OSError as error:
        wrong = f"the folder for compiled programs {path} cannot be used: {error.strerror}"
        if folder is None:
            return (f"{wrong}. They are compiled anew at each start; --compilation_cache names "
                    "another folder.")
        raise Mistake(
            f"{wrong}; give --compilation_cache a folder that can be written, or leave it empty "
            "for none."
        ) from None
    jax.config.update("jax_compilation_cache_dir", str(path))
    for name, value in (("jax_persistent_cache_min_compile_time_secs", 0.0),
                        ("jax_persistent_cache_min_entry_size_bytes", -1)):
        if name.upper() not in os.environ:
            jax.config.update(name, value)
    return ""


def _shared(folder: Path) -> bool:
    """Whether JAX_COMPILATION_CACHE_DIR names the folder."""
    named = os.environ.get(VARIABLE)
    return bool(named) and Path(os.path.expanduser(named)) == folder


def _remove_incomplete(folder: Path) -> None:
    """Removes entries without a seal, and those whose checksum is not that of their seal."""
    for entry in folder.glob(ENTRIES):
        seal = entry.with_name(entry.name + SEAL)
        with contextlib.suppress(OSError, ValueError):  # another user's, or gone meanwhile
            if not seal.exists() or seal.read_text(encoding="utf-8") != _digest(entry):
                entry.unlink(missing_ok=True)
                seal.unlink(missing_ok=True)


def seal() -> None:
    """Seals all complete entries. Raises nothing, as training can do without the cache."""
    folder = jax.config.jax_compilation_cache_dir
    if not folder or _shared(Path(folder)):
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
