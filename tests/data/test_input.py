"""Good files of all kinds are read, and hostile ones end in an error that names the file."""

from __future__ import annotations

import codecs
import errno
import gzip
import json
import lzma
import struct
import warnings

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from blt_kernels.data import Corpus, CorpusError, DocumentStream, compression, readers, split_corpus

GOOD = b'{"text": "one"}\n{"text": "two"}\n'
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def zstd_compress(raw: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor().compress(raw)


COMPRESS = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".zst": zstd_compress}
ANY_SUFFIX = pytest.mark.parametrize("suffix", COMPRESS)


def write(path, raw: bytes) -> Corpus:
    path.write_bytes(raw)
    return Corpus(path)


def refuse(corpus: Corpus) -> CorpusError:
    with pytest.raises(CorpusError) as caught:
        list(corpus)
    assert caught.value.path in {file.path for file in corpus.files} and "\n" not in str(caught.value)
    return caught.value


# Compressed files


def zstd_frame(window_log: int, payload: bytes) -> bytes:
    """A frame by hand: with this window, and one block that is not compressed (RFC 8878, section 3.1)."""
    block = struct.pack("<I", 1 | len(payload) << 3)[:3] + payload
    return b"\x28\xb5\x2f\xfd" + bytes([0, (window_log - 10) << 3]) + block


@pytest.mark.parametrize("window_log", [10, 27, 28, 31])
def test_zstd_windows(tmp_path, window_log):
    """`zstd --long=28` and up; without a limit of our own, more than 27 is refused."""
    pytest.importorskip("zstandard")
    assert list(write(tmp_path / "a.txt.zst", zstd_frame(window_log, b"text"))) == [b"text"]


def test_zstd_long_matches(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    raw = b"".join(b"%d\n" % i for i in range(10_000))
    assert list(write(tmp_path / "a.txt.zst", compressor.compress(raw) + compressor.flush())) == [raw]


def test_zstd_skippable_frames(tmp_path):
    skippable = struct.pack("<II", 0x184D2A50, 4) + b"skip"
    raw = skippable + zstd_compress(b"one ") + skippable + zstd_compress(b"") + zstd_compress(b"two") + skippable
    assert list(write(tmp_path / "a.txt.zst", raw)) == [b"one two"]


def test_zstd_dictionary_is_named(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    dictionary = zstandard.train_dictionary(2048, [b"line %d of a text about %d" % (i, i * i) for i in range(1000)])
    corpus = write(tmp_path / "a.txt.zst", zstandard.ZstdCompressor(dict_data=dictionary).compress(b"line 5 of a text"))
    assert "it was made with a dictionary, which is not supported" in str(refuse(corpus))


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 16])
def test_members_one_after_the_other(tmp_path, suffix, chunk, monkeypatch):
    monkeypatch.setattr(compression, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(compression, "ZSTD_CHUNK_BYTES", chunk)
    raw = b"".join(COMPRESS[suffix](part) for part in (b"first ", b"", b"second ", b"third"))
    assert list(write(tmp_path / f"a.txt{suffix}", raw)) == [b"first second third"]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 16])
@pytest.mark.parametrize("padding", [4, 8, 100_000])
def test_padding_between_members(tmp_path, chunk, padding, monkeypatch):
    monkeypatch.setattr(compression, "CHUNK_BYTES", chunk)
    for suffix in (".xz", ".gz"):
        parts = [COMPRESS[suffix](part) for part in (b"first ", b"second")]
        raw = bytes(padding).join([*parts, b""])
        assert list(write(tmp_path / f"a.txt{suffix}", raw)) == [b"first second"]


@pytest.mark.parametrize("garbage", [b"x", b"garbage", b"\0\0garbage", b"\x1f"])
def test_gzip_with_something_after_its_end(tmp_path, garbage):
    """gzip(1) warns and goes on."""
    corpus = write(tmp_path / "a.txt.gz", gzip.compress(b"text") + garbage)
    with pytest.warns(UserWarning, match=r"a\.txt\.gz: what follows the gzip data is ignored"):
        assert list(corpus) == [b"text"]


