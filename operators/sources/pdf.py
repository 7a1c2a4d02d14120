"""PDF files as text, by PDFium.

The order of the text is the order in which a page draws it, which for files made by word processors and TeX is the
reading order, columns one after the other; PDFium puts in spaces and line ends by position. Scanned pages have no text:
a file without any is rejected as `no_text`. A file is read inside the supervised child: one that crashes or hangs PDFium is
set aside alone.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import pypdfium2
import pypdfium2.raw as pdfium

from cluster import storage
from operators.sources.batches import TEXT_SCHEMA, BadRow, BatchBuilder, RowRange, SourceBatch
from operators.sources.settings import ReadSettings
from operators.sources.streams import BrokenStream, read_bounded
from operators.sources.units import Unit, default_source, is_compressed
from operators.tables import stable_id

_HYPHEN = re.compile("[\ufffe\x02]\r?\n?")  # how PDFium marks a hyphen at the end of a line, which joins a word's halves
_PROBLEMS = {
    pdfium.FPDF_ERR_PASSWORD: ("encrypted", "the file opens with a password only"),
    pdfium.FPDF_ERR_SECURITY: ("encrypted", "the file's security scheme is not known"),
    pdfium.FPDF_ERR_FORMAT: ("corrupt", "not readable as PDF"),
}


class _Problem(Exception):
    def __init__(self, reason: str, detail: str, unwanted: bool = False) -> None:
        super().__init__(detail)
        self.reason, self.unwanted = reason, unwanted


def read_pdf_files(unit: Unit, read: ReadSettings, rows: RowRange, batch_rows: int, batch_bytes: int) -> Iterator[SourceBatch]:
    """A document a file, pages joined by `pdf.page_break`.

    Encrypted and damaged files, and those over `pdf.max_pages`, `pdf.max_file_bytes` or `max_text_bytes` are bad rows;
    a file of which some page cannot be read is one too, since a document with holes would be none.
    """
    builder = BatchBuilder(TEXT_SCHEMA, batch_rows, batch_bytes)
    for row, (path, relative) in enumerate(unit.files):
        if rows.past(row):
            break
        if not rows.wants(row):
            continue
        id_ = stable_id(relative)
        if row in rows.crashed:
            builder.add_bad(BadRow(row, id_, relative, f"crash: {rows.crashed[row]}", "reading the file ended the process"))
        else:
            try:
                with rows.reading(row):
                    text = _told(path, read)
                builder.add(row, (id_, text, read.source or default_source(relative), None), len(text))
            except _Problem as problem:
                builder.add_bad(BadRow(row, id_, relative, problem.reason, str(problem), unwanted=problem.unwanted))
        if builder.full:
            yield builder.take()
    if not builder.empty:
        yield builder.take()


def _told(path: str, read: ReadSettings) -> str:
    """The text of one file, what PDFium and the file system say against it as a _Problem."""
    try:
        return _text(path, read)
    except pypdfium2.PdfiumError as error:
        reason, detail = _PROBLEMS.get(error.err_code, ("corrupt", "not readable as PDF"))
        raise _Problem(reason, f"{detail}: {error}") from None
    except BrokenStream as broken:
        raise _Problem(broken.reason, str(broken)) from None


def _text(path: str, read: ReadSettings) -> str:
    limit = read.pdf.max_file_bytes
    too_long = f"more than read.pdf.max_file_bytes {limit}"
    if is_compressed(path) or storage.is_remote(path):
        data = read_bounded(path, limit)
        if data is None:
            raise _Problem("too_long", too_long)
        document = pypdfium2.PdfDocument(data)
    else:
        local = storage.local_path(path)
        if os.path.getsize(local) > limit:
            raise _Problem("too_long", too_long)
        document = pypdfium2.PdfDocument(local)
    try:
        return _pages(document, read)
    finally:
        document.close()


def _pages(document: pypdfium2.PdfDocument, read: ReadSettings) -> str:
    if len(document) > read.pdf.max_pages:
        raise _Problem("too_long", f"{len(document)} pages, more than read.pdf.max_pages {read.pdf.max_pages}")
    pages: list[str] = []
    size = 0
    for number in range(len(document)):
        try:
            page = document[number]
            words = page.get_textpage()
        except pypdfium2.PdfiumError as error:
            raise _Problem("corrupt", f"page {number + 1} of {len(document)} cannot be read: {error}") from None
        text = _HYPHEN.sub("", words.get_text_bounded(errors="replace")).replace("\r\n", "\n")
        words.close()
        page.close()
        pages.append(text)
        size += len(text.encode())
        if size > read.max_text_bytes:
            raise _Problem("too_long", f"more than read.max_text_bytes {read.max_text_bytes} of text by page {number + 1}")
    if not any(page.strip() for page in pages):
        raise _Problem("no_text", f"{len(pages)} pages without any text: a scan, or drawings only", unwanted=True)
    return read.pdf.page_break.join(pages)
