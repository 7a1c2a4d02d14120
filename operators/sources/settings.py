"""The `read` settings of a recipe: what to read, and how files of each format are understood."""

from __future__ import annotations

import codecs
import re
from typing import Literal

import pyarrow as pa
import pydantic
from pydantic import Field

from operators.config import Settings, SettingsError

Format = Literal[
    "auto", "warc", "wet", "jsonl", "csv", "tsv", "parquet", "arrow", "huggingface", "html", "text", "markdown", "pdf", "wikipedia"
]

COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".lz4")
SUFFIXES = {
    ".warc": "warc", ".wet": "wet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".arrow": "arrow",
    ".csv": "csv", ".tsv": "tsv", ".html": "html", ".htm": "html", ".xhtml": "html",
    ".txt": "text", ".text": "text", ".md": "markdown", ".markdown": "markdown", ".pdf": "pdf",
}  # fmt: skip
_DUMP = re.compile(r"pages-(?:articles|meta-current)[^/]*\.xml(?:-p\d+p\d+)?\Z")
WHOLE_FILES = ("html", "markdown", "pdf", "text_files")
"""Formats in which a file is a document, so that many files make a unit."""
_WITHOUT_COLUMNS = ("warc", "wet", "html", "text", "markdown", "pdf", "wikipedia")
_COLUMN_TYPES = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_()}
_FIXED_COLUMNS = ("id", "text", "source", "url", "content", "content_type", "charset")


class CsvSettings(Settings):
    """How CSV and TSV files are written (RFC 4180; a quote inside a field stands twice)."""

    delimiter: str | None = Field(None, description="Between fields: one ASCII character; default: a comma, in TSV a tab")
    quote: str | None = Field('"', description="Around fields that hold delimiters or line ends; null: nothing is quoted")
    column_names: list[str] | None = Field(None, min_length=1, description="Names of the columns of files without a header line")
    quoted_newlines: bool = Field(
        True,
        description="Fields in quotes may hold line ends. Where a record begins can then be known only by reading from the "
        "file's start, so that a file is one unit; with false, large files are cut into units",
    )

    @pydantic.model_validator(mode="after")
    def _single(self) -> CsvSettings:
        for name in ("delimiter", "quote"):
            value = getattr(self, name)
            if value is not None and (len(value) != 1 or not value.isascii() or value in "\r\n"):
                raise ValueError(f"{name} must be one ASCII character, not a line end, got {value!r}")
        if self.delimiter is not None and self.delimiter == self.quote:
            raise ValueError("delimiter and quote must differ")
        return self


class PdfSettings(Settings):
    """How text is taken from PDF files."""

    page_break: str = Field("\n\n", description="Written between two pages; `\\f` is what pdftotext writes")
    max_pages: int = Field(10_000, ge=1, description="A file of more pages is set aside as too_long")
    max_file_bytes: int = Field(256 << 20, ge=1, description="A larger file is set aside as too_long")


class WikipediaSettings(Settings):
    """Which pages of a MediaWiki dump are documents, and what their text keeps."""

    namespaces: list[int] = Field([0], min_length=1, description="Pages of other namespaces are rejected; 0 is articles")
    tables: Literal["keep", "drop"] = Field("keep", description="keep: a line a row, cells between `|`")


