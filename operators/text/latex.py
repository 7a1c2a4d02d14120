r"""LaTeX source to text, after what RedPajama did to arXiv (Together 2023): comments, preamble and bibliography go, macros that
the author defined are expanded; then commands give way to what they print.

Formulas are kept as they are written, replaced by a placeholder, or dropped; verbatim and listing environments are code.
Expansion is simple: `\newcommand`, `\renewcommand`, `\providecommand` and `\DeclareMathOperator` with up to nine mandatory
arguments, `\def` without; no conditionals, no files. It stops at four times the size of the source. About 7 MB/s.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from typing import ClassVar, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from operators.config import Settings
from operators.operator import Operator, Verdict
from operators.text.analysis import Analysis, text_buffers
from operators.text.language import set_column
from operators.text.repair import put

_SIGNS = (
    r"\\documentclass|\\begin\{document\}|\\begin\{(?:abstract|equation|align|figure|theorem|proof)\*?\}"
    r"|(?s)\\(?:sub)?section\*?\{.*\\[a-z]+\{"
)
_CODE = re.compile(r"\\begin\{(?:verbatim|Verbatim|lstlisting|minted|alltt)\*?\}(?:\[[^\]\n]*\])?(?:\{[^{}\n]*\})?")
_PICTURE = re.compile(r"\\begin\{(?:tikzpicture|picture|filecontents|pgfpicture|CCSXML|thebibliography|references)\*?\}")
_DISPLAY = re.compile(
    r"(?<!\\)\$\$|\\[(\[]|\\begin\{(?:equation|align|alignat|gather|multline|eqnarray|displaymath|math|flalign|split)\*?\}"
)
_INLINE = re.compile(r"(?<!\\)\$(?:[^$\\\n]|\\.|\n(?![ \t]*\n))+\$")
_CLOSING = {"$$": "$$", r"\(": r"\)", r"\[": r"\]"}
_COMMENT = re.compile(r"(?<!\\)((?:\\\\)*)%[^\n]*(?:\n[ \t]*(?=\S)|(?=\n)|\Z)")
_DEFINITION = re.compile(
    r"\\(?:(?:re)?newcommand|providecommand|DeclareMathOperator)\*?\s*\{?\s*\\([A-Za-z]+)\s*\}?\s*(?:\[(\d)\])?(\[[^\]]*\])?\s*\{"
    r"|\\def\s*\\([A-Za-z]+)\s*\{"
)
_BIBLIOGRAPHY = re.compile(r"\\(?:bibliography|printbibliography)\b[^\n]*")
_SILENT = re.compile(
    r"[~ ]?\\(?:label|[cC]ite[a-zA-Z]*|[a-zA-Z]*cite[a-z]*|ref|eqref|autoref|cref|Cref|pageref|includegraphics|input|"
    r"include|vspace|"
    r"hspace|usepackage|documentclass|bibliographystyle|thanks|footnotemark|index|pagestyle|thispagestyle|setlength|setcounter|"
    r"addtocounter|newtheorem|hypersetup|definecolor|color|graphicspath|geometry|email|address|affiliation|PACS|orcid|"
    r"date|acmDOI)(?![A-Za-z])\*?"
    r"(?:\s*\[[^\[\]]*\])*(?:\s*\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*"
)
_HEADING = re.compile(
    r"\\(?:part|chapter|(?:sub){0,2}section|title)\*?(?:\[[^\[\]]*\])?\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}"
)
_PARAGRAPH = re.compile(r"\\(?:sub)?paragraph\*?\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_ITEM = re.compile(r"\s*\\(?:item|bibitem)\b\s*(?:\[((?:[^\[\]{}]|\{[^{}]*\})*)\])?\s*")
_ENVIRONMENT = re.compile(r"[ \t]*\\(?:begin|end)\s*\{[A-Za-z*]+\}(?:\[[^\]\n]*\])?(?:\{[^{}\n]*\})*[ \t]*")
_FOOTNOTE = re.compile(r"\\footnote(?:text)?\s*(?:\[[^\[\]]*\])?\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
_LINK = re.compile(r"\\href\s*\{[^{}]*\}\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_WRAPPED = re.compile(r"\\[A-Za-z]+\*?[ \t]*(?:\[[^\[\]{}]*\])*\{([^{}]*)\}")
_COMMAND = re.compile(r"\\[A-Za-z@]+\*?[ \t]*")
_ACCENT = re.compile(r"\\([`'^\"~=.]|[uvHck](?![A-Za-z]))\s*(?:\{\s*(\\[ij]|[A-Za-z])\s*\}|(\\[ij](?![A-Za-z])|[A-Za-z]))")
_COMBINING = dict(zip("`'^\"~=.uvHck", "\u0300\u0301\u0302\u0308\u0303\u0304\u0307\u0306\u030c\u030b\u0327\u0328", strict=True))
_LETTERS = {
    "ss": "ß", "ae": "æ", "AE": "Æ", "oe": "œ", "OE": "Œ", "o": "ø", "O": "Ø", "aa": "å", "AA": "Å", "l": "ł", "L": "Ł",
    "i": "ı", "LaTeX": "LaTeX", "TeX": "TeX", "ldots": "…", "dots": "…", "S": "§", "P": "¶", "copyright": "©",
    "textbackslash": "\\", "pounds": "£", "dag": "†", "textasciitilde": "~", "newline": "\n", "par": "\n\n", "quad": " ",
    "qquad": " ",
}  # fmt: skip
_LETTER = re.compile(rf"\\({'|'.join(sorted(_LETTERS, key=len, reverse=True))})(?![A-Za-z])(?:\{{\}})?[ \t]*")
_ROUNDS = 12
_GROWTH = 4
_MARK = re.compile("\ue000([0-9]+)\ue001")  # stands for code and formulas while the rest is worked on


class StripLatexSettings(Settings):
    """What of LaTeX source to keep. Documents without LaTeX commands pass as they are."""

    maths: Literal["keep", "replace", "drop"] = Field(default="keep", description="formulas as written, as a placeholder, or none")
    placeholder: str = Field(default="<MATH>", description="what replaces a formula with `maths: replace`")
    code: Literal["keep", "drop"] = Field(default="keep", description="verbatim and listing environments")


class StripLatex(Operator):
    """Turn LaTeX source into text. Reason: empty, where nothing but commands was there."""

    name: ClassVar[str] = "strip_latex"
    settings = StripLatexSettings
    changes_text = True

    def process(self, table: pa.Table, analysis: Analysis | None = None) -> Verdict:
        data, offsets = text_buffers(table["text"])
        text = pa.LargeStringArray.from_buffers(len(offsets) - 1, pa.py_buffer(offsets), pa.py_buffer(data))
        hits = pc.match_substring_regex(text, _SIGNS)
        reason = pa.nulls(len(text), pa.string())
        changed = int(pc.sum(hits).as_py() or 0)
        if changed:
            stripped = [
                strip(item, self.config.maths, self.config.placeholder, self.config.code) for item in text.filter(hits).to_pylist()
            ]
            text = put(text, hits, pa.array(stripped, pa.large_string()))
            reason = pc.if_else(pc.and_(hits, pc.equal(pc.binary_length(text), 0)), "empty", reason)
        return Verdict(set_column(table, "text", text), reason, counts={"latex": changed} if changed else None)


def strip(source: str, maths: str = "keep", placeholder: str = "<MATH>", code: str = "keep") -> str:
    """The text of one document."""
    kept: list[str] = []

    def put_by(text: str) -> str:
        kept.append(text)
        return f"\ue000{len(kept) - 1}\ue001"

    source = re.sub("[\ue000-\ue002]", "", source)
    source = _spans(source, _CODE, lambda _, inside: put_by(inside.strip("\n")) if code == "keep" else "")
    source = _COMMENT.sub(r"\1", source)
    source, macros = _definitions(source)
    begin, end = source.find(r"\begin{document}"), source.rfind(r"\end{document}")
    if begin >= 0:
        source = source[begin + len(r"\begin{document}") : end if end > begin else None]
    source = _expanded(source, macros)
    source = _BIBLIOGRAPHY.sub("", _spans(source, _PICTURE, lambda whole, _: ""))

    def formula(whole: str) -> str:
        return "" if maths == "drop" else put_by(whole if maths == "keep" else placeholder)

    source = _spans(source, _DISPLAY, lambda whole, _: formula(whole))
    source = _INLINE.sub(lambda found: formula(found[0]), source)
    source = _printed(source)
    for _ in range(2):  # formulas may hold marks of code
        source = _MARK.sub(lambda found: kept[int(found[1])], source)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", source)).strip()


def _spans(source: str, opening: re.Pattern[str], work: Callable[[str, str], str]) -> str:
    """What `opening` opens, up to its end, replaced by work(all of it, what is inside); what does not end stays as it is."""
    pieces, at, endless = [], 0, set[str]()
    position = 0
    while found := opening.search(source, position):
        mark = found[0]
        end = _CLOSING.get(mark) or "\\end{" + mark[mark.index("{") + 1 : mark.index("}")] + "}"
        stop = -1 if end in endless else source.find(end, found.end())
        if stop < 0:
            endless.add(end)
            position = found.end()
            continue
        pieces += [source[at : found.start()], work(source[found.start() : stop + len(end)], source[found.end() : stop])]
        at = position = stop + len(end)
    return "".join([*pieces, source[at:]])


def _printed(source: str) -> str:
    """Commands replaced by what they print."""
    source = source.replace(r"\\", "\n")
    source = _ACCENT.sub(_accented, source)
    source = _SILENT.sub("", source)
    source = _FOOTNOTE.sub(r" (\1)", source)
    source = _LINK.sub(r"\1", source)
    source = _HEADING.sub(r"\n\n\1\n\n", source)
    source = _PARAGRAPH.sub(r"\n\n\1 ", source)
    source = _ITEM.sub(lambda found: f"\n- {found[1]} " if found[1] else "\n- ", source)
    source = _ENVIRONMENT.sub("", source)
    source = _LETTER.sub(lambda found: _LETTERS[found[1]], source)
    for _ in range(_ROUNDS):
        source, times = _WRAPPED.subn("\ue002\\1", source)  # the mark ends a command that stands right before
        if not times:
            break
    source = _COMMAND.sub("", source).replace("\ue002", "")
    source = re.sub(r"(?<!\\)[{}]", "", source)
    source = re.sub(r"\\([%&_#${}])", r"\1", source)
    source = re.sub(r"\\[ ,;:!/>-]", " ", source).replace("~", " ")
    source = source.replace("``", "“").replace("''", "”").replace("---", "—").replace("--", "–")
    return re.sub(r"(?<=\S)[ \t]{2,}", " ", source)


def _accented(found: re.Match[str]) -> str:
    letter = (found[2] or found[3]).removeprefix("\\")
    return unicodedata.normalize("NFC", letter + _COMBINING[found[1]])


def _definitions(source: str) -> tuple[str, dict[str, tuple[int, str]]]:
    """The source without the definitions of macros, and name -> (number of arguments, body)."""
    macros: dict[str, tuple[int, str]] = {}
    pieces, at = [], 0
    while found := _DEFINITION.search(source, at):
        end = _closing(source, found.end() - 1)
        if end < 0:
            break
        pieces.append(source[at : found.start()])
        if not found[3]:  # an optional argument is more than simple
            macros[found[1] or found[4]] = (int(found[2] or 0), source[found.end() : end])
        at = end + 1
    return "".join([*pieces, source[at:]]), macros


def _closing(source: str, opening: int) -> int:
    """Where the brace at `opening` closes, -1 if nowhere."""
    depth = 0
    for found in re.compile(r"\\.|[{}]", re.DOTALL).finditer(source, opening):
        depth += {"{": 1, "}": -1}.get(found[0], 0)
        if not depth:
            return found.start()
    return -1


def _filled(body: str, arguments: list[str]) -> str:
    """The body of a macro with `#1`, `#2`, ... replaced."""
    return re.sub(r"#([1-9])", lambda wanted: "".join(arguments[int(wanted[1]) - 1 : int(wanted[1])]), body)


def _expanded(source: str, macros: dict[str, tuple[int, str]]) -> str:
    """Macros replaced by their bodies, also inside bodies, as long as the text stays below four times its size."""
    if not macros:
        return source
    limit = _GROWTH * len(source) + 10_000
    pattern = re.compile(rf"\\({'|'.join(map(re.escape, sorted(macros, key=len, reverse=True)))})(?![A-Za-z@])")
    for _ in range(_ROUNDS):
        pieces, at, size = [], 0, 0
        while found := pattern.search(source, at):
            count, body = macros[found[1]]
            end, arguments = found.end(), []
            for _ in range(count):
                opening = re.compile(r"\s*\{").match(source, end)
                closing = _closing(source, opening.end() - 1) if opening else -1
                if opening is None or closing < 0:
                    break
                arguments.append(source[opening.end() : closing])
                end = closing + 1
            if len(arguments) == count:
                body = _filled(body, arguments)
            pieces += [source[at : found.start()], body]
            size += len(pieces[-2]) + len(body)
            at = end
            if size > limit:
                return source
        if not pieces:
            return source
        source = "".join([*pieces, source[at:]])
    return source
