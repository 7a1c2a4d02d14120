"""One spelling for the addresses of one page, so that they can be compared as keys.

Dropped: the scheme if it is http or https, credentials, `www.`, the default port, a trailing slash or `index.html`, dot
segments, the fragment (unless it is a `#!` route), parameters that only track visitors or sessions. Lower case: scheme and
host. Sorted: the other parameters. Non-ASCII hosts become IDNA, percent-encoded UTF-8 becomes its characters (RFC 3986,
section 6.2.2), other percent codes are in upper case. Two pages that differ only in such a thing are taken for one.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_PIECES = (
    r"^(?:(?P<scheme>[A-Za-z][A-Za-z0-9+.\-]*)://|//)?(?:[^/?#@]*@)?(?P<host>\[[^\]/?#]*\]|[^/?#:]*)(?::(?P<port>[0-9]*))?"
    r"(?P<path>/[^?#]*)?(?:\?(?P<query>[^#]*))?(?P<fragment>#(?s:.*))?$"
)
_TRACKING = (
    r"(?i)^(?:utm_[a-z_]+|gclid|gclsrc|dclid|gbraid|wbraid|fbclid|msclkid|yclid|ysclid|twclid|igshid|igsh|mc_cid|mc_eid|_ga|_gl"
    r"|_hsenc|_hsmi|mkt_tok|oly_anon_id|oly_enc_id|vero_id|s_cid|spm|scm|share_token|phpsessid|jsessionid|aspsessionid[a-z]*)(?:=|$)"
)
_INDEX = r"(?i)/(?:index\.(?:html?|php|aspx?|jsp|shtml)|default\.(?:aspx?|html?))$"
_NOTHING = pa.scalar("", pa.large_string())
_ESCAPES = re.compile(r"(?:%[0-9A-Fa-f]{2})+")
_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


def normalise_urls(urls: pa.Array | pa.ChunkedArray) -> pa.Array:
    """large_string[rows]: each address in one spelling; null for a null or an empty one. Raises TypeError for no strings.

    What cannot be read as an address (no host) stays as it is, without the white space around it.
    """
    if not (pa.types.is_string(urls.type) or pa.types.is_large_string(urls.type)):
        raise TypeError(f"addresses must be strings, got {urls.type}")
    column: Any = urls.cast(pa.large_string())
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks() if column.num_chunks else pa.array([], pa.large_string())
    trimmed = pc.utf8_trim_whitespace(column)
    trimmed = pc.if_else(pc.equal(pc.binary_length(trimmed), 0), pa.scalar(None, pa.large_string()), trimmed)
    pieces = pc.extract_regex(trimmed, _PIECES)
    if not len(trimmed) or pieces.null_count == len(pieces):
        return trimmed
    scheme, host, port, path, query, fragment = (
        pc.fill_null(pc.struct_field(pieces, name), "") for name in ("scheme", "host", "port", "path", "query", "fragment")
    )
    scheme = pc.ascii_lower(scheme)
    web = pc.is_in(scheme, pa.array(["", "http", "https"], scheme.type))
    host = _ascii_hosts(pc.utf8_lower(host))
    host = pc.replace_substring_regex(pc.replace_substring_regex(host, r"\.+$", ""), r"^(?:www\.)+([^.]+\.)", r"\1")
    default = pc.or_(pc.is_in(port, pa.array(["", "80", "443"], port.type)), pc.invert(web))
    port = pc.if_else(pc.and_(default, web), _NOTHING, port)
    port = pc.if_else(pc.equal(port, ""), _NOTHING, _glued(":", port))
    path = _without_dots(_decoded(pc.replace_substring_regex(path, r"(?i);jsessionid=[^/;]*", "")))
    path = pc.replace_substring_regex(pc.replace_substring_regex(path, _INDEX, "/"), r"/+$", "")
    query = _parameters(_decoded(query))
    fragment = pc.if_else(pc.starts_with(fragment, "#!"), fragment, _NOTHING)
    scheme = pc.if_else(web, _NOTHING, _glued(scheme, "://"))
    joined = _glued(scheme, host, port, path, query, fragment)
    legible = pc.and_(pc.is_valid(pieces), pc.greater(pc.binary_length(host), 0))
    return pc.if_else(pc.fill_null(legible, False), joined, trimmed)


def _glued(*pieces: Any) -> pa.Array:
    """The pieces of each row (columns or strings) one after another."""
    typed = [pa.scalar(piece, pa.large_string()) if isinstance(piece, str) else piece for piece in pieces]
    return pc.binary_join_element_wise(*typed, _NOTHING)


def _on(column: pa.Array, pattern: str, change: Any) -> pa.Array:
    """`change` (a function of one string) on the rows that match: few."""
    hits = pc.match_substring_regex(column, pattern)
    if not pc.any(hits).as_py():
        return column
    changed = pa.array([change(value) for value in column.filter(hits).to_pylist()], column.type)
    return pc.replace_with_mask(column, hits, changed)


def _ascii_hosts(hosts: pa.Array) -> pa.Array:
    def encode(host: str) -> str:
        try:
            return host.encode("idna").decode("ascii")
        except UnicodeError:  # no name that a resolver knows: it stays as it is written
            return host

    return _on(hosts, r"[^\x00-\x7f]", encode)


def _decoded(column: pa.Array) -> pa.Array:
    def decode(match: re.Match[str]) -> str:
        raw = bytes.fromhex(match[0].replace("%", ""))
        text = raw.decode("utf-8", "surrogateescape")
        return "".join(
            character
            if character in _UNRESERVED or (ord(character) > 0xA0 and not 0xDC80 <= ord(character) <= 0xDCFF)
            else "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogateescape"))
            for character in text
        )

    return _on(column, "%", lambda value: _ESCAPES.sub(decode, value))


def _without_dots(paths: pa.Array) -> pa.Array:
    def resolve(path: str) -> str:
        return re.sub(r"^/+", "/", posixpath.normpath(path)) + ("/" if path.endswith("/") else "")

    return _on(paths, r"/\.\.?(?:/|$)", resolve)


def _parameters(queries: pa.Array) -> pa.Array:
    """`?` and the parameters in order, without those that only track."""
    lists = pc.split_pattern(queries, "&")
    flat, rows = lists.flatten(), pc.list_parent_indices(lists)
    keep = pc.and_(pc.invert(pc.match_substring_regex(flat, _TRACKING)), pc.greater(pc.binary_length(flat), 0))
    table = pa.table({"row": rows.filter(keep), "parameter": flat.filter(keep)}).sort_by(
        [("row", "ascending"), ("parameter", "ascending")]
    )
    counts = np.bincount(table["row"].to_numpy(), minlength=len(queries))
    offsets = np.zeros(len(queries) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    values = table["parameter"].combine_chunks().cast(pa.large_string())
    joined = pc.binary_join(pa.LargeListArray.from_arrays(pa.array(offsets), values), pa.scalar("&", pa.large_string()))
    return pc.if_else(pa.array(counts > 0), _glued("?", joined), _NOTHING)
