"""Where input lies: local files and object stores, listed through fsspec and read through Polars."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO, cast
from urllib.parse import unquote

from isal import igzip, isal_zlib
from pydantic import AfterValidator, Field, field_validator, model_validator

from galray.errors import GalrayError
from galray.settings import Settings

__all__ = [
    "CorruptStream",
    "Location",
    "Storage",
    "StorageSettings",
    "access_denied",
    "decompressed",
    "explained",
    "is_url",
]

CorruptStream = cast(type[Exception], isal_zlib.error)
"""What is raised where the bytes of a gzipped stream make no sense."""

_SECRET = re.compile(r"secret|token|password|credential|private|account_key|access_key|sas", re.IGNORECASE)
_READ_BLOCK = 16 << 20
_EXTRAS = {
    "s3": "galray[s3]",
    "s3a": "galray[s3]",
    "gs": "galray[gs]",
    "gcs": "galray[gs]",
    "az": "adlfs",
    "abfs": "adlfs",
}


def is_url(path: object) -> bool:
    """True for ``scheme://…``, but not for a path."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://", str(path)) is not None


def _location(text: str) -> str:
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:/(?!/)", text):
        raise ValueError(
            f"'{text}' is neither a path nor a URL: a URL has two slashes, as s3://bucket/folder"
        )
    if re.match(r"[^/]+://[^/]*:[^/]*@", text):  # not to be repeated on terminals and in logs
        raise ValueError("it holds a password, which a configuration must not: set it in the environment")
    if text.startswith("file://"):
        if not text.startswith("file:///"):
            raise ValueError(f"'{text}' names another machine: file:///folder, or a path, is on this one")
        return unquote(text.removeprefix("file://"))
    return text


Location = Annotated[str, AfterValidator(_location)]
"""A path, or a URL without a password; ``file:///…``, as a file system that nodes share may be given, is its
path."""


class StorageSettings(Settings):
    """How object stores are reached; who one is comes from the environment alone."""

    endpoint: str | None = Field(
        default=None,
        description="URL of an S3-compatible service other than Amazon's, such as https://s3.example.org.",
    )
    region: str | None = Field(
        default=None,
        description="Region of the bucket.",
    )
    skip_signature: bool = Field(
        default=False,
        description="Read public data without credentials.",
    )
    options: dict[str, str] = Field(
        default_factory=dict,
        description="Further options of Polars' object store, such as aws_request_payer; never credentials.",
    )

    @model_validator(mode="before")
    @classmethod
    def _no_secrets(cls, given: Any) -> Any:
        if isinstance(given, Mapping):
            options = given.get("options")
            names = [*given, *(options if isinstance(options, Mapping) else ())]
            for name in names:
                if _SECRET.search(str(name)):
                    raise ValueError(
                        f"'{name}' looks like a credential, which a configuration must not hold: set "
                        "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, or give the "
                        "machine a role; skip_signature = true reads public data without any"
                    )
        return given

    @property
    def signed(self) -> StorageSettings:
        """The same with credentials, for what is one's own: public input and a private output go together."""
        return self.model_copy(update={"skip_signature": False})

    @field_validator("endpoint")
    @classmethod
    def _plain_endpoint(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"https?://[^@\s]+", value):
            if "@" in value:  # not to be repeated on terminals and in logs
                raise ValueError(
                    "it holds a user or password, which a configuration must not: set AWS_ACCESS_KEY_ID and "
                    "AWS_SECRET_ACCESS_KEY in the environment"
                )
            raise ValueError(f"'{value}' is not an http(s):// address")
        return value


