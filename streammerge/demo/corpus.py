"""Three kinds of text that every Python installation carries: code, English prose, tables of numbers.

    code     the standard library's modules, their docstrings cut out
    prose    those docstrings (paragraphs of prose only), the help topics of pydoc, the licence
    tables   computed, see tables.py

One document is one module, one topic or one table. A document is held out when the hash of its name says
so (about one in ten); code and docstrings of one module share a name, so that no held-out module is seen
in training in either form. Documents come in the order of those hashes, which mixes the library's parts,
and stop at a byte limit. A paragraph of eighty bytes or more is kept once, in whichever document comes
first (help topics quote one another). Nothing here depends on anything but the Python installation.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from streammerge.demo.tables import all_tables
from streammerge.errors import MachineError

DOMAINS = ("code", "prose", "tables")
SEPARATOR = b"\0"  # between documents; occurs in no text
TRAIN_BYTES = 1_500_000
HELD_OUT_BYTES = 100_000
TABLES_PER_KIND = 400
HELD_OUT_SHARE = 10  # one document in ten
LONG_PARAGRAPH = 80  # bytes
LARGEST_MODULE = 200_000  # bytes; longer ones are data in Python's clothes
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}
    | {"__pycache__", "lib-dynload", "turtledemo", "ensurepip"}
)


@dataclass(frozen=True)
class Domain:
    """Text of one domain, as bytes, documents ended by SEPARATOR."""

    name: str
    train: bytes
    held_out: bytes

    @property
    def digest(self) -> str:
        """SHA-256 over both parts."""
        parts = (hashlib.sha256(part).digest() for part in (self.train, self.held_out))
        return hashlib.sha256(b"".join(parts)).hexdigest()


@dataclass(frozen=True)
class Document:
    """One unit of the split. `name` decides its order and its side."""

    name: str
    text: bytes

    @property
    def key(self) -> int:
        """A number that only the name decides, evenly spread."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:8], "big")


def gather() -> dict[str, Domain]:
    """The three domains of this Python installation; the same bytes at every call."""
    modules = list(_modules(Path(sysconfig.get_path("stdlib"))))
    documents: dict[str, Iterable[Document]] = {
        "code": (Document(name, code) for name, code, _ in modules),
        "prose": [*(Document(name, prose) for name, _, prose in modules if prose), *_topics(), *_licence()],
        "tables": (Document(name, text.encode()) for name, text in all_tables(TABLES_PER_KIND)),
    }
    domains = {name: split(name, documents[name]) for name in DOMAINS}
    for domain in domains.values():
        if len(domain.train) < TRAIN_BYTES // 10 or len(domain.held_out) < HELD_OUT_BYTES // 10:
            raise MachineError(
                f"demo: only {len(domain.train)} bytes of {domain.name} text in "
                f"{sysconfig.get_path('stdlib')}; run it with a Python that has its library's source"
            )
    return domains


def split(name: str, documents: Iterable[Document]) -> Domain:
    """Documents by the hash of their names into training and held-out text, each up to its limit."""
    sides: dict[bool, bytearray] = {False: bytearray(), True: bytearray()}
    limits = {False: TRAIN_BYTES, True: HELD_OUT_BYTES}
    seen: set[bytes] = set()
    for document in sorted(documents, key=lambda document: (document.key, document.name)):
        held_out = document.key % HELD_OUT_SHARE == 0
        text = unseen(document.text.replace(SEPARATOR, b" "), seen)
        if text and len(sides[held_out]) < limits[held_out]:
            sides[held_out] += text + SEPARATOR
    return Domain(name, *(bytes(sides[side][: limits[side]]) for side in (False, True)))


def unseen(text: bytes, seen: set[bytes]) -> bytes:
    """The text without those of its long paragraphs that are in `seen`, to which the others are added."""
    kept = []
    for paragraph in text.split(b"\n\n"):
        if len(paragraph) >= LONG_PARAGRAPH:
            if paragraph in seen:
                continue
            seen.add(paragraph)
        kept.append(paragraph)
    return b"\n\n".join(kept)


def _modules(root: Path) -> Iterator[tuple[str, bytes, bytes]]:
    """(relative path, code without docstrings, prose of the docstrings) of each module under root."""
    for path in _sources(root):
        source = path.read_bytes().replace(b"\r\n", b"\n")
        try:
            code, docstrings = separate(source.decode())
        except (SyntaxError, ValueError):  # a file in an old encoding is no loss among hundreds
            continue
        yield path.relative_to(root).as_posix(), code.encode(), "\n\n".join(docstrings).encode()


def _sources(folder: Path) -> Iterator[Path]:
    """Modules of ordinary size, in order of their names; what is no part of the library is not entered."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in SKIPPED_FOLDERS and not path.is_symlink():
            yield from _sources(path)
        elif path.suffix == ".py" and path.is_file() and 500 < path.stat().st_size < LARGEST_MODULE:
            yield path


def separate(source: str) -> tuple[str, list[str]]:
    """Code with its docstrings cut out, and the paragraphs of prose that were in them."""
    lines = source.split("\n")
    prose: list[str] = []
    cut: set[int] = set()
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, owners):
            continue
        text = ast.get_docstring(node)
        if text is None:
            continue
        prose += prose_paragraphs(text)
        first, last = node.body[0].lineno, node.body[0].end_lineno or node.body[0].lineno
        cut.update(range(first - 1, last))
    return "\n".join(line for at, line in enumerate(lines) if at not in cut).strip() + "\n", prose


def prose_paragraphs(text: str) -> list[str]:
    """Paragraphs that read as English: long ones, nearly all letters, spaces and commas."""
    kept = []
    for paragraph in text.split("\n\n"):
        plain = "\n".join(line.strip() for line in paragraph.strip().split("\n"))
        letters = sum(character.isalpha() or character in " \n,." for character in plain)
        if len(plain) >= LONG_PARAGRAPH and ">>>" not in plain and letters >= 0.93 * len(plain):
            kept.append(plain)
    return kept


def _topics() -> Iterator[Document]:
    """pydoc's help topics, which are the language reference in plain text."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return
    for name, text in topics.items():
        yield Document(f"topic {name}", "\n\n".join(prose_paragraphs(text)).encode())


def _licence() -> Iterator[Document]:
    """The licence of Python, where the installation keeps it beside the library."""
    path = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    if path.is_file():
        yield Document("licence", "\n\n".join(prose_paragraphs(path.read_text("utf-8", "replace"))).encode())
