"""Which files a corpus reads, and what it says about the others."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from blt_kernels.data import Corpus, CorpusError, DocumentStream, files, split_corpus
from blt_kernels.data.files import Pattern


def tree(root: Path, *names: str) -> Path:
    """Files that hold their own name; one that ends in "/" is an empty directory."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            path.mkdir()
        else:
            path.write_text(name)
    return root


def names(*paths, **options) -> list[str]:
    return [file.name for file in Corpus(*paths, **options).files]


# Patterns


@pytest.mark.parametrize(
    ("pattern", "excluded"),
    [
        ("test", "a/test/x.txt test/sub/y.txt test/x.txt"),
        ("test/", "a/test/x.txt test/sub/y.txt test/x.txt"),
        ("/test", "test/sub/y.txt test/x.txt"),
        ("/test/", "test/sub/y.txt test/x.txt"),
        ("./test/", "a/test/x.txt test/sub/y.txt test/x.txt"),
        ("test/*", "test/sub/y.txt test/x.txt"),
        ("test/**", "test/sub/y.txt test/x.txt"),
        ("test/**/y.txt", "test/sub/y.txt"),
        ("test/**/x.txt", "test/x.txt"),
        ("**/test/*", "a/test/x.txt test/sub/y.txt test/x.txt"),
        ("*/test/*", "a/test/x.txt test/sub/y.txt test/x.txt"),
        ("/test/*", "test/sub/y.txt test/x.txt"),
        ("a/b.txt", "a/b.txt"),
        ("/a/b.txt", "a/b.txt"),
        ("b.txt", "a/b.txt"),
        ("b.txt/", ""),  # names directories, and this is a file
        ("*.md", "c.md"),
        ("?.md", "c.md"),
        ("?", "a/b.txt a/test/x.txt"),  # not "/": the directory a, nothing else
        ("[bx].txt", "a/b.txt a/test/x.txt test/x.txt"),
        ("[!bx].txt", "test/sub/y.txt"),
        ("*", "a/b.txt a/test/x.txt c.md test/sub/y.txt test/x.txt"),
        ("**", "a/b.txt a/test/x.txt c.md test/sub/y.txt test/x.txt"),
        ("tes", ""),
        ("Test", ""),
        ("[test", ""),
    ],
)
def test_exclude(tmp_path, pattern, excluded):
    every = ["a/b.txt", "a/test/x.txt", "c.md", "test/sub/y.txt", "test/x.txt"]
    tree(tmp_path, *every)
    wanted = [name for name in every if name not in excluded.split()]
    if not wanted:
        with pytest.raises(CorpusError, match=r"no files .* left out: .* excluded"):
            Corpus(tmp_path, exclude=pattern)
        return
    corpus = Corpus(tmp_path, exclude=pattern)
    assert [file.name for file in corpus.files] == wanted
    assert corpus.unmatched == (() if excluded else (("exclude", pattern),))
    assert bool(corpus.left_out.counts["excluded"]) == bool(excluded)


@pytest.mark.parametrize(
    ("pattern", "included"),
    [
        ("*.py", "b.py s/c.py"),
        ("s/*", "s/c.py s/x.txt/d.bin"),
        ("s", "s/c.py s/x.txt/d.bin"),
        ("s/", "s/c.py s/x.txt/d.bin"),
        ("*.txt", "a.txt"),  # a wildcard selects files: not all that is in the directory s/x.txt
        ("*.txt/", "s/x.txt/d.bin"),
        ("/*.py", "b.py s/c.py"),  # `*` also matches "/"
        ("b.py", "b.py"),
        ("*.d", "s/e.d"),
    ],
)
def test_include(tmp_path, pattern, included):
    tree(tmp_path, "a.txt", "b.py", "s/c.py", "s/x.txt/d.bin", "s/e.d")
    found = names(tmp_path, include=pattern)
    assert [name for name in found if name != "s/e.d" or pattern == "*.d"] == included.split()


def test_held_out_text_is_left_out_by_a_relative_pattern(tmp_path):
    corpus = Corpus(tree(tmp_path, "train/a.txt", "test/b.txt"), exclude="test/*")
    assert list(corpus) == [b"train/a.txt"]
    assert corpus.remarks() == ["left out: 1 excluded (test/)"]


