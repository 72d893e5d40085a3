"""The data path: reading, corrupt input, order and resumption, packing."""

from __future__ import annotations

import base64
import gzip
import json
import lzma
import pickle
import sysconfig
import tracemalloc
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from blt_kernels import data
from blt_kernels.data import Corpus, CorpusError, DocumentStream, PackedBatches, decode, encode, readers, split_corpus

TEXTS = ["first\nline", "zweite Zeile äöü", "第三", "", "four\n" * 50, "\0 is fine in JSON"]
slow_ok = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def json_lines(texts, key="text") -> bytes:
    return b"".join(json.dumps({"id": i, key: text}).encode() + b"\n" for i, text in enumerate(texts))


def compress(raw: bytes, suffix: str) -> bytes:
    if suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        half = len(raw) // 2  # two frames: a reader that stops after the first fails
        return b"".join(zstandard.ZstdCompressor().compress(part) for part in (raw[:half], raw[half:]))
    return {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[suffix](raw)


def write_parquet(path: Path, texts, **options):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"id": list(range(len(texts))), "text": texts})
    pq.write_table(table, path, **options)


def refuse(corpus: Corpus) -> CorpusError:
    with pytest.raises(CorpusError) as caught:
        list(corpus)
    return caught.value


# Tokens


@given(st.binary())
def test_tokens_round_trip(raw):
    tokens = encode(raw)
    assert tokens.dtype == np.int64 and tokens.tolist() == [1, *(byte + 4 for byte in raw), 2]
    assert decode(tokens) == raw
    assert encode(raw, bos=False, eos=False).tolist() == [byte + 4 for byte in raw]


def test_tokens_of_text_and_errors():
    assert encode("é").tolist() == [1, 0xC3 + 4, 0xA9 + 4, 2]
    assert decode([]) == b""
    with pytest.raises(TypeError, match="encode: text: expected str or bytes, got list"):
        encode([1])
    with pytest.raises(ValueError, match="got 260"):
        decode([5, 260])
    with pytest.raises(TypeError, match="float"):
        decode([1.0])


# Reading


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_json_lines(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(b"\n" + json_lines(TEXTS) + b"  \n" + json_lines(["unended"]).rstrip(b"\n"), suffix))
    assert list(Corpus(path)) == [text.encode() for text in [*TEXTS, "unended"] if text]
    assert list(Corpus(path, max_document_bytes=4)) != list(Corpus(path))


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz", ".zst"])
def test_text(tmp_path, suffix):
    path = tmp_path / f"a.txt{suffix}"
    text = "Zeile mit ü\r\n".encode() * 100
    path.write_bytes(compress(text, suffix))
    assert list(Corpus(path)) == [text]
    pieces = list(Corpus(path, max_document_bytes=100))
    assert b"".join(pieces) == text and all(piece.endswith(b"\n") and len(piece) <= 100 for piece in pieces)


@pytest.mark.parametrize("options", [{}, {"row_group_size": 2}, {"use_dictionary": False, "compression": "zstd"}])
def test_parquet(tmp_path, options):
    write_parquet(tmp_path / "a.parquet", TEXTS, **options)
    corpus = Corpus(tmp_path)
    assert list(corpus) == [text.encode() for text in TEXTS if text]
    for cursor, _, _ in list(corpus.read(0)):
        rest = [document for _, documents, _ in corpus.read(0, cursor) for document in documents]
        assert rest == [text.encode() for text in TEXTS[cursor:] if text]


