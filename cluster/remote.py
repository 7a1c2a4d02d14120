"""Object stores that fail to answer: every request is made again with back-off and jitter, reads go on where they broke off.

pyarrow's own clients try a request three times within a second or two. A store that restarts, throttles or loses its network
is away for longer; a run of days has to outlast that (`DANLU_STORAGE_PATIENCE_S`, 300 seconds unless set).
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import io
import logging
import os
import random
import re
import time
from collections.abc import Callable
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs as pafs

_T = TypeVar("_T")
_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 20.0
_CONNECT_S = 5.0
_ANSWER_S = 60.0
_FIRST_CONTACT_S = 15.0
_GIVEN_UP_S = 5.0
_LOG = logging.getLogger("danlu.storage")
_given_up: set[str] = set()  # stores that were waited for in vain and have not answered since

_TRANSIENT = re.compile(
    r"NETWORK_CONNECTION|SLOW_DOWN|SERVICE_UNAVAILABLE|INTERNAL_FAILURE|REQUEST_TIMEOUT|THROTTLING|REQUEST_EXPIRED"
    r"|HTTP status (?:408|409|425|429|5\d\d)|HTTP response code 5\d\d|curlCode|[Tt]imed? ?out|reset by peer|[Bb]roken pipe"
    r"|[Cc]onnection (?:refused|closed|aborted)|\bUNAVAILABLE\b|DEADLINE_EXCEEDED|Resource temporarily unavailable"
    r"|[Uu]nexpected end of (?:stream|file)|Retry policy exhausted"
)
_FINAL = re.compile(r"NO_SUCH_BUCKET|NO_SUCH_KEY|ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE_DOES_NOT_MATCH|CREDENTIAL")
_NO_TOKEN = re.compile(r"Could not create a OAuth2 access token.*?underlying error message was: (.{0,200}?)(?: error_info|$)", re.S)


def patience_s() -> float:
    """Seconds for which a store may fail to answer. Raises ValueError for a setting that is no number of seconds."""
    told = os.environ.get("DANLU_STORAGE_PATIENCE_S", "300")
    try:
        return max(0.0, float(told))
    except ValueError:
        raise ValueError(f"DANLU_STORAGE_PATIENCE_S must be a number of seconds, got {told!r}") from None


def is_transient(error: BaseException) -> bool:
    """Whether a store's error may be gone when it is asked again: no answer, too busy, an error of its own (5xx)."""
    if isinstance(error, FileNotFoundError | PermissionError | FileExistsError | IsADirectoryError | NotADirectoryError):
        return False
    text = str(error)
    return isinstance(error, OSError) and not _FINAL.search(text) and bool(_TRANSIENT.search(text))


class StoreGone(OSError):
    """A store that has not answered for as long as it was waited for; the message says which one, and for how long."""


def patiently(what: str, act: Callable[[], _T], patience: float | None = None, store: str = "") -> _T:
    """What `act` returns; it is called again while the store fails to answer, with full jitter between the calls.

    `act` must be repeatable from its start; `patience` is in seconds, `patience_s()` unless given. Raises StoreGone when it is
    at its end, other errors at once. The pauses are drawn from U(0, min(20, .25 * 2^n)) seconds (Brooker, "Exponential
    Backoff And Jitter", AWS 2015), so that a thousand workers do not come back in the same moment.

    A `store` that was given up is asked for no longer than 5 seconds until it answers again: what a run that ends still
    wants to write would otherwise wait as long once more, each time.
    """
    began, attempt = time.monotonic(), 0
    limit = patience_s() if patience is None else patience
    if store in _given_up:
        limit = min(limit, _GIVEN_UP_S)
    while True:
        try:
            found = act()
            _given_up.discard(store)
            return found
        except StoreGone:
            raise
        except (OSError, pa.ArrowException) as error:
            if told := _NO_TOKEN.search(str(error)):
                raise PermissionError(
                    f"{store or what}: Google's client has no credentials ({told[1]}): set GOOGLE_APPLICATION_CREDENTIALS, or run "
                    "`gcloud auth application-default login`"
                ) from None
            waited = time.monotonic() - began
            if not is_transient(error):
                _given_up.discard(store)
                raise
            if waited >= limit:
                if store:
                    _given_up.add(store)
                raise StoreGone(
                    f"{what}: {store or 'the store'} has not answered for {waited:.0f} s ({attempt + 1} tries; "
                    f"DANLU_STORAGE_PATIENCE_S sets how long it is waited for): {error}"
                ) from error
            pause = random.uniform(0, min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2**attempt))
            attempt += 1
            _LOG.warning("%s: no answer (%s); asked again in %.1f s", what, str(error)[:300], pause)
            time.sleep(pause)