def test_xz_and_zstd_with_something_after_their_end(tmp_path):
    """xz(1) and zstd(1) refuse it."""
    for suffix in (".xz", ".zst"):
        corpus = write(tmp_path / f"a.txt{suffix}", COMPRESS[suffix](b"text") + b"garbage")
        assert refuse(corpus).reason == "corrupt"


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
def test_compressed_and_empty(tmp_path, suffix):
    with pytest.raises(CorpusError, match=r"no documents in .* \(1 file\)"):
        list(write(tmp_path / f"a.txt{suffix}", COMPRESS[suffix](b"")))
    error = refuse(write(tmp_path / f"b.txt{suffix}", b""))
    assert error.reason == "corrupt" and "the file is empty" in str(error)


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".zst"])
@pytest.mark.parametrize("left", [1, 2, 20, -1])
def test_cut_short(tmp_path, suffix, left):
    error = refuse(write(tmp_path / f"a.txt{suffix}", COMPRESS[suffix](b"some text\n" * 9)[:left]))
    assert error.reason == "corrupt"


@pytest.mark.parametrize(("suffix", "largest"), [(".gz", 1 << 18), (".xz", 1 << 18), (".zst", 17 << 20)])
def test_a_file_that_expands_a_thousand_times_is_streamed(tmp_path, suffix, largest):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](bytes(2 * largest)))
    with open(path, "rb") as file:
        sizes = [len(chunk) for chunk in compression._decompress(file, path)]
    assert sum(sizes) == 2 * largest and max(sizes) <= largest


# Byte order marks


@ANY_SUFFIX
def test_a_mark_at_the_start_is_dropped(tmp_path, suffix):
    for name, content in [("a.jsonl", GOOD), ("a.txt", b"one\ntwo")]:
        path = tmp_path / f"{name}{suffix}"
        plain = list(write(path, COMPRESS[suffix](content)))
        assert list(write(path, COMPRESS[suffix](codecs.BOM_UTF8 + content))) == plain


@ANY_SUFFIX
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_file_of_a_mark_alone(tmp_path, suffix, name):
    with pytest.raises(CorpusError, match="no documents"):
        list(write(tmp_path / f"{name}{suffix}", COMPRESS[suffix](codecs.BOM_UTF8)))


def test_a_mark_further_on(tmp_path):
    mark = codecs.BOM_UTF8
    assert list(write(tmp_path / "a.txt", mark + b"one" + mark)) == [b"one" + mark]  # here it is text
    assert list(write(tmp_path / "b.txt", mark + mark + b"one")) == [mark + b"one"]
    inside = json.dumps({"text": "\ufeffone"}, ensure_ascii=False).encode()
    assert list(write(tmp_path / "a.jsonl", mark + inside)) == [mark + b"one"]
    joined = mark + GOOD + mark + GOOD  # `cat` of two files
    assert list(write(tmp_path / "b.jsonl", joined)) == [b"one", b"two"] * 2


@pytest.mark.parametrize("limit", [4, 5, 100])
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl"])
def test_a_mark_and_cursors(tmp_path, limit, name):
    path = tmp_path / name
    text = "line\nzweite ü\n\nlast"
    raw = json.dumps({"text": text}).encode() + b"\n" + GOOD if name == "a.jsonl" else text.encode()
    path.write_bytes(COMPRESS[path.suffix if path.suffix == ".gz" else ""](codecs.BOM_UTF8 + raw))
    corpus = Corpus(path, max_document_bytes=limit)
    steps = list(corpus.read(0))
    assert b"".join(corpus).startswith(text.encode())
    for cursor, _, _ in steps:
        rest = [documents for _, documents, _ in corpus.read(0, cursor)]
        assert rest == [documents for at, documents, _ in steps if at > cursor]
    train, held_out = split_corpus(corpus, 1)
    assert b"".join(held_out) + b"".join(train) == b"".join(corpus)
    stream, again = (DocumentStream(corpus, epochs=1, shuffle=False) for _ in range(2))
    first = next(stream)
    again.load_state_dict(stream.state_dict())
    assert [first, *again] == list(corpus)


@ANY_SUFFIX
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
@pytest.mark.parametrize("encoding", ["UTF-16-LE", "UTF-16-BE", "UTF-32-LE", "UTF-32-BE"])
def test_other_encodings_are_named(tmp_path, suffix, name, encoding):
    raw = "\ufeff".encode(encoding) + GOOD.decode().encode(encoding)
    corpus = write(tmp_path / f"{name}{suffix}", COMPRESS[suffix](raw))
    error = refuse(corpus)
    order = "little" if encoding.endswith("LE") else "big"
    assert f"says {encoding[:6]} ({order}-endian); convert it to UTF-8" in str(error)
    assert error.reason == "utf8" and error.line == 1
    with pytest.raises(CorpusError, match=rf"no documents .* skipped: 1 utf8; first: .*{encoding[:6]}"):
        list(Corpus(corpus.files[0].path, on_error="skip"))  # the file counts once, not once a line


