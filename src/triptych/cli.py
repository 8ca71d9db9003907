"""The command line: a skin over the functions of the same names. Results on stdout, talk on stderr.

Nothing heavy is imported before a command needs it, and errors become words in one place, `main`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .errors import TriptychError, printable

if TYPE_CHECKING:
    from .mover import Tick
    from .steps import Plan

EXIT_CODES = """Exit codes: 0 done, 1 a mismatch was found, 2 usage (options, layouts, sizes), 3 input that cannot be read,
4 refused (nothing was written), 130 interrupted."""
INTERRUPTED, BUG = 130, 70
NOT_AXES = frozenset(["path", "out", "to", "layouts", "names", "records", "workers", "progress"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit; every error is turned into text, or with --json into JSON, here."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        result = commands.main(arguments, prog_name="triptych", standalone_mode=False)
        sys.stdout.flush()
        code = result if isinstance(result, int) else 0
    except TriptychError as error:
        code = _fail(error.exit_code, error.text(), error.to_dict(), arguments)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        code = 2
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f"{context.command_path if context else 'triptych'} --help"
        text = f"UsageError: {printable(error.format_message())}\n  try      {hint}"
        code = _fail(2, text, {"error": "UsageError", "what": error.format_message(), "try": hint}, arguments)
    except (KeyboardInterrupt, click.Abort):
        text = "interrupted; the input is untouched, and the same command goes on where this one stopped"
        code = _fail(INTERRUPTED, text, {"error": "Interrupted", "what": text}, arguments)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 0
    except OSError as error:
        fields = {"file": str(error.filename), "found": error.strerror}
        text = f"OSError: a file cannot be used\n  file     {printable(fields['file'] or '')}\n  found    {error.strerror}"
        code = _fail(3, text, {"error": "OSError", "what": "a file cannot be used", **fields}, arguments)
    except Exception:
        traceback.print_exc()
        code = BUG
    sys.exit(code)


def _fail(code: int, text: str, table: dict[str, Any], arguments: Sequence[str]) -> int:
    click.echo(json.dumps({**table, "exit_code": code}) if "--json" in arguments else text, err=True)
    return code


def _show(result: Any, as_json: bool) -> None:
    """A result on stdout: its text, with names of unknown origin made harmless, or its JSON."""
    click.echo(json.dumps(result.to_dict(), ensure_ascii=False) if as_json else printable(str(result)))


def _pairs(what: str) -> Callable[[click.Context, click.Parameter, tuple[str, ...]], dict[str, str]]:
    def parse(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, str]:
        out: dict[str, str] = {}
        for value in values:
            left, equals, right = (word.strip() for word in value.partition("="))
            if not left or not equals or not right:
                raise click.BadParameter(f"{value!r} is not {what}", context, parameter)
            if out.setdefault(left, right) != right:
                raise click.BadParameter(f"{left!r} is given twice", context, parameter)
        return out

    return parse


def _sizes(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[str, int]:
    out = {}
    for name, size in _pairs("AXIS=NUMBER, e.g. h=32")(context, parameter, values).items():
        if not size.isascii() or not size.isdecimal() or len(size) > 18:
            raise click.BadParameter(f"the size of {name!r} must be a positive whole number, not {size!r}", context, parameter)
        if name in NOT_AXES:
            raise click.BadParameter(f"unknown axis {name!r}", context, parameter)
        out[name] = int(size)
    return out


def _options(*wanted: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options that several commands share, in the order of their help."""
    every = {
        "to": click.option("--to", required=True, metavar="TARGET", help="A layout, `split`, or `fused:LAYOUT`."),
        "layouts": click.option(
            "--layout", "layouts", multiple=True, metavar="GLOB=LAYOUT", callback=_pairs("NAME_GLOB=LAYOUT"),
            help="How the rows of some tensors lie, where no config says; `LAYOUT @ 1` for weights stored [in, out].",
        ),
        "records": click.option(
            "--records", metavar="FILE", help="Family records of your own, asked before ours (docs/add-a-family.md).",
        ),
        "names": click.option(
            "--name", "names", multiple=True, metavar="OLD=NEW", callback=_pairs("OLD=NEW"),
            help="Another name for an output tensor; `*` stands for the same text in both.",
        ),
        "sizes": click.option(
            "-s", "--size", "sizes", multiple=True, metavar="AXIS=N", callback=_sizes, help="The size of an axis, e.g. -s h=32.",
        ),
        "as_json": click.option("--json", "as_json", is_flag=True, help="The result, or the error, as JSON."),
    }  # fmt: skip

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for name in reversed([*wanted, "sizes", "as_json"]):
            function = every[name](function)
        return function

    return decorate


@click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="triptych")
def commands() -> None:
    """Layouts of fused attention projections: say them, explain them, convert checkpoints, prove it."""


@commands.command("inspect")
@click.argument("path")
@_options("layouts", "records")
def inspect_(path: str, layouts: dict[str, str], records: str | None, sizes: dict[str, int], as_json: bool) -> None:
    """What the checkpoint PATH holds: family, and layout, sizes and rotary order of its projections."""
    from .checkpoint import inspect

    _show(inspect(path, layouts=layouts, records=records, **sizes), as_json)


@commands.command("explain")
@click.argument("layout")
@click.argument("read_as", required=False)
@click.option("--ascii", "plain", is_flag=True, help="No box drawing characters.")
@_options()
def explain_(layout: str, read_as: str | None, plain: bool, sizes: dict[str, int], as_json: bool) -> None:
    """Draw which rows belong to whom in LAYOUT, or what every head receives when they are read as READ_AS."""
    from .picture import explain
    from .render_text import text

    picture = explain(layout, read_as, **sizes)
    if as_json:
        click.echo(json.dumps(picture.to_dict(), ensure_ascii=False))
        return
    terminal = sys.stdout.isatty()
    width = min(shutil.get_terminal_size().columns, 120) if terminal else 80
    plain = plain or not (sys.stdout.encoding or "").lower().startswith("utf")
    click.echo(text(picture, width, plain, terminal and "NO_COLOR" not in os.environ), color=terminal)