class RemoteReader(io.RawIOBase):
    """A seekable reader of one remote file that opens it again where the connection broke.

    Raises OSError when the file has another size on the way: what was read and what is to come would not belong together.
    """

    def __init__(self, filesystem: pafs.FileSystem, path: str, store: str = "") -> None:
        self._filesystem, self._path, self._store = filesystem, path, store
        self._file = patiently(path, lambda: filesystem.open_input_file(path), store=store)
        self._size = int(self._file.size())
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def size(self) -> int:
        """Bytes of the file."""
        return self._size

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """Up to `size` bytes from the position (all when negative), by a range request."""
        left = max(0, self._size - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        if not wanted:
            return b""
        data = patiently(f"{self._path}, byte {self._position:,}", lambda: self._range(wanted), store=self._store)
        self._position += len(data)
        return data

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def _range(self, wanted: int) -> bytes:
        try:
            data = bytes(self._file.read_at(wanted, self._position))
            if len(data) != wanted:
                raise OSError(f"Unexpected end of stream: {len(data)} of {wanted} bytes at {self._position}")
            return data
        except OSError:
            self._open_again()
            raise

    def _open_again(self) -> None:
        """A new handle for the next try, of the same file; the old one stays where the store does not answer that either."""
        try:
            fresh = self._filesystem.open_input_file(self._path)
        except OSError as error:
            if not is_transient(error):
                raise
            return
        if int(fresh.size()) != self._size:
            raise OSError(f"{self._path} has changed while it was read: {self._size:,} bytes, then {int(fresh.size()):,}")
        self._file.close()
        self._file = fresh


class _Patient(pafs.FileSystemHandler):  # type: ignore[misc]
    """A filesystem whose requests are made again. Streams that are written cannot be: `storage` repeats whole uploads."""

    def __init__(self, inner: pafs.FileSystem, store: str) -> None:
        self._inner, self.store = inner, store

    def patiently(self, what: str, act: Callable[[], _T]) -> _T:
        """`remote.patiently`, with this store's name."""
        return patiently(what, act, store=self.store)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Patient) and bool(self._inner == other._inner)

    def __hash__(self) -> int:
        return hash(self._inner.type_name)

    def get_type_name(self) -> str:
        return str(self._inner.type_name)

    def normalize_path(self, path: str) -> str:
        return str(self._inner.normalize_path(path))

    def get_file_info(self, paths: list[str]) -> Any:
        return self.patiently(", ".join(paths[:3]), lambda: self._inner.get_file_info(paths))

    def get_file_info_selector(self, selector: pafs.FileSelector) -> Any:
        return self.patiently(selector.base_dir, lambda: self._inner.get_file_info(selector))

    def create_dir(self, path: str, recursive: bool) -> None:
        self.patiently(path, lambda: self._inner.create_dir(path, recursive=recursive))

    def delete_dir(self, path: str) -> None:
        self.patiently(path, lambda: _gone(lambda: self._inner.delete_dir(path)))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        self.patiently(path, lambda: self._inner.delete_dir_contents(path, missing_dir_ok=missing_dir_ok))

    def delete_root_dir_contents(self) -> None:
        raise PermissionError("a whole store is not emptied")

    def delete_file(self, path: str) -> None:
        self.patiently(path, lambda: _gone(lambda: self._inner.delete_file(path)))

    def move(self, src: str, dest: str) -> None:
        raise NotImplementedError("remote objects are not renamed: a store copies and deletes them, which is not atomic")

    def copy_file(self, src: str, dest: str) -> None:
        self.patiently(dest, lambda: self._inner.copy_file(src, dest))

    def open_input_stream(self, path: str) -> pa.NativeFile:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> pa.NativeFile:
        return pa.PythonFile(RemoteReader(self._inner, path, self.store), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        return self.patiently(path, lambda: self._inner.open_output_stream(path, compression=None, metadata=metadata))

    def open_append_stream(self, path: str, metadata: Any) -> pa.NativeFile:
        raise NotImplementedError("remote objects are not appended to")


class _Google(_Patient):
    """pyarrow lists objects alone here: folders are told from their names, so that of one folder everything below is listed."""

    def get_file_info_selector(self, selector: pafs.FileSelector) -> Any:
        whole = pafs.FileSelector(selector.base_dir, allow_not_found=selector.allow_not_found, recursive=True)
        found = {info.path: info for info in super().get_file_info_selector(whole)}
        root = selector.base_dir.rstrip("/")
        for path in list(found):
            while (path := path.rpartition("/")[0]) not in found and len(path) > len(root):
                found[path] = pafs.FileInfo(path, pafs.FileType.Directory)
        return [info for path, info in found.items() if selector.recursive or "/" not in path[len(root) + 1 :]]


def _gone(delete: Callable[[], None]) -> None:
    """A second try finds nothing where the first one's answer was lost."""
    with contextlib.suppress(FileNotFoundError):
        delete()


def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The patient filesystem of a URI and the path inside it; the name is taken literally (no %-escapes, no options).

    Credentials come from the usual environment (`AWS_ACCESS_KEY_ID`, profiles, instance roles; Google's application default
    credentials; Hadoop's configuration). `AWS_ENDPOINT_URL_S3` or `AWS_ENDPOINT_URL` names an S3 store other than Amazon's,
    `CLOUD_STORAGE_EMULATOR_ENDPOINT` an emulator of Google's.

    Raises PathError for credentials inside the URI, ValueError for a scheme that pyarrow does not know.
    """
    scheme, host, path = pieces(uri)
    if scheme == "s3":
        return _s3(host, *_s3_environment()), f"{host}/{path}".rstrip("/")
    if scheme in ("gs", "gcs"):
        return _gcs(os.environ.get("CLOUD_STORAGE_EMULATOR_ENDPOINT", "")), f"{host}/{path}".rstrip("/")
    return _other(scheme, host), f"/{path}"


class PathError(ValueError):
    """A path or URI that cannot be used as it is written: the message tells what to write instead, and no credential."""


def pieces(uri: str) -> tuple[str, str, str]:
    """(scheme, host or bucket, path). Raises PathError for credentials in it."""
    scheme, _, rest = uri.partition("://")
    host, _, path = rest.partition("/")
    if "@" in host:
        raise PathError(f"{scheme}://...@{host.rpartition('@')[2]}/{path}: credentials belong in the environment, not in a path")
    return scheme, host, path


def _s3_environment() -> tuple[str, str]:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    return endpoint, os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ""


@functools.cache
def _s3(bucket: str, endpoint: str, region: str) -> pafs.FileSystem:
    """One client, with its pool of connections, for a process and bucket."""
    if endpoint:
        scheme, _, host = endpoint.rpartition("://")
        where = {"endpoint_override": host, "scheme": scheme or "https", "region": region or "us-east-1"}
    else:
        # The first contact: a wrong endpoint or no network at all is told soon.
        where = {"region": region or patiently(f"s3://{bucket}", lambda: pafs.resolve_s3_region(bucket), _FIRST_CONTACT_S)}
    # delayed: an object that fits one part is one request, not the three of a multipart upload
    s3 = pafs.S3FileSystem(connect_timeout=_CONNECT_S, request_timeout=_ANSWER_S, allow_delayed_open=True, **where)
    return pafs.PyFileSystem(_Patient(s3, f"s3://{bucket}" + (f" at {endpoint}" if endpoint else "")))


@functools.cache
def _gcs(emulator: str) -> pafs.FileSystem:
    """Google's client would itself try for 15 minutes; an emulator, which Google's own variable names, knows no credentials."""
    gcs = pafs.GcsFileSystem(anonymous=bool(emulator), retry_time_limit=datetime.timedelta(seconds=_FIRST_CONTACT_S))
    return pafs.PyFileSystem(_Google(gcs, "gs://" + (f" at {emulator}" if emulator else "")))


@functools.cache
def _other(scheme: str, host: str) -> pafs.FileSystem:
    try:
        filesystem, _ = pafs.FileSystem.from_uri(f"{scheme}://{host}/")
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"cannot open {scheme}://{host}: {error}") from error
    return pafs.PyFileSystem(_Patient(filesystem, f"{scheme}://{host}"))
