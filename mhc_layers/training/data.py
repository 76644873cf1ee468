"""Byte-level text data: where it comes from, how it is split, and which bytes a step sees.

A token is a byte, so the cross-entropy in bits is bits per byte. Documents are joined by one NUL byte, which does not
occur in text and therefore tells the model where a document starts. Which windows step ``s`` reads is a function of
``(seed, s)`` alone: nothing has to be saved to resume a run, and the batch does not depend on the number of processes.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mhc_layers.training.errors import DataError

__all__ = [
    "SEPARATOR",
    "ByteWindows",
    "Corpus",
    "CorpusRecord",
    "evaluation_windows",
    "is_held_out",
    "load_corpus",
    "standard_library_files",
]

SEPARATOR = 0
"""The byte between two documents."""

_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
_SNIFFED_BYTES = 8192


@dataclass(frozen=True, kw_only=True)
class CorpusRecord:
    """What a run trained on, so that anyone can tell whether two runs saw the same bytes.

    Attributes
    ----------
    source : str
        ``"python-standard-library"`` or the name of the file or folder that was given.
    sha256 : str
        Hash over the relative path, the length and the content of every file, in sorted order.
    split : str
        ``"files"``: whole files are held out by a hash of their relative path. ``"tail"``: there were too few files
        for that and the end of the text is held out.
    num_files, num_held_out_files, num_skipped_files : int
        Files used, files among them that are held out (0 for ``"tail"``), and files left out because they hold NUL
        bytes (not text).
    train_bytes, held_out_bytes : int
        Sizes of the two parts, separators included.
    """

    source: str
    sha256: str
    split: str
    num_files: int
    num_held_out_files: int
    num_skipped_files: int
    train_bytes: int
    held_out_bytes: int


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Training and held-out bytes (two 1-D ``uint8`` arrays) with the record of their origin."""

    train: np.ndarray
    held_out: np.ndarray
    record: CorpusRecord