def test_parquet_dictionary_column(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": pa.array(["x", "yy", "x"]).dictionary_encode()}), tmp_path / "a.parquet")
    assert list(Corpus(tmp_path)) == [b"x", b"yy", b"x"]


@slow_ok
@given(text=st.text(max_size=300), limit=st.integers(4, 40), suffix=st.sampled_from([".txt", ".txt.gz", ".jsonl"]))
def test_pieces_join_to_the_document(tmp_path, text, limit, suffix):
    path = tmp_path / f"a{suffix}"
    raw = text.encode()
    if suffix == ".jsonl":
        path.write_bytes(json_lines([text]))
    else:
        raw = raw.replace(b"\0", b"")
        path.write_bytes(compress(raw, path.suffix.removeprefix(".txt")))
    corpus = Corpus(path, max_document_bytes=limit)
    steps = list(corpus.read(0))
    pieces = [piece for _, documents, _ in steps for piece in documents]
    assert b"".join(pieces) == raw
    assert all(0 < len(piece) <= limit for piece in pieces)
    for piece in pieces:
        piece.decode()  # never within a character
    for before, piece in pairwise(pieces):
        first_line = piece[: piece.find(b"\n") + 1] or piece
        assert before.endswith(b"\n") or b"\n" not in before + first_line or len(before + first_line) > limit
    for cursor, _, _ in steps:  # reading can be taken up at each cursor
        rest = [piece for at, documents, _ in corpus.read(0, cursor) for piece in documents]
        assert rest == [piece for at, documents, _ in steps if at > cursor for piece in documents]


def test_directory_order_patterns_and_duplicates(tmp_path):
    for name in ["b.txt", "a/z.md", "a/c.bin", "a/vendor/v.txt", ".hidden.txt", ".git/x.txt", "a/d.py", "vendor/w.txt"]:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    (tmp_path / "link.txt").symlink_to(tmp_path / "b.txt")
    names = lambda *args, **options: [file.name for file in Corpus(*args, **options).files]  # noqa: E731
    assert names(tmp_path) == ["a/vendor/v.txt", "a/z.md", "b.txt", "vendor/w.txt"]
    assert names(tmp_path, exclude="*/vendor/*") == ["a/z.md", "b.txt"]
    assert names(tmp_path, include=["*.py", "/b.*"]) == ["a/d.py", "b.txt"]
    assert names([tmp_path / "a" / "c.bin", tmp_path, tmp_path / "b.txt"])[0] == "c.bin"
    assert len(names([tmp_path, tmp_path / "b.txt", str(tmp_path)])) == 4
    with pytest.raises(CorpusError, match=r"no files in .*include \*\.rs; exclude \*/x"):
        Corpus(tmp_path, include="*.rs", exclude="*/x")
    with pytest.raises(CorpusError, match=r"nowhere: no such file or directory"):
        Corpus(tmp_path / "nowhere")


def test_standard_library(tmp_path):
    patterns = {"include": "*.py", "exclude": ("*/site-packages/*", "test/", "tests/", "idlelib/")}
    corpus = Corpus(sysconfig.get_path("stdlib"), on_error="skip", **patterns)
    assert len(corpus.files) > 200 and not any("site-packages" in file.name for file in corpus.files)
    documents = DocumentStream(corpus, seed=1, buffer_documents=50)
    sample = [next(documents) for _ in range(100)]
    assert sum(b"import " in document for document in sample) > 50
    train, held = split_corpus(corpus, 100_000, seed=1)
    assert sum(map(len, held)) >= 100_000 and len(train.files) > len(held.files)


def test_memory_stays_bounded(tmp_path):
    path = tmp_path / "a.jsonl.xz"
    words = np.random.default_rng(0).integers(0, 1 << 40, 1000)
    with lzma.open(path, "wb", preset=0) as file:
        for i in range(6000):
            file.write(json_lines([" ".join(map(str, np.roll(words, i)[:400]))]))
    text = tmp_path / "b.txt"
    text.write_bytes(b"one long text\n" * 2_000_000)
    tracemalloc.start()
    stream = DocumentStream(Corpus([path, text], max_document_bytes=1 << 16), epochs=1, buffer_bytes=1 << 18)
    total = sum(map(len, stream))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 50 << 20 and peak < 4 << 20


# Corrupt input

GOOD = json_lines(["good one", "good two"])
BAD_LINES = {
    b'{"text": "broken': ("json", "not JSON"),
    b'{"body": "x"}': ("missing_text", r"no key 'text' \(keys: 'body'\)"),
    b"[1]": ("missing_text", "expected a JSON object, got list"),
    b'{"text": null}': ("not_text", "expected a string, got null"),
    b'{"text": "\xff"}': ("utf8", "byte 0xff at column 11"),
    b'{"text": "\\ud800"}': ("utf8", "lone surrogate at character 0"),
    b"[" * 100_000: ("json", "too deeply nested"),
}


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda line: line[:20].decode("latin1"))
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_bad_line(tmp_path, bad, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(compress(GOOD + bad + b"\n" + json_lines(["good three"]), suffix))
    reason, message = BAD_LINES[bad]
    error = refuse(Corpus(path))
    assert (error.reason, error.path, error.line) == (reason, path, 3)
    with pytest.raises(CorpusError, match=f"a.jsonl{suffix}, line 3: .*{message}"):
        raise error
    corpus = Corpus(path, on_error="skip")
    assert list(corpus) == [b"good one", b"good two", b"good three"]
    assert corpus.skipped.counts == {reason: 1} and corpus.skipped.total == 1
    assert corpus.skipped.messages == [str(error)]
    list(corpus)
    assert corpus.skipped.total == 1 and len(corpus.skipped.messages) == 1  # the same record counts once


def test_line_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 200)
    monkeypatch.setattr(readers, "CHUNK_BYTES", 64)
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + json_lines(["x" * 1000, "y" * 100]))
    assert refuse(Corpus(path)).line == 3
    corpus = Corpus(path, on_error="skip")
    assert list(corpus) == [b"good one", b"good two", b"y" * 100]
    assert corpus.skipped.counts == {"too_long": 1}


