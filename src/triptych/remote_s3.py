"""S3 and what speaks like it: requests signed by botocore, which also finds the credentials, the region and the endpoint.

botocore's own client, and what is built on it, takes 15 to 40 MB; the dozen requests that are needed here take none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import IO, Any
from urllib.parse import quote, unquote, urlencode
from xml.etree import ElementTree

from .remote_web import WINDOW, Info, check, parts, ranged, send, whole

EMPTY = hashlib.sha256().hexdigest()


class S3:
    """Objects in buckets: `s3://bucket/key`. Without credentials requests are sent unsigned, as public buckets take them."""

    def __init__(self) -> None:
        import botocore.session
        from botocore.configprovider import ConfiguredEndpointProvider

        session = botocore.session.get_session()
        self._credentials = session.get_credentials()
        self._region = session.get_config_variable("region") or "us-east-1"
        scoped = session.get_scoped_config()
        found = ConfiguredEndpointProvider(full_config=session.full_config, scoped_config=scoped, client_name="s3").provide()
        self._endpoint = (found or "").rstrip("/")
        self._virtual = (scoped.get("s3") or {}).get("addressing_style") == "virtual" if isinstance(scoped.get("s3"), dict) else False
        self._regions: dict[str, str] = {}

    def info(self, url: str) -> Info:
        answer = self._ask("HEAD", url)
        whole(answer)
        return Info(int(answer.headers["Content-Length"]), answer.headers.get("ETag", ""))

    def get(self, url: str, start: int, stop: int, tag: str) -> Iterator[bytes]:
        return ranged(self._ask("GET", url, headers={"Range": f"bytes={start}-{stop - 1}"}, good=(206,)), url, start, stop, tag)

    def names(self, url: str) -> dict[str, Info]:
        """All objects below a folder by their name there."""
        bucket, _, key = url.partition("://")[2].partition("/")
        prefix, found, more = f"{key.rstrip('/')}/" if key else "", dict[str, Info](), ""
        while True:
            query = {"list-type": "2", "prefix": prefix, "encoding-type": "url", **({"continuation-token": more} if more else {})}
            tree = self._tree(self._ask("GET", f"s3://{bucket}", query))
            for one in tree.iter("Contents"):
                name = unquote(_text(one, "Key")).removeprefix(prefix)
                found[name] = Info(int(_text(one, "Size")), _text(one, "ETag"))
            more = _text(tree, "NextContinuationToken")
            if not more and _text(tree, "IsTruncated") == "true":
                raise OSError("a list that is cut off, and does not say how it goes on")
            if not more:
                return found

    def put(self, url: str, data: bytes, tag: str | None = None) -> str:
        """Write an object; with `tag` only in place of the one with that tag, with "" only where there is none. Its tag is returned."""
        condition = {} if tag is None else {"If-Match": tag} if tag else {"If-None-Match": "*"}
        answer = self._ask("PUT", url, headers=condition, body=data, digest=hashlib.sha256(data).hexdigest())
        whole(answer)
        return str(answer.headers.get("ETag", ""))

    def remove(self, url: str) -> None:
        whole(self._ask("DELETE", url, good=(200, 204)))

    # One upload in parts

    def begin(self, url: str, size: int) -> str:
        return _text(self._tree(self._ask("POST", url, {"uploads": ""})), "UploadId")

    def part(self, url: str, upload: str, number: int, at: int, body: IO[bytes], size: int, total: int) -> str:
        """Send one part, numbers from 1; what `finish` needs of it is returned."""
        digest = hashlib.sha256()
        body.seek(0)
        for start in range(0, size, WINDOW):
            digest.update(body.read(min(WINDOW, size - start)))
        body.seek(0)
        query = {"partNumber": str(number), "uploadId": upload}
        answer = self._ask("PUT", url, query, {"Content-Length": str(size)}, body, digest.hexdigest())
        whole(answer)
        return str(answer.headers["ETag"])

    def finish(self, url: str, upload: str, tags: list[str]) -> None:
        text = "".join(f"<Part><PartNumber>{number}</PartNumber><ETag>{_escaped(tag)}</ETag></Part>" for number, tag in enumerate(tags, 1))
        body = f"<CompleteMultipartUpload>{text}</CompleteMultipartUpload>".encode()
        tree = self._tree(self._ask("POST", url, {"uploadId": upload}, body=body, digest=hashlib.sha256(body).hexdigest()))
        if _text(tree, "Code"):  # an error that comes with 200 OK
            raise OSError(f"{_text(tree, 'Code')}: {_text(tree, 'Message')}")

    def give_up(self, url: str, upload: str) -> None:
        whole(self._ask("DELETE", url, {"uploadId": upload}, good=(204, 404)))

    def give_up_all(self, url: str) -> None:
        """End the uploads of one object that a killed run left, which nobody sees and somebody pays for."""
        bucket, _, key = url.partition("://")[2].partition("/")
        tree = self._tree(self._ask("GET", f"s3://{bucket}", {"uploads": "", "prefix": key}))
        for one in tree.iter("Upload"):
            if _text(one, "Key") == key:
                self.give_up(url, _text(one, "UploadId"))

    # Requests

    def _ask(self, method: str, url: str, query: Mapping[str, str] | None = None, headers: Mapping[str, str] | None = None,
             body: Any = None, digest: str = EMPTY, good: tuple[int, ...] = (200,)) -> Any:  # fmt: skip
        """The answer to a signed request, in the region where the bucket is."""
        bucket, _, key = url.partition("://")[2].partition("/")
        for _ in range(2):
            region = self._regions.get(bucket, self._region)
            where = self._where(bucket, region) + quote(key, safe="/-_.~") + (f"?{urlencode(query, quote_via=quote)}" if query else "")
            answer = send(method, where, self._signed(method, where, headers or {}, digest, region), body, redirect=False)
            other = answer.headers.get("x-amz-bucket-region", region)
            if answer.status not in (301, 307, 400, 403) or other == region or hasattr(body, "read"):
                break
            self._regions[bucket] = other
            answer.close()
        return check(answer, url, *good)

    def _where(self, bucket: str, region: str) -> str:
        if self._endpoint and not self._virtual:
            return f"{self._endpoint}/{bucket}/"
        base = self._endpoint or f"https://s3.{region}.amazonaws.com" + (".cn" if region.startswith("cn-") else "")
        scheme, _, host = base.partition("://")
        return f"{base}/{bucket}/" if "." in bucket else f"{scheme}://{bucket}.{host}/"  # a certificate covers no name with dots

    def _signed(self, method: str, url: str, headers: Mapping[str, str], digest: str, region: str) -> dict[str, str]:
        if self._credentials is None:
            return dict(headers)
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest

        class Signing(S3SigV4Auth):  # type: ignore[misc]
            def payload(self, request: Any) -> str:
                return digest

        request = AWSRequest(method, url, dict(headers))
        Signing(self._credentials.get_frozen_credentials(), "s3", region).add_auth(request)
        return {str(name): str(value) for name, value in request.headers.items()}

    def _tree(self, answer: Any) -> ElementTree.Element:
        raw = b"".join(parts(answer, int(answer.headers["Content-Length"]))) if "Content-Length" in answer.headers else whole(answer)
        if b"<!" in raw:
            raise OSError("an answer with a document type, which S3 has not")
        tree = ElementTree.fromstring(raw)
        for one in tree.iter():
            one.tag = one.tag.rpartition("}")[2]
        return tree


def _text(tree: ElementTree.Element, name: str) -> str:
    return tree.findtext(name) or ""


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")