def test_a_pattern_that_matches_nothing_is_said_once(tmp_path):
    tree(tmp_path, "a.txt", ".git/", ".hidden")
    corpus = Corpus(tmp_path, include=["*.txt", "*.rs"], exclude=["tset/*", ".git/", ".hidden"])
    assert corpus.unmatched == (("include", "*.rs"), ("exclude", "tset/*"))
    assert corpus.remarks() == [
        "left out: 2 hidden (.git/, .hidden)",
        "include: the pattern '*.rs' matches nothing",
        "exclude: the pattern 'tset/*' matches nothing",
    ]
    assert not Corpus(tmp_path / "a.txt").remarks()  # nobody asked for the patterns of the default
    train, held_out = split_corpus(Corpus(tree(tmp_path, "b.txt"), exclude="x"), 1)
    assert train.unmatched == held_out.unmatched == (("exclude", "x"),)


def test_exclude_is_for_files_that_are_given_too(tmp_path):
    """A shell expands data/*.txt before the corpus sees it."""
    tree(tmp_path, "a.txt", "test-a.txt", "sub/test-b.txt")
    corpus = Corpus([tmp_path / "a.txt", tmp_path / "test-a.txt", tmp_path / "sub"], exclude="test-a.txt")
    assert [file.name for file in corpus.files] == ["a.txt", "test-b.txt"]
    assert corpus.left_out.names == {"excluded": ["test-a.txt"]}


def test_suffixes_in_upper_case(tmp_path):
    tree(tmp_path, "A.TXT", "B.Md", "d.txt")
    (tmp_path / "C.JSONL").write_text('{"text": "json"}\n')
    assert names(tmp_path) == ["A.TXT", "B.Md", "C.JSONL", "d.txt"]
    assert list(Corpus(tmp_path))[2] == b"json"
    assert names(tmp_path, include="*.txt") == ["d.txt"]  # what is asked for is taken literally


# What is left out is said


def test_left_out_by_reason(tmp_path, monkeypatch):
    tree(tmp_path, "a.txt", ".hidden.txt", ".git/config", "b.c", "c.c", "d.c", "e.c", "t/x.txt")
    (tmp_path / "nothing.txt").touch()
    (tmp_path / "gone.txt").symlink_to("nowhere")
    (tmp_path / "self.txt").symlink_to("self.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as server:
        monkeypatch.chdir(tmp_path)  # the path of a socket must be short
        server.bind("socket.txt")
    (tmp_path / "device.txt").symlink_to("/dev/null")
    corpus = Corpus([tmp_path, tmp_path / "a.txt"], exclude="t")
    assert dict(corpus.left_out.counts) == {
        "broken link": 2,
        "empty": 1,
        "excluded": 1,
        "hidden": 2,
        "not a file": 3,
        "not included": 4,
        "reached twice": 1,
    }
    assert [file.name for file in corpus.files] == ["a.txt", "nothing.txt"]
    assert list(corpus) == [b"a.txt"]
    assert corpus.remarks() == [
        "left out: 2 broken link (gone.txt, self.txt); 1 empty (nothing.txt); 1 excluded (t/); "
        "2 hidden (.git/, .hidden.txt); 3 not a file (pipe.txt, socket.txt, device.txt); "
        "4 not included (b.c, c.c, d.c, ...); 1 reached twice (a.txt)"
    ]


def test_an_empty_corpus_says_why(tmp_path):
    tree(tmp_path, "a.c", ".b.txt")
    with pytest.raises(CorpusError, match=r"no files in .*; left out: 1 hidden \(\.b\.txt\); 1 not included \(a\.c\)"):
        Corpus(tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "broken link", "loop", "nul", "long"])