def standard_library_files() -> tuple[Path, list[Path]]:
    """Find the source of the running Python's standard library, without its tests.

    Returns
    -------
    root : pathlib.Path
        The folder that holds the library.
    files : list of pathlib.Path
        Its ``.py`` files in sorted order.

    Raises
    ------
    DataError
        If this Python has no library source on disk (some frozen builds).

    Examples
    --------
    >>> from mhc_layers.training.data import standard_library_files
    >>> root, files = standard_library_files()
    >>> "dataclasses.py" in {path.name for path in files}
    True
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [path for path in _walk(root) if path.suffix == ".py"]
    if not files:
        raise DataError(
            f"no Python source was found in the standard library folder {root}; give a text file or folder with --data"
        )
    return root, files


def is_held_out(relative_path: str, fraction: float) -> bool:
    """Say whether the file of this relative path is held out; the answer never depends on other files.

    Parameters
    ----------
    relative_path : str
        Path below the corpus folder, with ``/`` between its parts.
    fraction : float
        Expected share of held-out files, between 0 and 1.

    Returns
    -------
    bool
        True for about ``fraction`` of all paths.

    Examples
    --------
    >>> from mhc_layers.training.data import is_held_out
    >>> is_held_out("json/decoder.py", 0.0), is_held_out("json/decoder.py", 1.0)
    (False, True)
    """
    digest = hashlib.sha256(relative_path.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def load_corpus(
    path: Path | None = None, *, held_out: float = 0.05, suffixes: tuple[str, ...] = (), min_bytes: int = 2
) -> Corpus:
    """Read a file, a folder or, by default, the Python standard library as training and held-out bytes.

    Parameters
    ----------
    path : pathlib.Path, optional
        A file or folder. ``None`` takes the source of the running Python's standard library.
    held_out : float
        Share of files (or, where there are too few files, of the text's end) that is kept for validation.
    suffixes : tuple of str
        In a folder, use only files that end so, such as ``(".md", ".txt")``; empty means every text file.
    min_bytes : int
        The least size of each part; one training sequence and its next byte.

    Returns
    -------
    Corpus
        The two parts and the record with the hash of the content.

    Raises
    ------
    DataError
        If nothing readable is found or a part has fewer than ``min_bytes`` bytes.
    """
    if not 0.0 < held_out < 1.0:
        raise DataError(f"held_out is {held_out}; it is a share between 0 and 1 (exclusive), such as 0.05")
    root, files, source = _find_files(path, suffixes)
    digest = hashlib.sha256()
    train: list[bytes] = []
    valid: list[bytes] = []
    num_skipped = num_valid = 0
    for file in files:
        relative = file.relative_to(root).as_posix()
        try:
            content = file.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror}; remove it or give another --data path") from error
        if not content:
            continue
        if b"\0" in content[:_SNIFFED_BYTES]:
            num_skipped += 1
            continue
        header = f"{relative}\n{len(content)}\n".encode("utf-8", "surrogateescape")
        digest.update(header)
        digest.update(content)
        held = is_held_out(relative, held_out)
        num_valid += held
        (valid if held else train).append(content)
    split = "files"
    parts = [_join(train), _join(valid)]
    if min(len(parts[0]), len(parts[1])) < min_bytes:
        split, num_valid = "tail", 0
        whole = np.concatenate(parts)
        cut = min(int(len(whole) * (1.0 - held_out)), len(whole) - min_bytes)
        parts = [whole[: max(cut, 0)], whole[max(cut, 0) :]]
    if min(len(parts[0]), len(parts[1])) < min_bytes:
        raise DataError(
            f"too little text in {source}: {sum(map(len, parts))} bytes in {len(files)} files, {num_skipped} of them "
            f"not text; training and validation need at least {min_bytes} bytes each. Give more text or a smaller "
            "--data.seq-len"
        )
    record = CorpusRecord(
        source=source,
        sha256=digest.hexdigest(),
        split=split,
        num_files=len(train) + len(valid),
        num_held_out_files=num_valid,
        num_skipped_files=num_skipped,
        train_bytes=len(parts[0]),
        held_out_bytes=len(parts[1]),
    )
    return Corpus(train=parts[0], held_out=parts[1], record=record)


class ByteWindows:
    """Which windows of the training bytes each step reads.

    Every epoch cuts the text into windows of ``seq_len`` bytes at a random phase and visits them in a random order,
    each once. Epoch ``e`` is drawn from a counter-based generator keyed by ``(seed, e)``.

    Parameters
    ----------
    data : numpy.ndarray
        1-D ``uint8`` array of at least ``seq_len + 1`` bytes.
    seq_len : int
        Bytes of context of one sequence.
    batch_size : int
        Sequences of one step, over all processes.
    seed : int
        Seed of the order.

    Raises
    ------
    DataError
        If there are fewer than ``seq_len + 1`` bytes.

    Examples
    --------
    >>> import numpy as np
    >>> from mhc_layers.training.data import ByteWindows
    >>> windows = ByteWindows(np.arange(100, dtype=np.uint8), seq_len=8, batch_size=2, seed=0)
    >>> tokens = windows.batch(3)
    >>> tokens.shape, bool((tokens[:, 1:] == tokens[:, :-1] + 1).all())
    ((2, 9), True)
    """

    def __init__(self, data: np.ndarray, *, seq_len: int, batch_size: int, seed: int) -> None:
        if seq_len < 1 or batch_size < 1:
            raise DataError(f"seq_len is {seq_len} and batch_size is {batch_size}; both must be at least 1")
        if len(data) < seq_len + 1:
            raise DataError(
                f"the text has {len(data)} bytes; a sequence of seq_len {seq_len} and its next byte need "
                f"{seq_len + 1}. Give more text or a smaller --data.seq-len"
            )
        self.data = data
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self.num_windows = max(1, (len(data) - 1) // seq_len - 1)
        self._epoch: tuple[int, int, np.ndarray] | None = None

    def batch(self, step: int, rows: slice = slice(None)) -> np.ndarray:
        """Return the windows of one step.

        Parameters
        ----------
        step : int
            Number of the step, from 0.
        rows : slice
            The part of the batch to read (a process's share).

        Returns
        -------
        numpy.ndarray
            ``uint8`` of shape ``(rows, seq_len + 1)``: inputs are ``[:, :-1]``, targets ``[:, 1:]``.
        """
        indices = range(step * self.batch_size, (step + 1) * self.batch_size)[rows]
        return np.stack([self._window(index) for index in indices])

    def epochs(self, step: int) -> float:
        """Return how often the text has been read when ``step`` steps are done."""
        return step * self.batch_size / self.num_windows

    def _window(self, index: int) -> np.ndarray:
        epoch, position = divmod(index, self.num_windows)
        if self._epoch is None or self._epoch[0] != epoch:
            generator = np.random.Generator(np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64)))
            spare = len(self.data) - 1 - self.num_windows * self.seq_len
            phase = int(generator.integers(0, min(spare, self.seq_len) + 1))
            self._epoch = (epoch, phase, generator.permutation(self.num_windows))
        _, phase, order = self._epoch
        start = phase + int(order[position]) * self.seq_len
        return self.data[start : start + self.seq_len + 1]


def evaluation_windows(data: np.ndarray, *, seq_len: int, max_bytes: int | None = None) -> np.ndarray:
    """Cut held-out bytes into windows that overlap by one byte, spread evenly over the text.

    Parameters
    ----------
    data : numpy.ndarray
        1-D ``uint8`` array.
    seq_len : int
        Predicted bytes of a window.
    max_bytes : int, optional
        Upper bound of the number of predicted bytes; all of them by default.

    Returns
    -------
    numpy.ndarray
        ``uint8`` of shape ``(windows, seq_len + 1)``; the same for every call with the same arguments.

    Raises
    ------
    DataError
        If there are fewer than ``seq_len + 1`` bytes.

    Examples
    --------
    >>> import numpy as np
    >>> from mhc_layers.training.data import evaluation_windows
    >>> evaluation_windows(np.arange(100, dtype=np.uint8), seq_len=10, max_bytes=30)[:, 0]
    array([ 0, 40, 80], dtype=uint8)
    """
    total = (len(data) - 1) // seq_len
    if total < 1:
        raise DataError(f"the held-out text has {len(data)} bytes; one window needs {seq_len + 1}")
    count = total if max_bytes is None else max(1, min(total, max_bytes // seq_len))
    starts = np.round(np.linspace(0, total - 1, count)).astype(np.int64) * seq_len
    return np.stack([data[start : start + seq_len + 1] for start in starts])


def _find_files(path: Path | None, suffixes: tuple[str, ...]) -> tuple[Path, list[Path], str]:
    """Return the root, the sorted files below it and the name of the source."""
    if path is None:
        root, files = standard_library_files()
        return root, files, "python-standard-library"
    path = Path(path)
    if path.is_file():
        return path.parent, [path], path.name
    if not path.is_dir():
        raise DataError(f"--data {path} is neither a file nor a folder; give the path of an existing one")
    files = [file for file in _walk(path, skipped=frozenset()) if not suffixes or file.name.endswith(suffixes)]
    if not files:
        wanted = f" ending in {', '.join(suffixes)}" if suffixes else ""
        raise DataError(f"the folder {path} holds no files{wanted}; hidden files and links are not read")
    return path, files, path.resolve().name


def _walk(root: Path, skipped: frozenset[str] = _SKIPPED_FOLDERS) -> Iterator[Path]:
    """Yield the regular files below ``root`` in an order that depends on names alone."""
    for entry in sorted(root.iterdir(), key=lambda path: path.name):
        if entry.is_symlink() or entry.name.startswith("."):
            continue
        if entry.is_dir():
            if entry.name not in skipped:
                yield from _walk(entry, skipped)
        elif entry.is_file():
            yield entry


def _join(documents: Iterable[bytes]) -> np.ndarray:
    """Return the documents as one array, each one preceded by the separator."""
    separator = bytes([SEPARATOR])
    return np.frombuffer(b"".join(separator + document for document in documents), dtype=np.uint8)