class Storage:
    """Opens and lists what paths and URLs name.

    Arguments:
        settings: Endpoint, region and the like; the defaults suit local files and the environment's S3.
    """

    def __init__(self, settings: StorageSettings | None = None) -> None:
        self.settings = settings or StorageSettings()

    def polars_options(self, path: object) -> dict[str, str] | None:
        """``storage_options`` of Polars' scans for a path or URL; None for local files."""
        if not is_url(path):
            return None
        options = dict(self.settings.options)
        if str(path).startswith(("s3://", "s3a://")):
            endpoint = self.settings.endpoint
            if endpoint:
                options["aws_endpoint_url"] = endpoint
                options["aws_allow_http"] = str(endpoint.startswith("http://")).lower()
            region = (
                self.settings.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
            )
            if region or endpoint or self.settings.skip_signature:
                options["aws_region"] = region or "us-east-1"
            if self.settings.skip_signature:
                options["aws_skip_signature"] = "true"
        elif str(path).startswith(("gs://", "gcs://")) and self.settings.skip_signature:
            options["google_skip_signature"] = "true"
        return options

    def filesystem(self, url: str) -> Any:
        """The fsspec file system of a URL.

        Raises:
            GalrayError: The package for that scheme is not installed.
        """
        import fsspec

        scheme = url.split("://")[0].lower()
        options: dict[str, Any] = {}
        if scheme in ("s3", "s3a"):
            settings = self.settings
            options = {"anon": settings.skip_signature, "default_cache_type": "readahead"}
            if settings.endpoint:
                options["endpoint_url"] = settings.endpoint
            if settings.region:
                options["client_kwargs"] = {"region_name": settings.region}
        elif scheme in ("gs", "gcs") and self.settings.skip_signature:
            options = {"token": "anon"}
        try:
            return fsspec.filesystem(scheme, **options)
        except ImportError:
            extra = _EXTRAS.get(scheme, "aiohttp" if scheme.startswith("http") else scheme)
            raise GalrayError(f"{url}: reading {scheme}:// needs {extra}", f"pip install '{extra}'") from None
        except ValueError as error:
            raise GalrayError(f"{url}: {error}", "use a path, s3://, gs:// or http(s)://") from None

    def open(self, path: Path | str) -> BinaryIO:
        """A file or object as a seekable binary stream.

        Raises:
            GalrayError: It is absent, or may not be read.
        """
        if not is_url(path):
            return Path(path).open("rb")
        url = str(path)
        with explained(url):
            return self.filesystem(url).open(url, "rb", block_size=_READ_BLOCK)

    def read(self, path: Path | str) -> bytes:
        """All bytes of a small file or object.

        Raises:
            GalrayError: It is absent, or may not be read.
        """
        with explained(str(path)), self.open(path) as stream:
            return stream.read()

    def size(self, path: Path | str) -> int:
        """Bytes of a file or object; 0 where a web server does not tell.

        Raises:
            GalrayError: It is absent, or may not be read.
        """
        if not is_url(path):
            return Path(path).stat().st_size
        with explained(str(path)):
            return int(self.filesystem(str(path)).info(str(path)).get("size") or 0)

    def exists(self, path: Path | str) -> bool:
        """True where a file or object of that name can be read.

        Raises:
            GalrayError: The store refuses to answer.
        """
        if not is_url(path):
            return Path(path).is_file()
        with explained(str(path)):
            return bool(self.filesystem(str(path)).isfile(str(path)))

    def listing(self, url: str) -> dict[str, tuple[int, str]]:
        """Files that a URL, a folder's URL or a pattern names: URL → size and version.

        Raises:
            GalrayError: The store refuses to answer.
        """
        with explained(url):
            system = self.filesystem(url)
            system.invalidate_cache()
            if re.search(r"[*?\[]", url):
                found = system.glob(url, detail=True)
            elif system.isfile(url):
                found = {url: system.info(url)}
            else:
                found = system.find(url, detail=True)
            return {
                system.unstrip_protocol(name): (int(info.get("size") or 0), _version(info))
                for name, info in sorted(found.items())
                if info["type"] == "file"
            }


class explained:
    """Turns what object stores raise into a message that names the URL."""

    def __init__(self, url: str) -> None:
        self.url = url

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None or isinstance(error, GalrayError) or not isinstance(error, Exception):
            return
        text = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, FileNotFoundError):
            raise GalrayError(f"{self.url}: no such file or object", "correct the path or URL") from None
        if access_denied(error):
            raise GalrayError(
                f"{self.url}: access denied: {text}",
                "set the credentials in the environment, or storage.skip_signature = true for public data",
            ) from None
        raise GalrayError(
            f"{self.url}: cannot be read: {text}", "check the URL, the storage settings and the network"
        ) from None


def access_denied(error: BaseException) -> bool:
    """Whether an object store wants other credentials, or any, in the words of its library."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return (
        bool(kinds & {"PermissionError", "NoCredentialsError", "GoogleAuthError"})
        or getattr(error, "code", None) in (401, 403)
        or str(error).startswith("Forbidden")
    )


def _version(info: Mapping[str, Any]) -> str:
    """What changes with an object's content, as far as its store tells."""
    for key in ("ETag", "etag", "md5Hash", "LastModified", "updated", "mtime"):
        if info.get(key):
            return str(info[key]).strip('"')
    return ""


@contextmanager
def decompressed(stream: BinaryIO) -> Iterator[BinaryIO]:
    """A stream's bytes, gunzipped where they are gzipped; both are closed at the end.

    ISA-L takes a third of the time of zlib, which is half the work of reading a bulk file.
    """
    with stream:
        packed = stream.read(2) == b"\x1f\x8b"
        stream.seek(0)
        if not packed:
            yield stream
            return
        with igzip.IGzipFile(fileobj=stream) as plain:
            yield cast(BinaryIO, plain)
