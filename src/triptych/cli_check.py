"""The commands that prove and judge: verify, diff, detect, lint."""

from __future__ import annotations

import json
import os
from typing import Any

import click

from .cli_options import in_json, options, show
from .errors import MismatchError, PlanError, printable


@click.command("verify")
@click.argument("path")
@click.argument("out", required=False)
@click.option("--to", metavar="TARGET", help="What OUT must be, as for convert, where it has no stamp or shall not be believed.")
@click.option("--certificate", metavar="FILE", help="Write the certificate of the proof; with OUT alone: check OUT against it.")
@click.option("--logits", is_flag=True, help="Run both through transformers too: the first layer and projection that differ, in ulps.")
@options("overrides", "rope", "orientation", "names", "layouts", "records")
def verify_(
    path: str,
    out: str | None,
    to: str | None,
    certificate: str | None,
    logits: bool,
    sizes: dict[str, int],
    as_json: bool,
    **given: Any,
) -> int:
    """Prove row by row that OUT holds what PATH holds; or, `verify --certificate FILE OUT`, that OUT is what a certificate says.

    --to, --override, --rope, --linear, --conv1d and --name state what was asked of the conversion; without them OUT's stamp tells it.
    """
    from .certificate import certify, check_certificate
    from .verify import verify

    if out is None:
        if certificate is None or logits or to or sizes or any(given.values()):
            raise click.UsageError("give PATH and OUT, or --certificate FILE and OUT alone")
        show(check_certificate(certificate, path), as_json)
        return 0
    if certificate is not None and os.path.lexists(certificate):
        raise PlanError("the certificate exists", where=certificate, try_="remove it, or give another name")
    wrong: MismatchError | None = None
    result: dict[str, Any] = {}
    try:
        if certificate is None:
            proof = verify(path, out, to, **{**given, **sizes})
        else:
            made = certify(path, out, to, **{**given, **sizes})
            made.write(certificate)
            proof = made.proof
        result = proof.to_dict()
        if not as_json:
            click.echo(printable(str(proof)))
    except MismatchError as error:
        if not logits:
            raise
        wrong = error
    if logits:
        from .live.logits import logits as run_both

        ran = run_both(path, out)
        result["logits"] = ran.to_dict()
        if not as_json:
            click.echo(printable(str(ran)))
    if wrong is not None:
        if as_json:
            click.echo(in_json(result))
        raise wrong
    if as_json:
        click.echo(in_json(result))
    return 0


@click.command("diff")
@click.argument("a")
@click.argument("b")
@options("records")
def diff_(a: str, b: str, records: str | None, sizes: dict[str, int], as_json: bool) -> int:
    """What differs between the checkpoints A and B, tensor by tensor: nothing, the order of rows, a scale, the dtype, or more."""
    from .diff import diff

    found = diff(a, b, records=records, **sizes)
    show(found, as_json)
    return 0 if found.equal else 1


@click.command("detect")
@click.argument("path")
@click.argument("tensor", required=False)
@options()
def detect_(path: str, tensor: str | None, sizes: dict[str, int], as_json: bool) -> None:
    """Which layouts the fused weights of PATH (or those named TENSOR, a glob) have, by their values alone.

    Evidence, never a decision: it may answer "cannot tell". -s h=12 -s g=4 tell the numbers of heads.
    """
    from .detect_files import detect_checkpoint

    for axis in sizes:
        if axis not in ("h", "g"):
            raise click.BadParameter(f"weights are asked with h and g only, not {axis!r}")
    show(detect_checkpoint(path, tensor, heads=sizes.get("h"), kv_heads=sizes.get("g")), as_json)


@click.command("lint")
@click.argument("path")
@click.option("--fast", is_flag=True, help="Headers, indexes, config, stamps and pickles only: no numbers are read.")
@click.option("--strict", is_flag=True, help="Exit code 1 for warnings too.")
@click.option("--ignore", multiple=True, metavar="RULE", help="Leave a rule out; may be given several times.")
@click.option("--sarif", is_flag=True, help="The report as SARIF 2.1.0.")
@options("records", "check_weights")
def lint_(
    path: str,
    fast: bool,
    strict: bool,
    ignore: tuple[str, ...],
    sarif: bool,
    records: str | None,
    check_weights: bool,
    sizes: dict[str, int],
    as_json: bool,
) -> int:
    """What is wrong with the checkpoint PATH: exit code 1 with any error, 0 with warnings alone. docs/lint has a page for each rule."""
    from .lint import RULES, lint

    if unknown := set(ignore) - {rule.id for rule in RULES}:
        raise click.BadParameter(f"no rule is called {', '.join(sorted(unknown))}: {', '.join(rule.id for rule in RULES)} are")
    report = lint(path, fast=fast, check_weights=check_weights, ignore=ignore, records=records, **sizes)
    if sarif:
        click.echo(json.dumps(report.to_sarif(strict)))
    else:
        show(report, as_json)
    return report.exit_code(strict)