def test_windows_line_ends(tmp_path):
    raw = codecs.BOM_UTF8 + GOOD.replace(b"\n", b"\r\n") + b"\r\n"
    assert list(write(tmp_path / "a.jsonl", raw)) == [b"one", b"two"]
    assert list(write(tmp_path / "a.txt", b"one\r\ntwo\r\n")) == [b"one\r\ntwo\r\n"]  # they are text


# What was skipped, and why


def test_a_record_counts_once_however_often_it_is_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD + b"{\n" * 600 + GOOD + b"[]\n")
    (tmp_path / "b.txt").write_bytes(b"text\xff")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"text")[:-1])
    corpus = Corpus(tmp_path, on_error="skip")
    for _ in range(3):
        list(corpus)
        stream = DocumentStream(corpus, epochs=2, buffer_documents=1)
        documents = list(stream)
        stream.load_state_dict(stream.state_dict())
        assert documents.count(b"one") == 4
        assert corpus.skipped.counts == {"json": 600, "missing_text": 1, "utf8": 1, "corrupt": 1}
    list(corpus.read(0, 300))  # from the middle
    assert corpus.skipped.total == 603 and len(corpus.skipped.messages) == 20
    assert str(corpus.skipped).startswith("1 corrupt, 600 json, 1 missing_text, 1 utf8; first: ")
    assert str(Corpus(path).skipped) == ""


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_wrong_text_key_is_said(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        path.write_bytes(b'{"id": 1, "body": "x"}\n' * 5)
        message = r"5 missing_text; first: .*a\.jsonl, line 1: no key 'text' \(keys: 'id', 'body'\)"
    else:
        pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pq.write_table(pa.table({"id": [1], "body": ["x"]}), path)
        message = r"1 missing_text; first: .*a\.parquet: no column 'text' \(columns: 'id', 'body'\)"
    corpus = Corpus(path, on_error="skip")
    with pytest.raises(CorpusError, match=r"^no documents in .*\(1 file; skipped: " + message):
        split_corpus(corpus, 1000)
    with pytest.raises(CorpusError, match=message):
        list(corpus)


def test_a_split_that_leaves_nothing_says_how_much_there_is(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"bad\n")
    corpus = Corpus(tmp_path, on_error="skip")
    message = "holding out 7 bytes leaves nothing to train on in .*, which has 6 bytes of text.*skipped: 1 json; first"
    with pytest.raises(CorpusError, match=message):
        split_corpus(corpus, 7)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a single record"}')
    with pytest.raises(
        CorpusError, match=r"holding out 1 bytes .* which has 15 bytes of text; a record .* not divided"
    ):
        split_corpus(Corpus(tmp_path), 1)
    (tmp_path / "a.jsonl").write_bytes(b"\n\n")
    with pytest.raises(CorpusError, match=r"no documents in .* \(1 file\)"):
        split_corpus(Corpus(tmp_path), 1)


# Hostile content


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ' + b'{"a":' * 100_000, "too deeply nested"),
        (b'{"text": 1' + b"0" * 5000 + b"}", "expected a string, got int"),
        (b'{"text": 1e999}', "expected a string, got float"),
        (b'{"text": NaN}', "expected a string, got float"),
        (b'{"\\ud800": 1, "a\\nb": 2}', r"keys: '\ud800', 'a\nb'"),
        (b'{"' + b"k" * 5000 + b'": 1}', "k'..."),
        (b"{" + b", ".join(b'"%d": 0' % i for i in range(20)) + b"}", r"'7', ..."),
        (b'{"text": "' + b"\\ud83d" * 2 + b'"}', "lone surrogate at character 0"),
        (b'{"text": "a\0b"}', "not JSON (Invalid control character"),
        (b'{"text": "x"} {"text": "y"}', "not JSON (Extra data at column 15)"),
        (b'{"text": "x",\r"id": }', "not JSON (Expecting value at column 21)"),
        (b"\xef\xbb", "not UTF-8"),
    ],
    ids=range(12),
)
def test_a_hostile_line(tmp_path, line, message):
    corpus = write(tmp_path / "a.jsonl", GOOD + line + b"\n" + GOOD)
    error = refuse(corpus)
    assert message in str(error) and error.line == 3 and len(str(error)) < 1000
    str(error).encode()
    assert list(Corpus(tmp_path, on_error="skip")) == [b"one", b"two"] * 2


