"""Text data: what is read, how it is split, which bytes a step sees."""

from __future__ import annotations

import numpy as np
import pytest

from mhc_layers.training.data import ByteWindows, evaluation_windows, is_held_out, load_corpus, standard_library_files
from mhc_layers.training.errors import DataError


@pytest.fixture
def folder(tmp_path):
    for index in range(40):
        path = tmp_path / f"part{index % 4}" / f"file{index}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"document {index} " * (index + 3), encoding="utf-8")
    return tmp_path


def test_standard_library_has_no_tests_and_is_stable():
    root, files = standard_library_files()
    relative = [path.relative_to(root).as_posix() for path in files]
    assert len(relative) > 100 and relative == sorted(relative, key=lambda name: name.split("/"))
    assert not any({"test", "tests", "site-packages", "idle_test"} & set(name.split("/")) for name in relative)
    assert all(name.endswith(".py") for name in relative)


def test_corpus_of_a_folder_holds_every_byte_once(folder):
    corpus = load_corpus(folder, held_out=0.25, min_bytes=10)
    texts = [path.read_bytes() for path in folder.rglob("*.txt")]
    joined = corpus.train.tobytes() + corpus.held_out.tobytes()
    assert corpus.record.split == "files"
    assert 0 < corpus.record.num_held_out_files < 40
    assert len(joined) == sum(map(len, texts)) + len(texts)
    assert sorted(part for part in joined.split(b"\0") if part) == sorted(texts)


def test_split_of_a_file_does_not_depend_on_other_files(folder):
    before = load_corpus(folder, held_out=0.25, min_bytes=10)
    (folder / "aaa.txt").write_text("one more document " * 9, encoding="utf-8")
    after = load_corpus(folder, held_out=0.25, min_bytes=10)
    held = {part for part in before.held_out.tobytes().split(b"\0") if part}
    assert held <= set(after.held_out.tobytes().split(b"\0"))
    assert before.record.sha256 != after.record.sha256


def test_hash_changes_with_content_and_name(folder):
    first = load_corpus(folder, min_bytes=10).record.sha256
    assert load_corpus(folder, min_bytes=10).record.sha256 == first
    path = folder / "part0" / "file0.txt"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"0", b"1"))
    assert load_corpus(folder, min_bytes=10).record.sha256 != first
    path.write_bytes(content)
    path.rename(folder / "part0" / "renamed.txt")
    assert load_corpus(folder, min_bytes=10).record.sha256 != first


def test_held_out_share_is_close_to_the_fraction():
    share = np.mean([is_held_out(f"folder/file{index}.py", 0.05) for index in range(4000)])
    assert 0.035 < share < 0.065


def test_binary_hidden_and_linked_files_are_left_out(folder):
    (folder / "image.bin").write_bytes(b"abc\0def" * 20)
    (folder / ".hidden.txt").write_text("hidden", encoding="utf-8")
    (folder / "link.txt").symlink_to(folder / "part0" / "file0.txt")
    record = load_corpus(folder, min_bytes=10).record
    assert (record.num_files, record.num_skipped_files) == (40, 1)


def test_single_file_is_split_at_its_tail(tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(bytes(range(1, 201)) * 5)
    corpus = load_corpus(path, held_out=0.1, min_bytes=20)
    assert corpus.record.split == "tail" and corpus.record.source == "book.txt"
    assert len(corpus.held_out) == pytest.approx(100, abs=2)
    joined = np.concatenate([corpus.train, corpus.held_out]).tobytes()
    assert joined == b"\0" + path.read_bytes()


def test_suffixes_choose_files(folder):
    (folder / "notes.md").write_text("markdown " * 50, encoding="utf-8")
    assert load_corpus(folder, suffixes=(".md",), min_bytes=10).record.num_files == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: p / "missing", "neither a file nor a folder"),
        (lambda p: p, "holds no files"),
        (lambda p: _written(p / "short.txt", "short"), "too little text"),
    ],
)
def test_unusable_data_says_why(tmp_path, make, message):
    with pytest.raises(DataError, match=message):
        load_corpus(make(tmp_path), min_bytes=65)


def test_each_epoch_visits_each_window_once():
    data = np.arange(20_000) % 251
    windows = ByteWindows(data.astype(np.uint8), seq_len=16, batch_size=3, seed=7)
    per_epoch = windows.num_windows
    for epoch in range(2):
        starts = []
        for index in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            step, row = divmod(index, 3)
            starts.append(windows.batch(step)[row])
        joined = np.stack(starts)
        assert len(joined) == per_epoch
        assert len({row.tobytes() for row in np.stack(starts)}) > 0.2 * per_epoch
    assert windows.epochs(per_epoch) == pytest.approx(3.0)


def test_batches_are_a_function_of_seed_and_step():
    data = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8)
    first = ByteWindows(data, seq_len=32, batch_size=4, seed=1)
    steps = [first.batch(step) for step in range(100)]
    again = ByteWindows(data, seq_len=32, batch_size=4, seed=1)
    np.testing.assert_array_equal(again.batch(63), steps[63])
    np.testing.assert_array_equal(again.batch(2), steps[2])
    other = ByteWindows(data, seq_len=32, batch_size=4, seed=2)
    assert not np.array_equal(other.batch(0), steps[0])
    halves = [first.batch(5, slice(0, 2)), first.batch(5, slice(2, 4))]
    np.testing.assert_array_equal(np.concatenate(halves), steps[5])


@pytest.mark.parametrize("size", [9, 10, 17, 25])
def test_windows_fit_any_size_of_text(size):
    data = np.arange(size, dtype=np.uint8)
    windows = ByteWindows(data, seq_len=8, batch_size=2, seed=0)
    for step in range(20):
        batch = windows.batch(step)
        assert batch.shape == (2, 9)
        assert (np.diff(batch.astype(int), axis=1) == 1).all()


def test_windows_of_a_short_text_are_refused():
    with pytest.raises(DataError, match="need 9"):
        ByteWindows(np.zeros(8, np.uint8), seq_len=8, batch_size=1, seed=0)


def test_evaluation_windows_cover_the_text_without_overlap():
    data = np.arange(101, dtype=np.uint8)
    windows = evaluation_windows(data, seq_len=10)
    np.testing.assert_array_equal(windows[:, 1:].ravel(), data[1:])
    assert len(evaluation_windows(data, seq_len=10, max_bytes=35)) == 3
    with pytest.raises(DataError, match="one window needs"):
        evaluation_windows(data[:5], seq_len=10)


def _written(path, text):
    path.write_text(text, encoding="utf-8")
    return path
