"""Every class of injected errors is seen by `verify`, by the certificate and by the script without this package; and the page says so."""

from __future__ import annotations

from pathlib import Path

import pytest

import triptych as tt
from tests import injected
from tests.injected import ERRORS, GIVEN, PAGE, SIZES, Case, Error, certificate_script, files

CHECK = certificate_script().check


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return injected.case(tmp_path_factory.mktemp("right"))


def test_sizes_hide_nothing() -> None:
    sizes = [injected.H, injected.G, injected.H // injected.G, injected.D, injected.IN, injected.ROWS]
    assert len(set(sizes)) == len(sizes) and len(ERRORS) >= 20 and len({error.name for error in ERRORS}) == len(ERRORS)


def test_the_right_output_passes(right: Case, tmp_path: Path) -> None:
    nothing = injected.injected(right, Error("nothing", lambda out, old: None), tmp_path / "c")
    assert files.read(nothing) == files.read(right.out)
    assert not injected.verify_sees(right, nothing)
    assert not injected.certificate_sees(right.certificate, nothing)
    assert "11 tensors are as certified" in CHECK(right.certificate, nothing, right.path)
    assert not injected.script_sees(CHECK, injected.forged(right, nothing, tmp_path / "f.json"), nothing, right.path)
    assert all(injected.misses(right, Error("nothing", lambda out, old: None), nothing).values())


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: error.name)
def test_every_error_is_seen(right: Case, tmp_path: Path, error: Error) -> None:
    wrong = injected.injected(right, error, tmp_path / "c")
    assert injected.verify_sees(right, wrong)
    assert injected.certificate_sees(right.certificate, wrong)
    assert injected.script_sees(CHECK, right.certificate, wrong)


@pytest.mark.parametrize("error", [error for error in ERRORS if error.then is None], ids=lambda error: error.name)
def test_a_tool_that_certifies_its_own_error_is_seen(right: Case, tmp_path: Path, error: Error) -> None:
    """Digests of the wrong output in the certificate: then the layouts and the input's digests are all that is left, and enough."""
    wrong = injected.injected(right, error, tmp_path / "c")
    certificate = injected.forged(right, wrong, tmp_path / "f.json")
    apart = files.read(wrong) != files.read(right.out)
    assert injected.script_sees(CHECK, certificate, wrong) == apart
    assert injected.certificate_sees(certificate, wrong) == apart


def test_the_page_is_what_is_computed() -> None:
    assert PAGE.read_text() == injected.page()


def test_a_damaged_certificate_is_no_pass(right: Case, tmp_path: Path) -> None:
    text = right.certificate.read_text()
    changes = {
        '"g (q r|k|v) p c"': '"g (q r|v|k) p c"',
        '"h": 6': '"h": 3',
        '"axis": 0': '"axis": 1',
        '"(q h|k g|v g) c p"': '"(q h|v g|k g) c p"',
    }
    for old, new in changes.items():
        assert old in text
        (tmp_path / "c.json").write_text(text.replace(old, new))
        assert injected.certificate_sees(tmp_path / "c.json", right.out) and injected.script_sees(CHECK, tmp_path / "c.json", right.out)
    assert tt.verify(right.path, right.out, layouts=GIVEN, **SIZES).projections == 8