def test_a_good_record_with_a_huge_number(tmp_path):
    """Python refuses to convert integers of more than 4300 digits, and the text does not need them."""
    line = b'{"id": ' + b"7" * 5000 + b', "text": "good", "x": -1e9999}'
    assert list(write(tmp_path / "a.jsonl", line)) == [b"good"]


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.xz", "a.txt.zst", "a.jsonl", "a.jsonl.gz", "a.parquet"])
@quick
@given(raw=st.binary(max_size=300) | st.text(max_size=100).map(str.encode), packed=st.booleans())
@example(raw=b"PAR1" + b"\xff" * 40 + b"PAR1", packed=False)
@example(raw=b"\x28\xb5\x2f\xfd" + b"\xff" * 40, packed=False)
def test_any_bytes_end_in_documents_or_a_corpus_error(tmp_path, name, raw, packed):
    if name.endswith((".zst", ".parquet")):
        pytest.importorskip({"t": "zstandard", "e": "pyarrow"}[name[-1]])
    path = tmp_path / name
    path.write_bytes(COMPRESS[path.suffix](raw) if packed and path.suffix in COMPRESS else raw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for on_error in ("raise", "skip"):
            try:
                for document in Corpus(path, on_error=on_error, max_document_bytes=16):
                    assert document.decode() and len(document) <= 16
            except CorpusError as error:
                assert name in str(error)


@quick
@given(places=st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=8))
def test_a_damaged_parquet_file_ends_in_documents_or_a_corpus_error(tmp_path, places):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {i}" for i in range(50)], "id": list(range(50))}), path)
    raw = bytearray(path.read_bytes())
    for place, value in places:
        raw[place % len(raw)] = value
    path.write_bytes(raw)
    try:
        list(Corpus(path))
    except CorpusError as error:
        assert str(path) in str(error)


def test_a_parquet_file_with_fewer_rows_than_its_index_says(tmp_path):
    """Without a check pyarrow reads some damaged files as if they ended early."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {i}" for i in range(50)]}), path, compression="none")
    raw = path.read_bytes()
    rows = pq.ParquetFile(path).metadata
    assert rows.num_rows == rows.row_group(0).num_rows == 50
    found = []
    for place in range(len(raw) - 8 - int.from_bytes(raw[-8:-4], "little"), len(raw) - 8):  # the index
        path.write_bytes(raw[:place] + b"\x02" + raw[place + 1 :])
        try:
            found.append(len(list(Corpus(path))))
        except CorpusError as error:
            assert "damaged" in str(error) or "column" in str(error) or "no documents" in str(error)
    assert set(found) <= {50}


def test_parquet_columns_of_one_name(tmp_path):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(
        pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "a.parquet"
    )
    assert "several columns 'text'" in str(refuse(Corpus(tmp_path)))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.parquet"])
def test_a_file_that_vanishes(tmp_path, name):
    if name == "a.parquet":
        pytest.importorskip("pyarrow")
    corpus = write(tmp_path / name, b"content")
    (tmp_path / name).unlink()
    error = refuse(corpus)
    assert error.reason == "unreadable" and "cannot be read (" in str(error)


def test_a_file_that_shrinks_or_vanishes_while_it_is_read(tmp_path):
    path = tmp_path / "a.txt"
    corpus = Corpus(write(path, b"line\n" * 100_000).files[0].path, max_document_bytes=1000)
    documents = iter(corpus)
    next(documents)
    path.write_bytes(b"")
    assert sum(map(len, documents)) < 500_000
    path.write_bytes(b"line\n" * 100_000 + b"\xff")
    documents = iter(corpus)
    next(documents)
    path.unlink()  # the line of the fault cannot be counted any more
    with pytest.raises(CorpusError, match=r"a\.txt: cannot be read"):
        list(documents)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz"])
def test_a_limit_of_open_files_skips_no_text(tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.write_bytes(b"content")
    corpus = Corpus(path, on_error="skip")

    def refuse_to_open(path):
        raise OSError(errno.EMFILE, "Too many open files", str(path))

    monkeypatch.setattr(readers, "open_bytes", refuse_to_open)
    with pytest.raises(OSError, match="Too many open files"):
        list(corpus)
    assert not corpus.skipped.total


def test_no_memory_is_an_error_of_the_file(tmp_path, monkeypatch):
    corpus = write(tmp_path / "a.jsonl", GOOD)

    class Full:
        def readline(self, size):
            raise MemoryError

        def close(self):
            pass

    monkeypatch.setattr(readers, "open_bytes", lambda path: Full())
    assert "not enough memory" in str(refuse(corpus))