def test_a_path_that_is_no_file(tmp_path, kind):
    path = tmp_path / "a.txt"
    if kind == "pipe":
        os.mkfifo(path)  # opening it would wait for ever
    elif kind == "broken link":
        path.symlink_to("nowhere")
    elif kind == "loop":
        path.symlink_to("a.txt")
    else:
        path = tmp_path / ("a\0b" if kind == "nul" else "x" * 5000)
    message = {
        "pipe": "expected a file or a directory, got a pipe",
        "broken link": r"a\.txt: a broken link",
        "loop": r"cannot be read \(Too many levels of symbolic links\)",
        "nul": r"a\\x00b: cannot be read \(embedded null byte\)",
        "long": r"cannot be read \(File name too long\)",
    }[kind]
    with pytest.raises(CorpusError, match=message) as caught:
        Corpus([path], on_error="skip")
    assert caught.value.reason == "unreadable" and caught.value.path == path


def test_the_given_path_may_be_hidden_or_a_link(tmp_path):
    tree(tmp_path, ".corpus/a.txt", ".corpus/.b.txt")
    (tmp_path / "link").symlink_to(".corpus")
    (tmp_path / ".link").symlink_to(".corpus/a.txt")
    assert names(tmp_path / ".corpus") == names(tmp_path / "link") == ["a.txt"]
    assert list(Corpus(tmp_path / ".corpus" / ".b.txt")) == [b".corpus/.b.txt"]
    assert list(Corpus(tmp_path / ".link")) == [b".corpus/a.txt"]
    corpus = Corpus([tmp_path / "link", tmp_path / ".corpus", tmp_path / ".link", tmp_path / "link"])
    assert len(corpus.files) == 1 and corpus.left_out.counts["reached twice"] == 3


def test_a_directory_named_like_a_file(tmp_path):
    tree(tmp_path, "x.jsonl/_SUCCESS", "y.txt/a.bin")
    (tmp_path / "x.jsonl" / "part-0.jsonl").write_text('{"text": "part"}\n')
    for path in (tmp_path, tmp_path / "x.jsonl"):
        corpus = Corpus(path)
        assert list(corpus) == [b"part"] and corpus.left_out.counts["not included"] == 1 + (path == tmp_path)


def refuse_to_list(monkeypatch, folder):
    """The tests may run as root, who may read all."""
    scandir = os.scandir

    def refusing(path):
        if path == str(folder):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(files.os, "scandir", refusing)


def test_unreadable_directory(tmp_path, monkeypatch):
    tree(tmp_path, "a.txt", "secret/b.txt")
    refuse_to_list(monkeypatch, tmp_path / "secret")
    with pytest.raises(CorpusError, match=r"secret: cannot be read \(Permission denied\)") as caught:
        Corpus(tmp_path)
    assert caught.value.reason == "unreadable"
    corpus = Corpus(tmp_path, on_error="skip")
    assert list(corpus) == [b"a.txt"]
    assert corpus.remarks() == ["left out: 1 unreadable (secret/: Permission denied)"]
    assert names(tmp_path, exclude="secret") == ["a.txt"]  # what is excluded need not be readable
    with pytest.raises(CorpusError, match=r"no files .*; left out: 1 unreadable \(.*secret: Permission denied\)"):
        Corpus(tmp_path / "secret", on_error="skip")


def test_a_file_that_vanishes_while_it_is_looked_for(tmp_path, monkeypatch):
    tree(tmp_path, "a.txt", "b.txt", "c.bin")
    real_stat = os.stat

    def vanishing(path, *args, **options):
        if str(path).endswith(("b.txt", "c.bin")):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return real_stat(path, *args, **options)

    monkeypatch.setattr(files.os, "stat", vanishing)
    with pytest.raises(CorpusError, match=r"b\.txt: cannot be read \(No such file"):
        Corpus(tmp_path)
    assert Corpus(tmp_path, on_error="skip").left_out.counts["unreadable"] == 2


# Links


def test_links_are_followed(tmp_path):
    tree(tmp_path, "elsewhere/sub/a.txt", "elsewhere/b.c", "corpus/c.txt")
    (tmp_path / "corpus" / "link").symlink_to("../elsewhere")
    (tmp_path / "corpus" / "d.txt").symlink_to("../elsewhere/b.c")
    corpus = Corpus(tmp_path / "corpus")
    assert [file.name for file in corpus.files] == ["c.txt", "d.txt", "link/sub/a.txt"]
    assert list(corpus) == [b"corpus/c.txt", b"elsewhere/b.c", b"elsewhere/sub/a.txt"]
    assert len(list(DocumentStream(corpus, epochs=1))) == 3