@pytest.mark.parametrize("kind", [".jsonl", ".txt"])
@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("damage", ["truncated", "not compressed", "flipped"])
def test_damaged_compression(tmp_path, kind, suffix, damage):
    lines = [f"{i} {i * i}" for i in range(30_000)]
    raw = json_lines(lines) if kind == ".jsonl" else "\n".join(lines).encode()
    whole = compress(raw, suffix)
    damaged = {"truncated": whole[: len(whole) * 2 // 3], "not compressed": raw, "flipped": bytearray(whole)}[damage]
    if damage == "flipped":
        damaged[len(damaged) // 2 : len(damaged) // 2 + 64] = bytes(64)
    path = tmp_path / f"a{kind}{suffix}"
    path.write_bytes(damaged)
    other = tmp_path / "b.txt"
    other.write_text("the next file")
    error = refuse(Corpus([path, other], max_document_bytes=1000))
    assert error.path == path and str(error).startswith(str(path))
    if damage != "flipped":  # a flipped block may decode to nonsense before the checksum tells
        assert error.reason == "corrupt"
        assert (error.line is not None) == (kind == ".jsonl")
    if damage == "truncated" and kind == ".jsonl":
        assert error.line > 1000
    corpus = Corpus([path, other], on_error="skip", max_document_bytes=1000)
    documents = list(corpus)
    assert documents[-1] == b"the next file" and corpus.skipped.total >= 1
    if damage == "truncated":
        before = documents[:-1]
        assert len(before) > 100
        assert (
            raw.startswith(b"".join(before)) if kind == ".txt" else before == [x.encode() for x in lines[: len(before)]]
        )


@pytest.mark.parametrize(
    ("bad", "reason", "message"),
    [
        (b"\xff", "utf8", "byte 0xff at offset 2001"),
        (b"\0", "binary", "NUL byte .offset 2001"),
        (b"\xe7\xac", "utf8", "at offset 2001"),  # ends within a character
        (b"\x80" * 500, "utf8", "byte 0x80 at offset 2001"),
    ],
)
def test_bad_text(tmp_path, bad, reason, message):
    path = tmp_path / "a.txt"
    path.write_bytes(b"line\n" * 400 + b"x" + bad)
    error = refuse(Corpus(path, max_document_bytes=100))
    assert error.reason == reason and error.line == 401
    with pytest.raises(CorpusError, match=f"a.txt, line 401: .*{message}"):
        raise error
    corpus = Corpus(path, on_error="skip", max_document_bytes=100)
    assert b"".join(corpus) == b"line\n" * 400
    assert corpus.skipped.counts == {reason: 1}


def test_bad_parquet(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    binary = pa.array([b"fine", None, b"\xff", b"good"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": binary}), path)
    assert refuse(Corpus(path)).row == 1
    corpus = Corpus(path, on_error="skip")
    assert list(corpus) == [b"fine", b"good"]
    assert corpus.skipped.counts == {"missing_text": 1, "utf8": 1}
    assert "a.parquet, row 1: column 'text' is null" in corpus.skipped.messages[0]
    assert "a.parquet, row 2: column 'text': not UTF-8 at byte 0" in corpus.skipped.messages[1]

    assert "no column 'body' (columns: 'text')" in str(refuse(Corpus(path, text_key="body")))
    pq.write_table(pa.table({"text": [1, 2]}), path)
    assert "column 'text': expected strings, got int64" in str(refuse(Corpus(path)))

    write_parquet(path, [f"{i} {i * i}" for i in range(20_000)], row_group_size=1000, compression="none")
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"PAR1 nonsense PAR1"):
        path.write_bytes(damaged)
        assert refuse(Corpus(path)).reason == "corrupt"
    path.write_bytes(whole[:60_000] + bytes(40_000) + whole[100_000:])  # the index is whole, pages are not
    error = refuse(Corpus(path))
    assert error.reason == "corrupt" and error.row > 0


def test_unreadable_and_empty(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("")
    with pytest.raises(CorpusError, match=r"no documents in .*a\.txt \(1 file\)"):
        list(Corpus(path))
    with pytest.raises(CorpusError, match="no documents"):
        next(DocumentStream(Corpus(path)))
    corpus = Corpus(path, on_error="skip")
    path.unlink()
    with pytest.raises(CorpusError, match=r"skipped: 1 unreadable; first: .*a\.txt: cannot be read \(No such file"):
        next(DocumentStream(corpus))
    assert corpus.skipped.counts == {"unreadable": 1}


def test_optional_packages_are_named(tmp_path, monkeypatch):
    for package, name in (("zstandard", "a.jsonl.zst"), ("pyarrow", "a.parquet")):
        path = tmp_path / name
        path.write_bytes(b"x")
        monkeypatch.setitem(__import__("sys").modules, package, None)
        with pytest.raises(
            ImportError, match=rf"reading .*{name}: {package} is missing: pip install 'blt_kernels\[train\]'"
        ):
            list(Corpus(path, on_error="skip"))


def test_errors_survive_pickling(tmp_path):
    (tmp_path / "a.jsonl").write_text("{")
    error = refuse(Corpus(tmp_path))
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) and (again.line, again.reason) == (1, "json")


def test_corpus_arguments(tmp_path):
    for options, error in [
        ({"on_error": "ignore"}, ValueError),
        ({"max_document_bytes": 3}, ValueError),
        ({"max_document_bytes": 1e6}, TypeError),
        ({"text_key": b"text"}, TypeError),
        ({"include": [1]}, TypeError),
        ({"exclude": 1}, TypeError),
        ({"exclude": ""}, ValueError),
        ({"exclude": "/"}, ValueError),
        ({"exclude": "[z-a]"}, ValueError),
    ]:
        with pytest.raises(error, match=f"Corpus: {next(iter(options))}: expected"):
            Corpus(tmp_path, **options)
    for paths in (5, [5], [b"bytes"]):
        with pytest.raises(TypeError, match="Corpus: paths: expected a path"):
            Corpus(paths)


# Order, sharding, resumption


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Corpus:
    """Text and JSON lines with long and empty documents and corrupt records: 5 files."""
    root = tmp_path_factory.mktemp("mixed")
    for i in range(3):
        (root / f"{i}.txt").write_text(f"text {i}\n" * (i * 40))
    lines = [f"{i} " * (i * 7 % 60) for i in range(40)]
    (root / "a.jsonl").write_bytes(json_lines(lines[:25]) + b"{bad\n" + json_lines(lines[25:]))
    (root / "b.jsonl.gz").write_bytes(gzip.compress(json_lines([f"b{i}" for i in range(17)])))
    return Corpus(root, on_error="skip", max_document_bytes=64)


@pytest.fixture(scope="module")
def documents_of_mixed(mixed) -> list[bytes]:
    return list(mixed)


def test_shuffle(mixed, documents_of_mixed):
    def epochs(seed, **options):
        stream = DocumentStream(mixed, seed=seed, epochs=2, buffer_documents=16, **options)
        found = list(stream)
        assert len(found) == 2 * len(documents_of_mixed)
        return found[: len(found) // 2], found[len(found) // 2 :]

    first, second = epochs(7)
    assert sorted(first) == sorted(second) == sorted(documents_of_mixed)
    assert first != second and first != documents_of_mixed
    assert (first, second) == epochs(7) != epochs(8)
    assert epochs(7, shuffle=False) == (documents_of_mixed, documents_of_mixed)


def test_order_never_changes(tmp_path):
    """A golden order: a release that changed it would break everybody's resumption."""
    (tmp_path / "a.jsonl").write_bytes(json_lines("abcdefgh"))
    for name in "xyz":
        (tmp_path / f"{name}.txt").write_text(name)
    stream = DocumentStream(Corpus(tmp_path), seed=3, epochs=2, buffer_documents=4)
    assert b"".join(stream).decode() == "bzacfgdexhyadcbfgehzyx"


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_every_part_of_an_epoch_is_of_all_files(tmp_path, suffix):
    """Files last until the end of the epoch, in proportion to their sizes, though they differ in size by 8."""
    sizes = {"a": 4000, "b": 2000, "c": 1000, "d": 500}
    digits = np.random.default_rng(0).integers(0, 10, (4000, 60)).astype("U1")  # hardly compressible
    for name, size in sizes.items():
        lines = json_lines([name + "".join(row) for row in digits[:size]])
        (tmp_path / f"{name}.jsonl{suffix}").write_bytes(compress(lines, suffix))
    names = "".join(chr(document[0]) for document in DocumentStream(Corpus(tmp_path), seed=2, epochs=1))
    parts = [names[i : i + 750] for i in range(0, 7500, 750)]
    for name, size in sizes.items():
        expected = size / 10
        counts = [part.count(name) for part in parts]
        assert max(abs(count - expected) for count in counts) < 5 * expected**0.5 + 30, (name, counts)


def test_open_files_bound_the_mixture(tmp_path):
    """Two files are open at a time: a third one begins where one of them has ended, and none is left out."""
    for name in "abcde":
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines([name] * 100))
    stream = DocumentStream(Corpus(tmp_path), epochs=1, open_files=2, buffer_documents=1)
    names = b"".join(stream).decode()
    assert sorted(names) == sorted("abcde" * 100)
    spans = [(names.index(name), names.rindex(name)) for name in "abcde"]
    assert max(sum(begin <= at <= end for begin, end in spans) for at in range(500)) == 2


@pytest.mark.parametrize("limit", [9, 64])
def test_documents_are_fetched_by_address(mixed, limit):
    corpus = mixed.with_files(mixed.files, max_document_bytes=limit)
    stream = DocumentStream(corpus, seed=3, epochs=1)
    found = [(stream.address, document) for document in stream]
    assert len(dict(found)) == len(found)
    assert corpus.fetch(address for address, _ in found[::3]) == dict(found[::3])
    address, document = found[0]
    assert corpus.fetch([address._replace(piece=99), address]) == {address: document}


@pytest.mark.parametrize("shuffle", [True, False])
def test_lanes_divide_the_documents(mixed, documents_of_mixed, shuffle):
    lanes = [list(DocumentStream(mixed, epochs=1, shuffle=shuffle, lane=lane, lanes=3)) for lane in range(3)]
    assert sorted(chain(*lanes)) == sorted(documents_of_mixed)
    assert max(map(len, lanes)) - min(map(len, lanes)) <= 1
    if not shuffle:
        assert lanes[1] == documents_of_mixed[1::3]


def test_a_lane_without_documents_is_told(tmp_path):
    (tmp_path / "a.txt").write_text("only one")
    assert next(DocumentStream(Corpus(tmp_path), lane=0, lanes=2)) == b"only one"
    with pytest.raises(CorpusError, match=r"lanes: expected at most 1, the documents of .*, got 2: lane 1 would"):
        next(DocumentStream(Corpus(tmp_path), lane=1, lanes=2))


@slow_ok
@given(
    taken=st.integers(0, 400),
    seed=st.integers(0, 3),
    shuffle=st.booleans(),
    buffer=st.sampled_from([1, 5, 1000]),
    buffer_bytes=st.sampled_from([1, 300, 1 << 20]),
    lanes=st.integers(1, 3),
    open_files=st.integers(1, 6),
)
def test_documents_resume_exactly(mixed, taken, seed, shuffle, buffer, buffer_bytes, lanes, open_files):
    def stream():
        options = {"buffer_documents": buffer, "buffer_bytes": buffer_bytes, "open_files": open_files}
        options |= {"lane": lanes - 1, "lanes": lanes}
        return DocumentStream(mixed, seed=seed, shuffle=shuffle, epochs=2, **options)

    whole, first = list(stream()), stream()
    taken = min(taken, len(whole))
    assert [next(first) for _ in range(taken)] == whole[:taken]
    state = json.loads(json.dumps(first.state_dict()))
    second = stream()
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert list(second) == list(first) == whole[taken:]
    assert len(json.dumps(state)) < 400


def test_state_of_something_else_is_refused(tmp_path, mixed):
    state = DocumentStream(mixed, seed=1).state_dict()
    for name, other in [
        ("seed", DocumentStream(mixed, seed=2)),
        ("lanes", DocumentStream(mixed, seed=1, lanes=2)),
        ("buffer_bytes", DocumentStream(mixed, seed=1, buffer_bytes=1)),
        ("open_files", DocumentStream(mixed, seed=1, open_files=2)),
        ("corpus", DocumentStream(split_corpus(mixed, 10)[0], seed=1)),
    ]:
        with pytest.raises(ValueError, match=f"load_state_dict: {name}: expected"):
            other.load_state_dict(state)
    with pytest.raises(ValueError, match="load_state_dict: version: expected 3, got 2"):
        DocumentStream(mixed, seed=1).load_state_dict({**state, "version": 2})
    with pytest.raises(ValueError, match=r"emitted: expected at most .* the corpus has changed"):
        DocumentStream(mixed, seed=1).load_state_dict({**state, "emitted": 10_000})


def test_a_failed_block_fails_again(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"{\n")
    stream = DocumentStream(Corpus(tmp_path))
    for _ in range(2):
        with pytest.raises(CorpusError, match="line 3"):
            next(stream)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"epochs": 0}, ValueError),
        ({"lane": 2, "lanes": 2}, ValueError),
        ({"buffer_documents": 0}, ValueError),
        ({"open_files": 0}, ValueError),
        ({"seed": "x"}, TypeError),
    ],
)
def test_stream_arguments(mixed, options, error):
    with pytest.raises(error, match=f"DocumentStream: {next(iter(options))}: expected"):
        DocumentStream(mixed, **options)
    with pytest.raises(TypeError, match="corpus: expected a Corpus, got list"):
        DocumentStream([b"x"])


# Held-out part


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("holdout", [1, 300, 2000])
def test_split(mixed, documents_of_mixed, seed, holdout):
    train, held = split_corpus(mixed, holdout, seed=seed)
    size = sum(map(len, held))
    assert size >= holdout and sum(map(len, train)) + size == sum(map(len, documents_of_mixed))
    spans = {file.path: (file.start, file.stop) for file in held.files}
    for file in train.files:  # no file in both, or held out up to where training starts
        assert file.path not in spans or spans[file.path] == (0, file.start)
    assert [f.name for f in split_corpus(mixed, holdout, seed=seed)[1].files] == [f.name for f in held.files]


def test_split_takes_a_share_of_each_file(tmp_path):
    for name, count in [("a", 1000), ("b", 1000), ("c", 2), ("d", 500)]:
        (tmp_path / f"{name}.jsonl").write_bytes(json_lines([f"{name} {i:07d}" for i in range(count)]))
    corpus = Corpus(tmp_path)
    for seed in range(5):
        train, held = split_corpus(corpus, 4000, seed=seed)
        assert sorted([*train, *held]) == sorted(corpus)
        assert 4000 <= sum(map(len, held)) < 4020
        counts = [sum(document[:1] == letter for document in held) for letter in (b"a", b"b", b"c", b"d")]
        assert counts[2] == 2 and min(counts[0], counts[1], counts[3]) >= 100
    assert sum(map(len, split_corpus(corpus, 22_000)[1])) >= 22_000  # all but a little, in several rounds
    with pytest.raises(CorpusError, match="leaves nothing"):
        split_corpus(corpus, 22_518)


def test_split_depends_on_the_seed(mixed):
    assert len({split_corpus(mixed, 1, seed=seed)[1].files[0].name for seed in range(20)}) > 2


def test_split_of_a_corpus_that_has_grown(tmp_path):
    """What was for training before is not held out now, wherever the new files stand in the order."""
    for i in range(40):
        (tmp_path / f"b{i:02}.txt").write_text(f"{i}" * 100)
    before = {file.name for file in split_corpus(Corpus(tmp_path), 900)[1].files}
    for i in range(40):
        (tmp_path / f"{'abc'[i % 3]}-new{i}.txt").write_text(f"{i}" * 100)
    after = {file.name for file in split_corpus(Corpus(tmp_path), 900)[1].files}
    assert {name for name in after if "new" not in name} < before


def test_split_takes_many_short_files_rather_than_a_long_one(tmp_path):
    for i in range(400):
        (tmp_path / f"short{i:03}.txt").write_text("x" * 100)
    for i in range(20):
        (tmp_path / f"long{i:02}.txt").write_text("y" * 5000)
    for seed in range(5):
        held = split_corpus(Corpus(tmp_path), 10_000, seed=seed)[1]
        assert [file.name[:5] for file in held.files] == ["short"] * 100
        held = split_corpus(Corpus(tmp_path), 30_000, seed=seed)[1]  # there are too few short ones for that
        assert {file.name[:4] for file in held.files} == {"shor", "long"}


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.zst", "a.parquet"])
def test_split_of_one_file(tmp_path, name):
    lines = [f"line {i}\n" for i in range(2000)]
    path = tmp_path / name
    if name.endswith("parquet"):
        write_parquet(path, lines, row_group_size=100)
    else:
        raw = "".join(lines).encode() if name == "a.txt" else json_lines(lines)
        path.write_bytes(compress(raw, ".zst" if name.endswith("zst") else ""))
    whole = "".join(lines).encode()
    train, held = split_corpus(Corpus(path), 5000)
    assert b"".join(held) + b"".join(train) == whole
    assert 5000 <= len(b"".join(held)) < 5700
    train, valid = split_corpus(train, 1000)  # a part can be divided again
    assert b"".join(held) + b"".join(valid) + b"".join(train) == whole
    with pytest.raises(CorpusError, match=r"holdout_bytes: .* leaves nothing to train on"):
        split_corpus(Corpus(path), len(whole))
    with pytest.raises(ValueError, match="split_corpus: holdout_bytes: expected at least 1, got 0"):
        split_corpus(Corpus(path), 0)


# Packing


def fixed(size):
    """Patches of BOS alone, then `size` tokens each."""

    def segmenter(tokens):
        full, rest = divmod(len(tokens) - 1, size)
        return [1] + [size] * full + [rest] * (rest > 0)

    return segmenter


def uneven(tokens):
    """Lengths 1 .. 9 that depend on the content."""
    lengths, at = [], 0
    while at < len(tokens):
        lengths.append(min(1 + int(tokens[at]) % 9, len(tokens) - at))
        at += lengths[-1]
    return np.array(lengths, np.int32)


SETTINGS = [
    {"row_tokens": 50, "longest_sequence": 10},
    {"row_tokens": 1, "longest_sequence": 1},
    {"row_tokens": 20, "longest_sequence": 20},
    {"row_tokens": 200, "longest_sequence": 70, "max_sequences": 2},
    {"row_tokens": 64, "longest_sequence": 16, "open_documents": 1},
    {"row_tokens": 60, "longest_sequence": 12, "row_patches": 15, "segmenter": fixed(4), "open_documents": 5},
    {"row_tokens": 60, "longest_sequence": 60, "row_patches": 3, "segmenter": fixed(4)},
    {"row_tokens": 60, "longest_sequence": 20, "row_patches": 18, "segmenter": uneven},
    {"row_tokens": 30, "longest_sequence": 5, "row_patches": 8, "segmenter": uneven},  # patches longer than a sequence
    {"row_tokens": 100, "longest_sequence": 100, "row_patches": 1, "segmenter": lambda tokens: [len(tokens)]},
]


def pieces_of(batch: data.Batch, options: dict) -> list[dict]:
    """What a row holds, read back by its own description, which is checked on the way."""
    N, C, L = options["row_tokens"], options.get("row_patches"), options["longest_sequence"]
    S = batch.cu_seqlens.shape[0] - 1
    assert batch.tokens.shape == batch.targets.shape == (1, N)
    assert [a.dtype for a in (batch.tokens, batch.targets, batch.cu_seqlens)] == [np.int64, np.int64, np.int32]
    cu, used = batch.cu_seqlens, batch.num_tokens
    assert cu[0] == 0 and (np.diff(cu) >= 0).all() and batch.longest_sequence == L
    assert (batch.tokens[0, used:] == 0).all() and (batch.targets[0, used:] == -100).all()
    pieces, patch = [], 0
    for i in range(S):
        a, b = cu[i], cu[i + 1]
        if a == b:
            assert (cu[i:] == used).all()
            break
        piece = {"tokens": batch.tokens[0, a:b].tolist(), "targets": batch.targets[0, a:b].tolist()}
        assert len(piece["tokens"]) <= L
        if C is not None:
            ends = batch.patch_lengths[0].cumsum()
            last = int(np.searchsorted(ends, b))
            assert ends[last] == b  # sequences end with patches
            piece["lengths"] = batch.patch_lengths[0, patch : last + 1].tolist()
            assert len(piece["lengths"]) <= -(-L * C // N)
            patch = last + 1
            assert batch.next_is_start[i] == (piece["tokens"][-1] != 2)
        pieces.append(piece)
    if C is not None:
        assert batch.patch_lengths.shape == (1, C) and batch.patch_lengths.dtype == np.int64
        assert batch.patch_lengths.sum() == used and (batch.patch_lengths[0, patch:] == 0).all()
        assert batch.next_is_start.shape == (S,) and batch.num_patches == patch
    else:
        assert batch.patch_lengths is None and batch.next_is_start is None and batch.num_patches == used
    return pieces


@pytest.fixture(scope="module")
def distinct(tmp_path_factory) -> Corpus:
    """30 documents of 1 to 400 bytes of which each byte says which document it is of."""
    root = tmp_path_factory.mktemp("distinct")
    for i in range(30):
        (root / f"{i:02}.txt").write_text(chr(40 + i) * (1 + i * i * 400 // 841))
    return Corpus(root)


@pytest.mark.parametrize("options", SETTINGS, ids=range(len(SETTINGS)))
def test_packing(distinct, options):
    """Over an epoch every token of every document comes once and in order, and all but BOS are targets once."""
    read: dict[int, dict[str, list]] = {}
    ends: list[dict] = []
    for batch in PackedBatches(DocumentStream(distinct, seed=4, epochs=1), **options):
        for piece in pieces_of(batch, options):
            texts = {token for token in (*piece["tokens"], *piece["targets"]) if token >= 4}
            assert len(texts) <= 1  # no sequence spans documents
            if not texts:
                ends.append(piece)  # EOS alone does not say of which document it is
                continue
            seen = read.setdefault(*texts, {"tokens": [], "targets": [], "lengths": []})
            for name, values in piece.items():
                seen[name] += values
    for seen in read.values():
        if seen["tokens"][-1] != 2:
            for name, values in ends.pop().items():
                seen[name] += values
    assert not ends
    expected = [encode(document) for document in distinct]
    assert len(read) == len(expected)
    for tokens in expected:
        seen = read[tokens[1]]
        assert seen["tokens"] == tokens.tolist()
        assert seen["targets"] == [*tokens[1:].tolist(), -100]
        if "segmenter" in options and options["longest_sequence"] > 9 and options["row_patches"] > 1:
            assert seen["lengths"] == list(options["segmenter"](tokens))


def test_pieces_are_drawn_from_many_documents(tmp_path):
    """A batch holds pieces of different documents, other ones in each batch, and none of them waits for long."""
    for i in range(90):
        (tmp_path / f"{i:02}.txt").write_text(chr(33 + i) * 4000)
    batches = PackedBatches(DocumentStream(Corpus(tmp_path), seed=5), 1600, 100)
    seen: list[set] = [set(next(batches).tokens.ravel().tolist()) for _ in range(100)]
    assert min(map(len, seen)) >= 10 and len(set.union(*seen)) >= 64
    repeated = [len(a & b) for a, b in pairwise(seen)]
    assert 1 < np.mean(repeated) < 8  # of 16: neither the same documents again nor every document in turn
    opened = {document["latest"] for document in batches.state_dict()["open"]}
    assert batches.state_dict()["pieces"] - min(opened) <= 5 * 64


def varied(tokens):
    """Patches whose mean is between 3 and 7 tokens, as the content decides."""
    rng = np.random.default_rng([int(tokens[1]), len(tokens)])
    mean = rng.uniform(3, 7)
    lengths = 1 + rng.poisson(mean - 1, len(tokens))
    ends = lengths.cumsum()
    count = int(np.searchsorted(ends, len(tokens)))
    return np.append(lengths[:count], len(tokens) - (ends[count - 1] if count else 0))


@pytest.fixture(scope="module")
def unlike(tmp_path_factory) -> tuple[Corpus, float]:
    """Documents from 500 bytes to 50 kB, unlike in their patches, and the mean length of all patches."""
    root = tmp_path_factory.mktemp("unlike")
    for i in range(150):
        (root / f"{i:03}.txt").write_text(chr(33 + i % 90) * int(500 * 100 ** (i / 150)))
    corpus = Corpus(root)
    documents = [encode(document) for document in corpus]
    return corpus, sum(map(len, documents)) / sum(len(varied(tokens)) for tokens in documents)


def test_rows_are_full(unlike):
    """At least 97 % of tokens and of patches are used, and the open documents do not become ones that fit badly."""
    corpus, mean = unlike
    N, C = 8192, round(8192 / mean)
    batches = PackedBatches(DocumentStream(corpus, seed=3), N, N // 16, segmenter=varied, row_patches=C)
    made = [next(batches) for _ in range(400)]
    assert np.mean([batch.num_tokens for batch in made]) > 0.97 * N
    assert np.mean([batch.num_patches for batch in made]) > 0.97 * C
    assert next(PackedBatches(DocumentStream(corpus), N, N // 16)).num_tokens == N  # without patches nothing is left
    bits = [
        np.unpackbits(np.frombuffer(base64.b64decode(document["patches"]), np.uint8))[document["offset"] :]
        for document in batches.state_dict()["open"]
        if document["patches"] is not None
    ]
    assert sum(map(len, bits)) / sum(int(b.sum()) for b in bits) == pytest.approx(mean, rel=0.15)


def test_rows_are_full_though_each_file_has_a_density_of_its_own(tmp_path):
    """Read one after the other, the files would make rows in which patches or tokens are left over."""

    def segment(tokens):
        mean = 3 + (int(tokens[1]) - 44) / 3
        ends = np.unique(np.append(np.arange(mean, len(tokens), mean).astype(int), len(tokens)))
        return np.diff(ends, prepend=0)

    for i in range(12):
        texts = [chr(40 + i) * (300 + 97 * j % 3000) for j in range(40)]
        (tmp_path / f"{i:02}.jsonl.gz").write_bytes(gzip.compress(json_lines(texts)))
    corpus = Corpus(tmp_path)
    texts = [encode(document) for document in corpus]
    N, C = 8192, round(8192 * sum(len(segment(tokens)) for tokens in texts) / sum(map(len, texts)))
    documents = DocumentStream(corpus, buffer_documents=32)
    batches = PackedBatches(documents, N, N // 16, segmenter=segment, row_patches=C)
    made = [next(batches) for _ in range(200)]  # of two epochs
    assert documents.epoch > 1
    assert np.mean([batch.num_tokens for batch in made]) > 0.97 * N
    assert np.mean([batch.num_patches for batch in made]) > 0.97 * C


@slow_ok
@given(taken=st.integers(0, 60), options=st.sampled_from(SETTINGS), seed=st.integers(0, 2))
def test_batches_resume_exactly(mixed, taken, options, seed):
    def batches():
        return PackedBatches(DocumentStream(mixed, seed=seed, epochs=None, buffer_documents=9), **options)

    first, second = batches(), batches()
    for _ in range(taken):
        next(first)
    state = json.loads(json.dumps(first.state_dict()))
    second.load_state_dict(state)
    assert second.state_dict() == state
    for _ in range(5):
        a, b = next(first), next(second)
        for name in data.Batch.__dataclass_fields__:
            assert np.array_equal(getattr(a, name), getattr(b, name)), name


def test_resuming_segments_nothing_that_was_segmented(unlike):
    corpus, mean = unlike

    def batches(segmenter):
        return PackedBatches(DocumentStream(corpus), 4096, 256, segmenter=segmenter, row_patches=round(4096 / mean))

    def refuse(tokens):
        raise AssertionError("segmented again")

    first = batches(varied)
    made = [next(first) for _ in range(40)]
    state = json.loads(json.dumps(first.state_dict()))
    opened = [document for document in state["open"] if document["patches"] is not None]
    assert len(opened) > 32 and made[0].num_patches > 0
    assert len(json.dumps(state)) < sum(map(len, corpus)) / 4
    second = batches(refuse)
    second.load_state_dict(state)
    with pytest.raises(AssertionError, match="segmented again"):  # the documents that follow are not cut yet
        list(second)
    second = batches(varied)
    second.load_state_dict(state)
    assert np.array_equal(next(first).tokens, next(second).tokens)


def test_batches_end_and_resume_at_the_end(mixed):
    def batches():
        return PackedBatches(DocumentStream(mixed, epochs=1), 64, 16)

    first, second = batches(), batches()
    count = len(list(first))
    assert count > 3 and next(first, None) is None
    second.load_state_dict(first.state_dict())
    assert next(second, None) is None


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([1.0], TypeError, "integer lengths"),
        ([[1]], TypeError, "one dimension"),
        ([1, 1], ValueError, "sum 2"),
        ([3, 0, 3], ValueError, "smallest 0"),
        ([], TypeError, "integer"),
    ],
)
def test_wrong_patch_lengths(tmp_path, lengths, error, message):
    (tmp_path / "a.txt").write_text("four")
    batches = PackedBatches(DocumentStream(Corpus(tmp_path)), 10, 10, row_patches=5, segmenter=lambda tokens: lengths)
    with pytest.raises(error, match=f"PackedBatches: segmenter: expected .*{message}"):
        next(batches)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"row_tokens": 0}, ValueError, "row_tokens: expected at least 1, got 0"),
        ({"row_tokens": 1.5}, TypeError, "row_tokens: expected an int, got float"),
        ({"row_tokens": True}, TypeError, "row_tokens: expected an int, got bool"),
        ({"row_patches": 4}, ValueError, "row_patches: expected together with segmenter"),
        ({"row_patches": 0, "segmenter": uneven}, ValueError, "row_patches: expected at least 1"),
        ({"max_sequences": 0}, ValueError, "max_sequences: expected at least 1"),
        ({"longest_sequence": 9}, ValueError, r"longest_sequence: expected 1 \.\. 8, got 9"),
        ({"open_documents": 0}, ValueError, "open_documents: expected at least 1"),
    ],
)
def test_packing_arguments(mixed, options, error, message):
    with pytest.raises(error, match=f"PackedBatches: {message}"):
        PackedBatches(DocumentStream(mixed), **{"row_tokens": 8, "longest_sequence": 4} | options)
    with pytest.raises(TypeError, match="documents: expected a DocumentStream, got list"):
        PackedBatches([b"x"], 8, 8)


def test_batches_of_a_changed_document(tmp_path):
    (tmp_path / "a.txt").write_text("0123456789")
    first = PackedBatches(DocumentStream(Corpus(tmp_path)), 8, 8, segmenter=uneven, row_patches=8)
    next(first)
    state = first.state_dict()
    (cut, *_) = (document for document in state["open"] if document["patches"] is not None)
    for changed in ({"offset": 99}, {"patches": base64.b64encode(b"\xff" * 9).decode()}):
        with pytest.raises(ValueError, match="got another one with 12 tokens: the corpus has changed"):
            first.load_state_dict({**state, "open": [{**cut, **changed}]})
    fewer = PackedBatches(DocumentStream(Corpus(tmp_path)), 8, 8, segmenter=uneven, row_patches=8, open_documents=2)
    with pytest.raises(ValueError, match="open_documents: expected 2, got 64"):
        fewer.load_state_dict(state)
    with pytest.raises(ValueError, match="version: expected 5, got 4"):
        first.load_state_dict({**state, "settings": {**state["settings"], "version": 4}})


def test_a_batch_makes_a_packed_layout(mixed):
    """What training does with a batch: boundaries of sequences and patches agree, and a finished patch is visible."""
    torch = pytest.importorskip("torch")
    layout_of = pytest.importorskip("blt_kernels.layout", exc_type=ImportError).PatchLayout.from_lengths
    cut = 0
    documents = DocumentStream(mixed, epochs=1)
    for batch in PackedBatches(documents, 60, 20, row_patches=15, segmenter=fixed(4)):
        lengths, cu_seqlens = torch.from_numpy(batch.patch_lengths), torch.from_numpy(batch.cu_seqlens)
        layout = layout_of(lengths, 60, cu_seqlens=cu_seqlens, next_is_start=torch.from_numpy(batch.next_is_start))
        assert layout.lengths().equal(lengths)
        own, visible = layout.patch_ids[0].tolist(), layout.visible_ids[0].tolist()
        assert own[batch.num_tokens :] == [-1] * (60 - batch.num_tokens)
        for (begin, end), goes_on in zip(pairwise(batch.cu_seqlens), batch.next_is_start, strict=True):
            if end > begin:
                first = own[begin]
                wanted = own[end - 1] - (not goes_on)
                assert visible[end - 1] == (wanted if wanted >= first else -1)
                cut += goes_on
    assert cut > 0
