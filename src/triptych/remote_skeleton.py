"""A remote checkpoint as a folder of holes: every file with its name and size, of its bytes only headers, index and config.

Inspecting and planning read no more than that, so they work on it as on any folder. Whoever reads tensors does so through `holes.opened`,
which fetches them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from .errors import FormatError, TriptychError
from .formats.folder import INDEX, MAX_JSON, is_plain_name, read_json
from .formats.safetensors import MAX_HEADER
from .holes import filled
from .pieces import listed
from .remote import BLOCK, HTTP, RemoteFile, cut, info, is_remote, join, missing, names_below, scheme_of, shown, state_of
from .remote_web import Info

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor
    from tempfile import TemporaryDirectory

SUFFIX, CONFIG, OURS = ".safetensors", "config.json", "triptych-"
USUAL = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
         "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "chat_template.jinja", "preprocessor_config.json",
         "processor_config.json", "README.md", "LICENSE")  # fmt: skip
"""Files beside the weights that a server which lists nothing is asked for."""
AT_ONCE = 8


@dataclass(frozen=True)
class Skeleton:
    """Where to read headers, and what to call it. `states`: of remote files, what tells that one was changed."""

    path: Path
    name: str
    states: Mapping[str, int] | None = None
    notes: tuple[str, ...] = field(default=())

    def changed(self, file: str, time: int) -> int:
        """What tells that a file was changed: its time, for a local one."""
        return time if self.states is None else self.states[file]


P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def skeleton(path: str | Path) -> Iterator[Skeleton]:
    """A local path as it is; for a URL, a folder of holes that is gone behind the context. Raises FormatError, MissingExtraError."""
    if not is_remote(path):
        yield Skeleton(Path(path), str(path))
        return
    url = str(path).rstrip("/")
    single = shown(url).endswith(SUFFIX)
    root, name = cut(url) if single else (url, "")
    with _temporary() as folder:
        here = Path(folder)
        try:
            found = _single(root, name) if single else _named(root) if scheme_of(url) in HTTP else _listed(root)
            _check_formats(url, found)
            for one, told in found.items():
                _hole(here / one, told.size)
            _fill(here, root, found)
            states = {one: state_of(told) for one, told in found.items()}
            with filled(here, root, {one: told.size for one, told in found.items()}, states):
                yield Skeleton(here / name if single else here, url, states, tuple(_notes(url, single, found)))
        except TriptychError as error:
            error.fields = {label: _renamed(value, folder, shown(root)) for label, value in error.fields.items()}
            raise


def reading_urls(*names: str, told: Callable[[Any, dict[str, Skeleton]], Any] | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a function of paths one of URLs too: it is given folders of holes, and what it returns or raises tells of the URLs.

    names: of the parameters that may be URLs, as they stand from the first on; the dataclass that is returned has fields of the same names,
    or `told` makes of it what it should be.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        """The function with a folder of headers in the place of each URL that it is given."""

        @wraps(function)
        def call(*args: P.args, **given: P.kwargs) -> R:
            every = {**dict(zip(names, args, strict=False)), **{name: given[name] for name in names if name in given}}
            urls = {name: str(place).rstrip("/") for name, place in every.items() if isinstance(place, str) and is_remote(place)}
            if not urls:
                return function(*args, **given)
            with ExitStack() as stack:
                places = {name: stack.enter_context(skeleton(url)) for name, url in urls.items()}
                some = [places[name].path if name in places else place for name, place in zip(names, args, strict=False)]
                named = {**given, **{name: places[name].path for name in given if name in places}}
                found: Any = function(*some, *args[len(some) :], **named)  # type: ignore[arg-type]
                result: R = told(found, places) if told else replace(found, **urls)
            return result

        return call

    return decorate


def _renamed(value: object, folder: str, root: str) -> object:
    return str(value).replace(folder, root) if isinstance(value, (str, Path)) else value


def _temporary() -> TemporaryDirectory[str]:
    from tempfile import TemporaryDirectory  # who gives a path does not wait for this

    return TemporaryDirectory(prefix="triptych-")


def _pool() -> ThreadPoolExecutor:
    from concurrent.futures import ThreadPoolExecutor

    return ThreadPoolExecutor(AT_ONCE, "triptych")


def _single(root: str, name: str) -> dict[str, Info]:
    """One file, and the config beside it."""
    found = _asked(root, [name, CONFIG])
    if name not in found:
        raise missing(join(root, name))
    return found


def _listed(root: str) -> dict[str, Info]:
    found = {name: one for name, one in names_below(root).items() if not any(part.startswith(".") for part in name.split("/")[:-1])}
    for name in found:
        if any(part in ("", ".", "..") or "\0" in part or len(part.encode()) > 255 for part in name.split("/")):
            raise FormatError("a name that no file can have", where=shown(root), found=repr(name))
    return found


def _named(root: str) -> dict[str, Info]:
    """What a server which lists nothing has under the usual names, and the shards that its index names."""
    single = f"model{SUFFIX}"
    found = _asked(root, [single, single + INDEX, CONFIG, *USUAL])
    if single + INDEX in found:
        with _temporary() as folder:
            index = Path(folder) / (single + INDEX)
            _hole(index, found[index.name].size)
            _fetch(index, join(root, index.name), found[index.name])
            shards = read_json(index).get("weight_map")
        names = set(shards.values()) if isinstance(shards, dict) and set(map(type, shards.values())) == {str} else set()
        found |= _asked(root, [name for name in sorted(names) if is_plain_name(name)])
    return found


def _asked(root: str, names: Iterable[str]) -> dict[str, Info]:
    """Those of some files that are there."""

    def ask(name: str) -> tuple[str, Info | None]:
        try:
            return name, info(join(root, name))
        except FileNotFoundError:
            return name, None

    with _pool() as pool:
        return {name: found for name, found in pool.map(ask, names) if found is not None}


def _check_formats(url: str, found: Mapping[str, Info]) -> None:
    if not found:
        raise missing(url)
    top = sorted(name for name in found if name.count("/") <= _depth(found))
    if not any(name.endswith((SUFFIX, SUFFIX + INDEX)) for name in top):
        raise FormatError("no safetensors in this folder", where=shown(url), expected=f"model{SUFFIX} or model{SUFFIX}{INDEX}",
                          found=listed(top), try_="other formats are read from a disk alone: download it")  # fmt: skip


def _depth(found: Iterable[str]) -> int:
    """In how many folders the weights lie: 1 where there is a folder for each rank."""
    return min((name.count("/") for name in found if name.endswith((SUFFIX, SUFFIX + INDEX)) and name.count("/") < 2), default=0)


def _hole(path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)


def _fill(here: Path, root: str, found: Mapping[str, Info]) -> None:
    """Headers of the weights, index and config, several at a time."""
    every = [(name, name.rpartition("/")[2]) for name in found if name.count("/") <= _depth(found)]
    wanted = [name for name, last in every if last == CONFIG or last.startswith(OURS) or last.endswith((SUFFIX, SUFFIX + INDEX))]
    with _pool() as pool:
        list(pool.map(lambda name: _fetch(here / name, join(root, name), found[name]), wanted))


def _fetch(path: Path, url: str, told: Info) -> None:
    """Put the header of a safetensors file into its hole, or the whole of a JSON file."""
    size, at = told.size, 0
    file = RemoteFile(url)
    with path.open("r+b") as hole:
        if state_of(file.info) != state_of(told):
            raise FormatError("a file was changed while it was read", file=shown(url))
        stop = size if size <= MAX_JSON else 0
        if path.name.endswith(SUFFIX):
            first = file.read(0, min(8, size))
            hole.write(first)
            length, at = int.from_bytes(first, "little"), len(first)
            stop = 8 + length if length <= min(MAX_HEADER, size - 8) else 0  # else the reader of headers says what is wrong
        for start in range(at, stop, BLOCK):
            hole.write(file.read(start, min(start + BLOCK, stop)))


def _notes(url: str, single: bool, found: Mapping[str, Info]) -> Iterator[str]:
    if scheme_of(url) in HTTP and not single:
        others = sorted(name for name in found if not name.endswith((SUFFIX, SUFFIX + INDEX)))
        yield f"HTTP lists no files: beside the weights only the usual names were asked for, and found: {listed(others) or 'none'}"
