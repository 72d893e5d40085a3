"""Finds the files of a corpus, and remembers what was left out and why."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from .compression import COMPRESSION, is_compressed
from .errors import os_reason, printable, problem
from .readers import kind_of

# The files that a directory contributes when nothing else is asked for; upper and lower case are alike here.
_STEMS = ("*.txt", "*.text", "*.md", "*.rst", "*.jsonl", "*.ndjson")
DEFAULT_INCLUDE = (*(stem + end for stem in _STEMS for end in ("", *COMPRESSION)), "*.parquet")
KEPT_NAMES = 3


@dataclass(frozen=True)
class CorpusFile:
    """A file, or the part of it from cursor `start` to before cursor `stop` (see `readers`)."""

    path: Path
    name: str  # relative to the directory it was found in, so the same on every machine
    size: int  # bytes on disk
    start: int = 0
    stop: int | None = None


@dataclass
class LeftOut:
    """What the given directories hold and the corpus does not read, by reason; a directory counts as one.

    - "hidden": the name begins with a dot.
    - "excluded": matched by `exclude`, under this name or another name of the same file.
    - "not included": matched by no pattern of `include`.
    - "reached twice": another name of a file that is in the corpus; it is read once.
    - "empty": text and JSON lines files of 0 bytes. They stay in `Corpus.files`.
    - "broken link": a link to nothing.
    - "link loop": a link to a directory that the link itself lies in.
    - "not a file": a pipe, a socket or a device.
    - "metrics of a run": the metrics.jsonl of a training run that lies in the text; see `training.runs`.
    - "unreadable": what the operating system refuses to list, with `on_error="skip"`.
    """

    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)  # the first few of each reason; a directory ends in "/"

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] += 1
        names = self.names.setdefault(reason, [])
        if len(names) < KEPT_NAMES:
            names.append(printable(name))

    def __str__(self) -> str:
        parts = []
        for reason, count in sorted(self.counts.items()):
            more = ", ..." * (count > len(self.names[reason]))
            parts.append(f"{count} {reason} ({', '.join(self.names[reason])}{more})")
        return "; ".join(parts)


class Pattern:
    """A glob pattern of paths below a directory, as `Corpus` describes it."""

    def __init__(self, text: str, argument: str, *, ignore_case: bool = False):
        if not isinstance(text, str):
            raise TypeError(f"Corpus: {argument}: expected patterns (str), got {type(text).__name__}")
        body = text.removeprefix("./").rstrip("/")
        if not body:
            raise ValueError(f"Corpus: {argument}: expected a pattern that names files, got {text!r}")
        if "/" not in body:
            body = "*/" + body  # a name alone is meant at any depth
        elif not body.startswith(("/", "*")):
            body = "/" + body
        # A directory stands for all that is in it. But "*.txt" in `include` means files: of a directory x.txt only
        # what matches by itself.
        of_directories = argument == "exclude" or text.endswith("/") or not re.search(r"[*?[]", text)
        of_files = not text.endswith("/")
        tail = ("(?:/.*)?" if of_files else "/.*") if of_directories else ""
        try:
            self._regex = re.compile(_translate(body) + tail, re.DOTALL | (re.IGNORECASE if ignore_case else 0))
        except re.error as error:
            raise ValueError(f"Corpus: {argument}: expected a glob pattern, got {text!r} ({error})") from error
        self.text = text
        self.used = False  # has matched something

    def matches(self, name: str) -> bool:
        """Whether the pattern matches a path; that of a directory ends in "/" and matches only as a whole."""
        found = self._regex.fullmatch("/" + name) is not None
        self.used = self.used or found
        return found


def _translate(glob: str) -> str:
    """The regular expression of a glob pattern whose `*` also matches "/"."""
    parts = []
    for token in re.findall(r"/\*\*/|\*+|\?|\[!?\]?[^\]]*\]|.", glob, re.DOTALL):
        if token == "/**/":
            parts.append("/(?:.*/)?")  # any number of directories, also none
        elif token.startswith("*"):
            parts.append(".*")
        elif token == "?":
            parts.append("[^/]")
        elif token.startswith("[") and len(token) > 1:
            inner = token[1:-1].replace("\\", r"\\").replace("[", r"\[")
            parts.append(f"(?!/)[^{inner[1:]}]" if inner.startswith("!") else f"(?!/)[{inner}]")
        else:
            parts.append(re.escape(token))
    return "".join(parts)


class FoundFiles(NamedTuple):
    files: tuple[CorpusFile, ...]
    left_out: LeftOut
    unmatched: tuple[tuple[str, str], ...]  # ("include" or "exclude", pattern) for those that matched nothing


def find_files(
    roots: Sequence[Path], include: Sequence[str], exclude: Sequence[str], *, skip_unreadable: bool
) -> FoundFiles:
    """The files that `roots` stand for, in order; see `Corpus`. Raises CorpusError for what cannot be used."""
    default = tuple(include) == DEFAULT_INCLUDE
    included = [Pattern(text, "include", ignore_case=default) for text in include]
    excluded = [Pattern(text, "exclude") for text in exclude]
    search = _Search(included, excluded, skip_unreadable)
    for index, root in enumerate(roots):
        search.add(index, root)
    given = [("include", pattern) for pattern in included if not default]
    given += [("exclude", pattern) for pattern in excluded]
    unmatched = tuple((argument, pattern.text) for argument, pattern in given if not pattern.used)
    return FoundFiles(tuple(search.result()), search.left_out, unmatched)


class _Found(NamedTuple):
    root: int  # index of the root below which it was found
    name: str
    path: str
    real: str  # the path without links, which tells whether two names are of one file
    size: int


class _Search:
    """Collects the files of several roots."""

    def __init__(self, include: Sequence[Pattern], exclude: Sequence[Pattern], skip_unreadable: bool):
        self.include = include
        self.exclude = exclude
        self.skip_unreadable = skip_unreadable
        self.left_out = LeftOut()
        self.found: list[_Found] = []
        self.excluded: set[str] = set()  # real paths of files and directories

    def add(self, index: int, root: Path) -> None:
        try:
            info = os.stat(root)
        except (OSError, ValueError) as error:  # ValueError: the name has a NUL byte
            detail = "no such file or directory"
            if not isinstance(error, FileNotFoundError):
                detail = f"cannot be read ({os_reason(error) if isinstance(error, OSError) else error})"
            elif root.is_symlink():
                detail = "a broken link"
            raise problem("unreadable", detail, root) from error
        if stat.S_ISDIR(info.st_mode):
            self._walk(index, root)
        elif not stat.S_ISREG(info.st_mode):
            raise problem("unreadable", "expected a file or a directory, got a pipe, a socket or a device", root)
        else:
            self._add_file(index, root.name, str(root), os.path.realpath(root), info.st_size, given=True)

    def result(self) -> Iterator[CorpusFile]:
        """The files, each once, without those that are excluded under another name of theirs."""
        kept: dict[str, _Found] = {}
        for file in self.found:
            places = accumulate(file.real.split(os.sep), lambda above, name: f"{above}{os.sep}{name}")
            if self.excluded and not self.excluded.isdisjoint(places):  # the file or a directory above it
                self.left_out.add("excluded", file.name)
            elif file.real in kept:
                self.left_out.add("reached twice", file.name)
            else:
                kept[file.real] = file
        for file in sorted(kept.values()):  # by root, then by name
            path = Path(file.path)
            if file.size == 0 and kind_of(path) != "parquet" and not is_compressed(path):
                self.left_out.add("empty", file.name)
            yield CorpusFile(path, file.name, file.size)

    def _walk(self, index: int, root: Path) -> None:
        """Adds what is below a directory. Links are followed last, so that a file reached twice keeps its own name,
        and each link once, so that the walk ends."""
        folders = deque([(str(root), "", os.path.realpath(root))])
        links: deque[tuple[str, str, str]] = deque()
        followed = set()
        while folders or links:
            if not folders:
                path, name, place = links.popleft()
                real = os.path.realpath(path)
                is_loop = os.path.isdir(path) and os.path.join(place, "").startswith(os.path.join(real, ""))
                if is_loop:
                    if not self._is_left_out(name + "/", path):
                        self.left_out.add("link loop", name + "/")
                elif self._visit(index, name, path, real):
                    folders.append((path, name + "/", real))
                continue
            folder, prefix, real_folder = folders.popleft()
            for entry in self._list(folder, prefix):
                name, real = prefix + entry.name, os.path.join(real_folder, entry.name)
                if not entry.is_symlink():
                    if self._visit(index, name, entry.path, real):
                        folders.append((entry.path, name + "/", real))
                elif real not in followed:
                    followed.add(real)
                    links.append((entry.path, name, real_folder))

    def _list(self, folder: str, prefix: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                return sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            self._unreadable(error, folder, prefix)
            return []

    def _visit(self, index: int, name: str, path: str, real: str) -> bool:
        """Takes a file, or leaves something out; True for a directory that is to be walked."""
        try:
            info = os.stat(path)
        except OSError as error:
            if self._is_left_out(name, real):
                pass
            elif os.path.islink(path) and error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                self.left_out.add("broken link", name)
            else:
                self._unreadable(error, path, name)
            return False
        if stat.S_ISDIR(info.st_mode):
            return not self._is_left_out(name + "/", real)
        if stat.S_ISREG(info.st_mode):
            self._add_file(index, name, path, real, info.st_size)
        elif not self._is_left_out(name, real):
            self.left_out.add("not a file", name)
        return False

    def _add_file(self, index: int, name: str, path: str, real: str, size: int, *, given: bool = False) -> None:
        wanted = [pattern.matches(name) for pattern in self.include]
        if self._is_left_out(name, real, given=given):
            return
        if given or any(wanted):
            self.found.append(_Found(index, name, path, real, size))
        else:
            self.left_out.add("not included", name)

    def _is_left_out(self, name: str, real: str, *, given: bool = False) -> bool:
        """Whether the name of a file or directory keeps it out; if so, that is noted. A given file may be hidden."""
        matching = [pattern.matches(name) for pattern in self.exclude]  # all, so that each knows of its use
        if os.path.basename(name.rstrip("/")).startswith(".") and not given:
            self.left_out.add("hidden", name)
        elif any(matching):
            self.left_out.add("excluded", name)
            self.excluded.add(real)
        else:
            return False
        return True

    def _unreadable(self, error: OSError, path: str, name: str) -> None:
        if not self.skip_unreadable:
            raise problem("unreadable", f"cannot be read ({os_reason(error)})", Path(path)) from error
        self.left_out.add("unreadable", f"{name or path}: {os_reason(error)}")
