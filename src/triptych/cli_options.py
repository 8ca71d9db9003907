"""What the commands share: options, and ways to show a result and to carry out a plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .errors import PlanError, printable

if TYPE_CHECKING:
    from .steps import Plan

Function = TypeVar("Function", bound=Callable[..., Any])
Made = TypeVar("Made")
PROGRESS = ("auto", "plain", "json", "none")
NOT_AXES = frozenset(["path", "out", "to", "layouts", "names", "records", "workers", "progress", "tp", "kv", "pad_vocab_to", "rules",
                        "check_weights", "fast", "ignore", "rope", "orientation", "overrides", "max_shard_size"])  # fmt: skip
"""Arguments of the functions behind the commands, which take sizes of axes by name beside them."""


def show(result: Any, as_json: bool) -> None:
    """A result on stdout: its text, with names of unknown origin made harmless, or its JSON."""
    click.echo(in_json(result.to_dict()) if as_json else printable(str(result)))


def in_json(value: Any) -> str:
    """JSON on one line; characters that cannot be printed, or written, stand as escapes."""
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


def pairs(what: str) -> Callable[[click.Context, click.Parameter, tuple[str, ...]], dict[str, str]]:
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
    for name, size in pairs("AXIS=NUMBER, e.g. h=32")(context, parameter, values).items():
        if not size.isascii() or not size.isdecimal() or len(size) > 18:
            more = "; each size has its own -s" if "," in size else ""
            raise click.BadParameter(f"the size of {name!r} must be a positive whole number, not {size!r}{more}", context, parameter)
        if name in NOT_AXES:
            raise click.BadParameter(f"unknown axis {name!r}", context, parameter)
        out[name] = int(size)
    return out


def _share(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    number, slash, of = value.partition("/")
    if not slash or not all(word.isascii() and word.isdecimal() and len(word) < 6 for word in (number, of)):
        raise click.BadParameter(f"{value!r} is not I/N, e.g. 2/8", context, parameter)
    if not 1 <= int(number) <= int(of):
        raise click.BadParameter(f"{value!r} is no share: 1/N to N/N", context, parameter)
    return int(number), int(of)


def _bytes(context: click.Context, parameter: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    from .outfiles import bytes_of

    try:
        return bytes_of(value)
    except PlanError as error:
        raise click.BadParameter(f"{error.what}: {error.fields['found']}, not {error.fields['expected']}", context, parameter) from None


def _orientation(context: click.Context, parameter: click.Parameter, value: bool | None) -> str | None:
    return None if value is None else "linear" if value else "conv1d"


def options(*wanted: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The options that several commands share, in the order of their help."""
    every = {
        "to": click.option("--to", metavar="TARGET", help="A layout, `split`, `fused:LAYOUT`, or `keep`."),
        "overrides": click.option(
            "--override", "overrides", multiple=True, metavar="GLOB=TARGET", callback=pairs("NAME_GLOB=TARGET"),
            help="Another target for some projections, in the words of --to.",
        ),
        "rope": click.option(
            "--rope", type=click.Choice(["half", "interleaved"]), help="Rotary order of the result; norms of q and k follow.",
        ),
        "orientation": click.option(
            "--linear/--conv1d", "orientation", default=None, callback=_orientation,
            help="Store weights of projections (and GPT-2's other Conv1D) [out, in], or [in, out] as transformers' Conv1D does.",
        ),
        "max_shard_size": click.option(
            "--max-shard-size", metavar="SIZE", callback=_bytes, help="Cut the output into files of at most this size, e.g. 5GB.",
        ),
        "layouts": click.option(
            "--layout", "layouts", multiple=True, metavar="GLOB=LAYOUT", callback=pairs("NAME_GLOB=LAYOUT"),
            help="How the rows of some tensors lie, where no config says; `LAYOUT @ 1` for weights stored [in, out].",
        ),
        "records": click.option(
            "--records", metavar="FILE", help="Family records of your own, asked before ours (docs/add-a-family.md).",
        ),
        "names": click.option(
            "--name", "names", multiple=True, metavar="OLD=NEW", callback=pairs("OLD=NEW"),
            help="Another name for an output tensor; `*` stands for the same text in both.",
        ),
        "sizes": click.option(
            "-s", "--size", "sizes", multiple=True, metavar="AXIS=N", callback=_sizes, help="The size of an axis, e.g. -s h=32.",
        ),
        "check_weights": click.option(
            "--check-weights", is_flag=True, help="Ask the weights too: stop where they contradict record, stamp or --layout.",
        ),
        "as_json": click.option("--json", "as_json", is_flag=True, help="The result, or the error, as JSON."),
    }  # fmt: skip

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed([*wanted, "sizes", "as_json"]):
            function = every[name](function)
        return function

    return decorate


PLANNING = ("to", "overrides", "rope", "orientation", "max_shard_size", "layouts", "names", "records", "check_weights")
"""Options of everything that makes a plan of a conversion."""
_RUNNING = (
    click.option("--workers", type=click.IntRange(1, 64), default=2, show_default=True, help="How many write at a time."),
    click.option("--share", metavar="I/N", callback=_share, help="Write only this share of the work, one job of N; then --finish."),
    click.option("--finish", is_flag=True, help="Complete what all shares have written."),
    click.option("--engine", type=click.Choice(["threads", "ray"]), default="threads", show_default=True, help="Who does the work."),
    click.option("--address", metavar="ADDRESS", help="Of a Ray cluster, e.g. auto; without it one is started here."),
    click.option(
        "--progress", "mode", type=click.Choice(PROGRESS), default="auto", show_default=True, help="How far it has come, on stderr."
    ),
    click.option("--dry-run", is_flag=True, help="Show the plan and write nothing."),
)


def running(function: Function) -> Function:
    """The options of everything that carries out a plan, for `carry_out`."""
    for option in reversed(_RUNNING):
        function = option(function)
    return function


def carry_out(
    plan: Plan,
    made: Made,
    work: Callable[..., Any],
    as_json: bool,
    *,
    workers: int,
    share: tuple[int, int] | None,
    finish: bool,
    engine: str,
    address: str | None,
    mode: str,
    dry_run: bool,
) -> None:
    """Show what was `made` (a plan, or what holds one), or let `work` carry it out and show what it did."""
    if address and engine != "ray":
        raise click.BadParameter("an address is that of a Ray cluster: --engine ray")
    if share and finish:
        raise click.UsageError("--finish comes after all shares: leave --share out", click.get_current_context())
    if dry_run:
        show(made, as_json)
        return
    if plan.out is None:
        raise click.UsageError("Missing argument 'OUT'.", click.get_current_context())
    for note in plan.notes:
        click.echo(f"note: {printable(note)}", err=True)
    from .progress import progress
    from .run_ray import on_ray

    with progress("none" if as_json and mode == "auto" else mode, plan.size) as tick:
        ray = on_ray(address, workers) if engine == "ray" else None
        done = work(made, workers=workers, progress=tick, share=share, finish=finish, engine=ray)
    show(done, as_json)
