"""The command line: a skin over the functions of the same names. Results on stdout, talk on stderr.

Nothing heavy is imported before a command needs it, and errors become words in one place, `main`.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from . import __version__
from .cli_check import detect_, diff_, lint_, verify_
from .cli_options import options, show
from .cli_write import convert_, merge_, plan_, shard_
from .errors import TriptychError, printable

EXIT_CODES = """Exit codes: 0 done, 1 a mismatch was found, 2 usage (options, layouts, sizes), 3 input that cannot be read,
4 refused (nothing was written), 130 interrupted."""
INTERRUPTED, BUG = 130, 70


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit; every error is turned into text, or with --json into JSON, here."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        if "" in arguments:
            raise click.UsageError("an argument is empty: a variable of the shell that is not set?")
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
        if "unexpected extra argument" in error.format_message() and "=" in error.format_message():
            hint = "sizes are given with -s: -s h=32 -s d=128"
        text = f"UsageError: {printable(error.format_message())}\n  try      {hint}"
        code = _fail(2, text, {"error": "UsageError", "what": error.format_message(), "try": hint}, arguments)
    except (KeyboardInterrupt, click.Abort):
        writes = list(arguments[:1]) in (["convert"], ["shard"], ["merge"])
        text = "interrupted" + "; the input is untouched, and the same command goes on where this one stopped" * writes
        code = _fail(INTERRUPTED, text, {"error": "Interrupted", "what": text}, arguments)
    except BrokenPipeError:  # the reader of our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 0
    except OSError as error:
        file = str(error.filename) if error.filename is not None else "the output of this command"
        fields = {"file": file, "found": error.strerror}
        text = f"OSError: a file cannot be used\n  file     {printable(file)}\n  found    {error.strerror}"
        code = _fail(3, text, {"error": "OSError", "what": "a file cannot be used", **fields}, arguments)
    except Exception:
        traceback.print_exc()
        code = BUG
    sys.exit(code)


def _fail(code: int, text: str, table: dict[str, Any], arguments: Sequence[str]) -> int:
    click.echo(json.dumps({**table, "exit_code": code}) if "--json" in arguments else text, err=True)
    return code


@click.group(epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="triptych")
def commands() -> None:
    """Layouts of fused attention projections: say them, explain them, convert checkpoints, prove it."""


@commands.command("inspect")
@click.argument("path")
@options("layouts", "records", "check_weights")
def inspect_(path: str, layouts: dict[str, str], records: str | None, check_weights: bool, sizes: dict[str, int], as_json: bool) -> None:
    """What the checkpoint PATH holds: family, and layout, sizes and rotary order of its projections."""
    from .checkpoint import inspect
    from .formats import without_gc

    with without_gc():
        show(inspect(path, layouts=layouts, records=records, check_weights=check_weights, **sizes), as_json)


@commands.command("explain")
@click.argument("layout")
@click.argument("read_as", required=False)
@click.option("--ascii", "plain", is_flag=True, help="No box drawing characters.")
@options()
def explain_(layout: str, read_as: str | None, plain: bool, sizes: dict[str, int], as_json: bool) -> None:
    """Draw which rows belong to whom in LAYOUT, or what every head receives when they are read as READ_AS."""
    from .picture import explain
    from .render_text import text

    for word in (layout, read_as or ""):
        _check_no_family(word)
    picture = explain(layout, read_as, **sizes)
    if as_json:
        click.echo(json.dumps(picture.to_dict(), ensure_ascii=False))
        return
    terminal = sys.stdout.isatty()
    width = min(shutil.get_terminal_size().columns, 120) if terminal else 80
    plain = plain or not (sys.stdout.encoding or "").lower().startswith("utf")
    click.echo(text(picture, width, plain, terminal and "NO_COLOR" not in os.environ), color=terminal)


def _check_no_family(word: str) -> None:
    """A name of a family where a layout is wanted would be taken for an axis."""
    from .families import lookup

    if len(word) > 1 and not any(letter in word for letter in " (|)") and lookup(word):
        raise click.UsageError(
            f"{word} is a family, not a layout: `triptych families {word}` shows its layouts", click.get_current_context()
        )


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
    """Read the layouts off the model's own code: build the smallest model of PATH, a config.json or its folder, and run it once.

    Needs `pip install 'triptych[hf]'`. Code that a checkpoint brings is never run.
    """
    from pathlib import Path

    from .formats import read_json
    from .live.probe import probe

    file = Path(path)
    found = probe(read_json(file if file.is_file() else file / "config.json"))
    if as_json:
        click.echo(json.dumps({name: one.to_dict() for name, one in found.items()}))
        return
    for name, one in found.items():
        click.echo(printable(f"{name}   {one}"))


for _command in (plan_, convert_, verify_, diff_, detect_, lint_, shard_, merge_):
    commands.add_command(_command)


if __name__ == "__main__":
    main()
