"""The commands that write: plan, convert, shard, merge."""

from __future__ import annotations

from typing import Any

import click

from .cli_options import PLANNING, Function, carry_out, options, pairs, running, show


@click.command("plan")
@click.argument("path")
@click.argument("out", required=False)
@options(*PLANNING)
def plan_(path: str, out: str | None, sizes: dict[str, int], as_json: bool, **asked: Any) -> None:
    """What converting PATH (to OUT) would do; nothing is written."""
    from .plan import plan

    show(plan(path, out=out, **{**asked, **sizes}), as_json)


@click.command("convert")
@click.argument("path")
@click.argument("out")
@options(*PLANNING)
@running
def convert_(path: str, out: str, sizes: dict[str, int], as_json: bool, **given: Any) -> None:
    """Write the checkpoint PATH to OUT with its projections turned into TARGET. The input is only read."""
    from .plan import plan
    from .run import run

    asked = {name: given.pop(name) for name in PLANNING}
    made = plan(path, out=out, **{**asked, **sizes})
    carry_out(made, made, run, as_json, **given)


def divided(function: Function) -> Function:
    """How tensors are divided among ranks."""
    every = (
        click.option("--kv", type=click.Choice(["replicate", "rows"]),
                     help="Fewer kv heads than ranks: whole heads (vLLM) or rows (Megatron)."),
        click.option("--pad-vocab-to", type=click.IntRange(1, 1 << 20), metavar="N",
                     help="The vocabulary is filled with zeros to a multiple of N."),
        click.option("--rule", "rules", multiple=True, metavar="GLOB=ROLE", callback=pairs("NAME_GLOB=column, row, vocab or copy"),
                     help="How ranks divide some tensors, where no layout and no table says: column, row, vocab, copy."),
    )  # fmt: skip
    for option in reversed(every):
        function = option(function)
    return function


@click.command("shard")
@click.argument("path")
@click.argument("out", required=False)
@click.option("--tp", type=click.IntRange(1, 1024), required=True, metavar="N", help="How many tensor-parallel ranks.")
@divided
@options("layouts", "records")
@running
def shard_(
    path: str,
    out: str | None,
    tp: int,
    kv: str | None,
    pad_vocab_to: int | None,
    rules: dict[str, str],
    layouts: dict[str, str],
    records: str | None,
    sizes: dict[str, int],
    as_json: bool,
    **ran: Any,
) -> None:
    """Divide the checkpoint PATH among N ranks: folders OUT/rank-0-of-N and so on. A PATH with such folders is divided anew."""
    from .shard import carry_out as work
    from .shard_plan import shard_plan

    made = shard_plan(path, tp, out, kv=kv, pad_vocab_to=pad_vocab_to, layouts=layouts, rules=rules, records=records, **sizes)
    carry_out(made.plan, made, work, as_json, **ran)


@click.command("merge")
@click.argument("path")
@click.argument("out", required=False)
@click.option("--tp", type=click.IntRange(1, 1024), metavar="N", help="How many ranks there must be.")
@divided
@options("layouts", "records")
@running
def merge_(
    path: str,
    out: str | None,
    tp: int | None,
    kv: str | None,
    pad_vocab_to: int | None,
    rules: dict[str, str],
    layouts: dict[str, str],
    records: str | None,
    sizes: dict[str, int],
    as_json: bool,
    **ran: Any,
) -> None:
    """Join the ranks below PATH into one checkpoint OUT. What several ranks hold must be equal.

    Ranks that others wrote have no table: config.json and the options say how they were divided.
    """
    from .shard import carry_out as work
    from .shard_plan import merge_plan

    made = merge_plan(path, out, tp=tp, kv=kv, pad_vocab_to=pad_vocab_to, layouts=layouts, rules=rules, records=records, **sizes)
    carry_out(made.plan, made, work, as_json, **ran)