@commands.command("plan")
@click.argument("path")
@click.argument("out", required=False)
@_options("to", "layouts", "names", "records")
def plan_(
    path: str,
    out: str | None,
    to: str,
    layouts: dict[str, str],
    names: dict[str, str],
    records: str | None,
    sizes: dict[str, int],
    as_json: bool,
) -> None:
    """What converting PATH (to OUT) would do; nothing is written."""
    from .plan import plan

    _show(plan(path, to, out, layouts=layouts, names=names, records=records, **sizes), as_json)


@commands.command("convert")
@click.argument("path")
@click.argument("out")
@_options("to", "layouts", "names", "records")
@click.option("--workers", type=click.IntRange(1, 64), default=2, show_default=True, help="Files written at a time.")
@click.option("--dry-run", is_flag=True, help="Show the plan and write nothing.")
def convert_(
    path: str,
    out: str,
    to: str,
    layouts: dict[str, str],
    names: dict[str, str],
    records: str | None,
    sizes: dict[str, int],
    workers: int,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write the checkpoint PATH to OUT with its projections turned into TARGET. The input is only read."""
    from .plan import plan
    from .run import run

    made = plan(path, to, out, layouts=layouts, names=names, records=records, **sizes)
    if dry_run:
        _show(made, as_json)
        return
    for note in made.notes:
        click.echo(f"note: {printable(note)}", err=True)
    with _progress(made, quiet=as_json) as tick:
        done = run(made, workers=workers, progress=tick)
    _show(done, as_json)


@commands.command("verify")
@click.argument("path")
@click.argument("out")
@click.option("--to", metavar="TARGET", help="What OUT must be, as for convert, when its stamp alone shall not be believed.")
@_options("layouts", "records")
def verify_(
    path: str, out: str, to: str | None, layouts: dict[str, str], records: str | None, sizes: dict[str, int], as_json: bool
) -> None:
    """Prove row by row that OUT holds what PATH holds."""
    from .verify import verify

    _show(verify(path, out, to, layouts=layouts, records=records, **sizes), as_json)


@commands.command("detect")
@click.argument("path")
@click.argument("tensor", required=False)
@_options()
def detect_(path: str, tensor: str | None, sizes: dict[str, int], as_json: bool) -> None:
    """Which layouts the fused weights of PATH (or those named TENSOR, a glob) have, by their values alone.

    Evidence, never a decision: it may answer "cannot tell". -s h=12 -s g=4 tell the numbers of heads.
    """
    from .detect_files import detect_checkpoint

    for axis in sizes:
        if axis not in ("h", "g"):
            raise click.BadParameter(f"weights are asked with h and g only, not {axis!r}")
    _show(detect_checkpoint(path, tensor, heads=sizes.get("h"), kv_heads=sizes.get("g")), as_json)


@commands.command("families")
@click.argument("name", required=False)
@click.option("--config", metavar="FILE", help="A config.json: sizes become numbers, and its flags choose the variants.")
@click.option("--json", "as_json", is_flag=True, help="The result, or the error, as JSON.")
def families_(name: str | None, config: str | None, as_json: bool) -> None:
    """List the families that are known, or show layouts, sizes, sources and verification of family NAME."""
    from pathlib import Path

    from . import families
    from .formats import read_json

    if name is None:
        known = families.families()
        lines = [f"{one['family']:<28} {'   '.join(one['layouts'])}" for one in known]
        click.echo(json.dumps(known) if as_json else "\n".join(lines))
        return
    rows = families.show(name, read_json(Path(config)) if config else None)
    if config:
        rows = [row for row in rows if row["applies"] is not False]
    click.echo(json.dumps(rows) if as_json else printable("\n".join(map(_family_text, rows))))


def _family_text(row: dict[str, Any]) -> str:
    when = f"   when {row['when']}" if row["when"] else ""
    lines = [
        f"{row['tensor']}   ({row['stored']}, axis {row['axis']}){when}",
        f"    layout    {row['layout']}   with {row['sizes']}",
        f"    rotary    {row['rope'] or 'none'}",
        f"    split to  {', '.join(f'{part}: {name}' for part, name in row['parts'].items())}",
        f"    source    {row['source']}, read {row['checked']}",
        f"    verified  {row['verified']}",
        f"    note      {row['note']}" if row["note"] else "",
    ]
    return "\n".join(line for line in lines if line)


@commands.command("probe")
@click.argument("path")
@click.option("--json", "as_json", is_flag=True, help="The result, or the error, as JSON.")
def probe_(path: str, as_json: bool) -> None:
    """Read the layouts off the model's own code: build the smallest model of the config.json in folder PATH and run it once.

    Needs `pip install 'triptych[hf]'`. Code that a checkpoint brings is never run.
    """
    from pathlib import Path

    from .formats import read_json
    from .live.probe import probe

    found = probe(read_json(Path(path) / "config.json"))
    if as_json:
        click.echo(json.dumps({name: one.to_dict() for name, one in found.items()}))
        return
    for name, one in found.items():
        click.echo(printable(f"{name}   {one}"))


@contextmanager
def _progress(made: Plan, quiet: bool) -> Iterator[Tick | None]:
    """A bar on stderr while a person is looking."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=made.size)
        yield lambda size: bar.advance(task, size)


if __name__ == "__main__":
    main()
