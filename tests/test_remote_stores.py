"""How S3 is asked: signatures as AWS publishes them, where a bucket is, regions, answers that are errors; names of any letters."""

from __future__ import annotations

import datetime
import sys
from pathlib import Path
from typing import Any

import botocore.auth
import fsspec
import pytest

import triptych as tt
from triptych import remote_s3, remote_web
from triptych.remote_s3 import EMPTY, S3

from . import files, remote_servers
from .remote_servers import Bucket

server, bucket, source, done, small = (
    remote_servers.server, remote_servers.bucket, remote_servers.source, remote_servers.done, remote_servers.small,
)  # fmt: skip
SETTINGS = ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN")


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The settings of AWS's examples of signatures."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/none")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/none")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
    return monkeypatch


@pytest.mark.parametrize(
    ("path", "headers", "signature"),
    [
        ("/test.txt", {"Range": "bytes=0-9"}, "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"),
        ("/?max-keys=2&prefix=J", {}, "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"),
    ],
)  # fmt: skip
def test_signatures(
    plain: pytest.MonkeyPatch, path: str, headers: dict[str, str], signature: str
) -> None:  # docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html
    plain.setattr(botocore.auth, "get_current_datetime", lambda **_: datetime.datetime(2013, 5, 24))
    url = f"https://examplebucket.s3.amazonaws.com{path}"
    found = S3()._signed("GET", url, headers, EMPTY, "us-east-1")
    assert found["Authorization"].rpartition("Signature=")[2] == signature


def test_where_a_bucket_is(plain: pytest.MonkeyPatch) -> None:
    assert S3()._where("name", "eu-west-1") == "https://name.s3.eu-west-1.amazonaws.com/"
    assert S3()._where("with.dots", "cn-north-1") == "https://s3.cn-north-1.amazonaws.com.cn/with.dots/"
    plain.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9000/")
    assert S3()._where("name", "us-east-1") == "http://127.0.0.1:9000/name/"


class Answer:
    def __init__(self, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        self.status, self.headers, self.body, self.reason = status, headers, body, "-"

    def read(self, size: int, decode_content: bool | None = None) -> bytes:
        part, self.body = self.body[:size], self.body[size:]
        return part

    def close(self) -> None: ...
    def release_conn(self) -> None: ...
    def drain_conn(self) -> None: ...


def test_a_bucket_of_another_region_is_asked_there(plain: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def send(method: str, url: str, headers: dict[str, str], body: Any, redirect: bool) -> Answer:
        asked.append((url, headers["Authorization"].split("/")[2]))
        if "eu-west-1" not in url:
            return Answer(301, {"x-amz-bucket-region": "eu-west-1"})
        return Answer(200, {"Content-Length": "7", "ETag": '"x"'})

    plain.setattr(remote_s3, "send", send)
    store = S3()
    assert store.info("s3://b/k") == store.info("s3://b/k") == (7, '"x"')
    there = ("https://b.s3.eu-west-1.amazonaws.com/k", "eu-west-1")
    assert asked == [("https://b.s3.us-east-1.amazonaws.com/k", "us-east-1"), there, there]


def test_without_credentials_requests_are_bare(plain: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        plain.delenv(name)
    assert S3()._signed("GET", "https://b.s3.amazonaws.com/k", {"Range": "bytes=0-1"}, EMPTY, "us-east-1") == {"Range": "bytes=0-1"}


def test_an_error_that_comes_with_200(plain: pytest.MonkeyPatch) -> None:
    body = b"<Error><Code>InternalError</Code><Message>try again</Message></Error>"
    plain.setattr(remote_s3, "send", lambda *_, **__: Answer(200, {"Content-Length": str(len(body))}, body))
    with pytest.raises(OSError, match="InternalError: try again"):
        S3().finish("s3://b/k", "1", ['"x"'])


def test_a_range_that_was_not_asked_for() -> None:
    with pytest.raises(OSError, match="bytes 0-3/9 in place of bytes 4-7"):
        list(remote_web.ranged(Answer(206, {"Content-Range": "bytes 0-3/9"}, b"xxxx"), "http://host/x", 4, 8))


def test_names_of_any_letters(bucket: Bucket, source: Path, tmp_path: Path) -> None:
    more = {"x y+z.txt": b"1", "é&ü?#%20.txt": b"2", "a/b=c.json": b"{}"}
    bucket.put("süß & +/", {**files.snapshot(source), **more})
    tt.convert("s3://bucket/süß & +", "s3://bucket/ö", "split")
    assert {name: data for name, data in bucket.snapshot("ö/").items() if name in more} == more


def test_a_list_of_several_pages(plain: pytest.MonkeyPatch) -> None:
    begin = '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Contents><Key>a/'
    pages = [
        f"{begin}x%2By</Key><Size>3</Size><ETag>1</ETag></Contents><NextContinuationToken>m/+=</NextContinuationToken></ListBucketResult>",
        f"{begin}z</Key><Size>4</Size><ETag>2</ETag></Contents></ListBucketResult>",
    ]
    asked: list[str] = []

    def send(method: str, url: str, *_: Any, **__: Any) -> Answer:
        asked.append(url)
        return Answer(200, {"Content-Length": str(len(pages[0]))}, pages.pop(0).encode())

    plain.setattr(remote_s3, "send", send)
    pages[1] = pages[1].ljust(len(pages[0]))
    assert S3().names("s3://b/a") == {"x+y": (3, "1"), "z": (4, "2")}
    assert asked[1].endswith("prefix=a%2F&encoding-type=url&continuation-token=m%2F%2B%3D")


def test_every_other_store_through_fsspec(source: Path, tmp_path: Path) -> None:
    memory: Any = fsspec.filesystem("memory")
    for path in source.iterdir():
        memory.pipe(f"/there/model/{path.name}", path.read_bytes())
    assert tt.inspect("memory://there/model").projections == tt.inspect(source).projections
    tt.convert("memory://there/model", tmp_path / "far", "split")
    tt.convert(source, tmp_path / "near", "split")
    assert files.snapshot(tmp_path / "far") == files.snapshot(tmp_path / "near")
    with pytest.raises(tt.FormatError, match="no such file or folder"):
        tt.inspect("memory://there/none")


def test_kinds_of_urls_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(tt.PlanError, match="no such kind of URL"):
        tt.inspect("nowhere://host/x")
    with pytest.raises(tt.PlanError, match="not installed"):
        tt.inspect("az://host/x")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(tt.MissingExtraError, match="fsspec"):
        tt.inspect("az://host/x")