def test_links_that_lead_in_circles(tmp_path):
    tree(tmp_path, "a/x.txt", "b/y.txt")
    (tmp_path / "a" / "up").symlink_to("..")
    (tmp_path / "a" / "self").symlink_to(".")
    (tmp_path / "a" / "to_b").symlink_to("../b")
    (tmp_path / "b" / "to_a").symlink_to("../a")
    corpus = Corpus(tmp_path)
    assert [file.name for file in corpus.files] == ["a/x.txt", "b/y.txt"]  # a file keeps its own name
    assert corpus.left_out.names["link loop"] == ["a/self/", "a/up/"]
    assert names(tmp_path / "a") == ["to_b/y.txt", "x.txt"]
    assert Corpus(tmp_path, exclude=["up", "self"]).unmatched == ()


def test_many_links_to_one_another_end(tmp_path):
    """With n directories that link to each other there are n! paths; each link is followed once."""
    for i in range(9):
        tree(tmp_path, f"{i}/{i}.txt")
        for j in range(9):
            if i != j:
                (tmp_path / str(i) / f"to{j}").symlink_to(f"../{j}")
    assert names(tmp_path) == [f"{i}/{i}.txt" for i in range(9)]


def test_a_file_keeps_its_own_name(tmp_path):
    tree(tmp_path, "z/real.txt")
    (tmp_path / "a.txt").symlink_to("z/real.txt")
    (tmp_path / "b").symlink_to("z")
    assert names(tmp_path) == ["z/real.txt"]


@pytest.mark.parametrize("pattern", ["test/*", "test", "test/1.txt"])
def test_what_is_excluded_does_not_come_back_under_another_name(tmp_path, pattern):
    tree(tmp_path, "test/1.txt", "pool/2.txt", "pool/3.txt")
    (tmp_path / "copy").symlink_to("test")
    (tmp_path / "test" / "2.txt").symlink_to("../pool/2.txt")
    found = names([tmp_path, tmp_path / "copy", tmp_path / "test" / "1.txt"], exclude=pattern)
    assert not any(name.endswith("1.txt") for name in found) and "pool/3.txt" in found


def test_a_link_to_excluded_text_excludes_it(tmp_path):
    tree(tmp_path, "pool/1.txt", "pool/2.txt", "test/")
    (tmp_path / "test" / "2.txt").symlink_to("../pool/2.txt")
    assert names(tmp_path, exclude="test/*.txt") == ["pool/1.txt"]


# Names


def test_names_that_cannot_be_printed(tmp_path):
    folder = os.fsencode(tmp_path)
    try:
        for name in (b"new\nline.txt", b"\xff\xfe.txt", b"bad\x1b[31m.jsonl"):
            with open(os.path.join(folder, name), "wb") as file:
                file.write(b"{")
    except OSError:
        pytest.skip("this file system refuses such names")
    corpus = Corpus(tmp_path, on_error="skip", exclude="*.jsonl")
    assert len(list(corpus)) == 2 and corpus.fingerprint()
    assert corpus.remarks() == [r"left out: 1 excluded (bad\x1b[31m.jsonl)"]
    with pytest.raises(CorpusError, match=r"bad\\x1b\[31m\.jsonl, line 1: not JSON"):
        list(Corpus(tmp_path))
    os.unlink(os.path.join(folder, b"bad\x1b[31m.jsonl"))
    for name, shown in ((b"new\nline.txt", r"new\nline.txt"), (b"\xff\xfe.txt", r"\xff\xfe.txt")):
        path = Path(os.fsdecode(os.path.join(folder, name)))
        path.write_bytes(b"\0")
        with pytest.raises(CorpusError) as caught:
            list(Corpus(path))
        message = str(caught.value)
        message.encode()  # no lone surrogates
        assert shown in message and message.isprintable() and caught.value.path == path


def test_a_pattern_knows_whether_it_was_used():
    pattern = Pattern("a[!b]?*.txt", "include")
    assert not pattern.matches("abc.txt") and not pattern.used
    assert pattern.matches("x/acd.txt") and pattern.used
    assert not pattern.matches("a/d.txt") and not Pattern("a[!b]c", "exclude").matches("a/c")