class ReadSettings(Settings):
    """What a corpus stage reads."""

    format: Format = Field(
        "auto",
        description="How the files are written; auto decides by file name. huggingface: a folder saved by `datasets` "
        "(save_to_disk) or laid out as on the Hub (Parquet, JSONL or CSV files); wikipedia: an XML dump, plain or compressed",
    )
    path: str | list[str] = Field(description="A file, directory, glob (`*`, `**`) or URI, or a list of them")
    text_column: str = Field("text", description="Column (Parquet, Arrow, CSV) or key (JSONL) of the text")
    id_column: str | None = Field(
        "id",
        description="Column or key of the document's id; a row without one gets an id made from its file's path and its place",
    )
    url_column: str | None = Field("url", description="Column or key of the document's address, if there is one")
    source: str | None = Field(None, description="Name of the source; default: the source column, else the top folder or file stem")
    source_column: str | None = Field("source", description="Column or key of the source's name, used where `source` is not given")
    columns: list[str] = Field(
        default_factory=list,
        description="Further columns to carry along, as `name` or `name:type` (string, int64, float64, bool); "
        "without a type, Parquet and Arrow keep their own, JSONL and CSV make strings",
    )
    split: str | None = Field(
        None, description="For huggingface: only files of this split (`train`, ...), by folder or file name; default: all files"
    )
    one_document_per: Literal["line", "file"] = Field("line", description="For plain text: is a line a document, or a file?")
    encoding: str = Field(
        "auto",
        description="Of text, Markdown, CSV and TSV: auto detects it for each file (UTF-8, UTF-16 with a mark, GB18030, Big5, "
        "...), or a name such as gb18030. JSONL is UTF-8 unless a name is given",
    )
    csv: CsvSettings = Field(default_factory=lambda: CsvSettings.model_validate({}), description="For csv and tsv")
    pdf: PdfSettings = Field(default_factory=lambda: PdfSettings.model_validate({}), description="For pdf")
    wikipedia: WikipediaSettings = Field(default_factory=lambda: WikipediaSettings.model_validate({}), description="For wikipedia")
    max_text_bytes: int = Field(16 << 20, ge=1, le=1 << 30, description="A longer text (in UTF-8) or page is set aside as too_long")
    max_expansion: int = Field(
        200,
        ge=1,
        description="A compressed file may hold so many times its size, and 256 MiB in any case; the rest is set aside as `bomb`",
    )
    max_unit_bytes: int = Field(64 << 20, ge=1, description="Size of a work unit in bytes, where a file can be cut")

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> ReadSettings:
        for entry in self.columns:
            name, _, kind = entry.partition(":")
            if kind and kind not in _COLUMN_TYPES:
                raise ValueError(f"column {entry!r}: unknown type {kind!r}; valid: {', '.join(_COLUMN_TYPES)}")
            if name in _FIXED_COLUMNS:
                raise ValueError(f"column {name!r} is one that every document has; name it in text_column, id_column, ... instead")
        if self.one_document_per == "file" and self.format not in ("text", "auto"):
            raise ValueError(f"one_document_per: file is for plain text, the format is {self.format}")
        if self.split is not None and self.format != "huggingface":
            raise ValueError(f"split: is for format huggingface, the format is {self.format}")
        if self.encoding != "auto":
            try:
                codecs.lookup(self.encoding)
            except LookupError:
                raise ValueError(f"encoding: {self.encoding!r} is no encoding that Python knows (or auto)") from None
        for name, formats in (("csv", ("csv", "tsv", "huggingface")), ("pdf", ("pdf",)), ("wikipedia", ("wikipedia",))):
            given_settings = getattr(self, name)
            if self.format not in (*formats, "auto") and given_settings != type(given_settings).model_validate({}):
                raise ValueError(f"{name}: is for format {' or '.join(formats)}, the format is {self.format}")
        if self.format in _WITHOUT_COLUMNS:
            fields = type(self).model_fields
            named = ("text_column", "id_column", "url_column", "source_column")
            given = [name for name in named if getattr(self, name) != fields[name].default] + ["columns"] * bool(self.columns)
            if given:
                raise ValueError(f"{given[0]}: files of format {self.format} have no named columns")
        return self

    def patterns(self) -> list[str]:
        return [self.path] if isinstance(self.path, str) else list(self.path)

    def carried(self) -> list[tuple[str, pa.DataType | None]]:
        """(name, declared type or None) of `columns`."""
        pairs = (entry.partition(":") for entry in self.columns)
        return [(name, _COLUMN_TYPES[kind] if kind else None) for name, _, kind in pairs]


def format_of(name: str, read: ReadSettings) -> str:
    """The format of a file. Raises SettingsError when `auto` cannot tell."""
    if read.format not in ("auto", "huggingface"):
        return read.format
    found = format_by_name(name)
    if found is None:
        raise SettingsError(
            f"read.format: {read.format} cannot tell the format of {name!r} from its name "
            f"(known: {', '.join(SUFFIXES)}, with or without {', '.join(COMPRESSED)}, and pages-articles*.xml); give read.format"
        )
    return found


def format_by_name(name: str) -> str | None:
    lowered = name.lower()
    while lowered.endswith(COMPRESSED):
        lowered = lowered[: lowered.rindex(".")]
    if _DUMP.search(lowered):
        return "wikipedia"
    return next((kind for suffix, kind in SUFFIXES.items() if lowered.endswith(suffix)), None)


def is_compressed(name: str) -> bool:
    return name.lower().endswith(COMPRESSED)
