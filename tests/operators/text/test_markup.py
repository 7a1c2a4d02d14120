"""LaTeX and Markdown to text."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from operators.chain import Chain
from operators.operator import Operator
from operators.text import latex
from operators.text.latex import StripLatex
from operators.text.markdown import StripMarkdown


def one(operator: Operator, text: str) -> str:
    return str(operator.process(pa.table({"text": [text]})).table["text"][0].as_py())


PAPER = r"""\documentclass{article} % class
\newcommand{\R}{\mathbb{R}}
\newcommand{\pair}[2]{(#1, #2)}
\def\eg{e.g.}
\begin{document}
\section{Introduction}\label{sec:intro}
We study M\"uller's \R{} in \eg 50\% of cases~\cite{foo,bar}, see \pair{a}{\textbf{b}}. % comment
This is ``quoted'' --- text\footnote{A note.}. 中文内容，\textbf{重点 \textit{嵌套}}。
\begin{itemize}
  \item First $a_i \in \R$ item
  \item[Two] second
\end{itemize}
\begin{equation}
 E = mc^2
\end{equation}
\begin{figure}[ht]\centering\includegraphics[width=\textwidth]{a.png}\caption{A caption.}\end{figure}
\begin{verbatim}
def f(x):   % no comment
    return x
\end{verbatim}
\begin{thebibliography}{9}\bibitem{foo} Foo.\end{thebibliography}
\end{document}
trailing"""


def test_a_paper_becomes_text_with_its_formulas_and_code() -> None:
    expected = "\n".join(
        [
            "Introduction",
            "",
            "We study Müller's R in e.g. 50% of cases, see (a, b). This is “quoted” — text (A note.). 中文内容，重点 嵌套。",
            "",
            r"- First $a_i \in \mathbb{R}$ item",
            "- Two second",
            "",
            r"\begin{equation}",
            " E = mc^2",
            r"\end{equation}",
            "A caption.",
            "def f(x):   % no comment",
            "    return x",
        ]
    )
    assert one(StripLatex(), PAPER) == expected
    without = one(StripLatex(maths="drop", code="drop"), PAPER)
    assert "mc^2" not in without and "def f" not in without and "$" not in without
    replaced = one(StripLatex(maths="replace", placeholder="[M]"), PAPER)
    assert "- First [M] item" in replaced and replaced.count("[M]") == 2


def test_text_that_is_no_latex_passes_and_latex_of_nothing_is_rejected() -> None:
    plain = r"Costs 50% more at C:\new\docs, {x} and $5 to $6. 价格 100%。"
    result = Chain(["strip_latex"]).run(
        pa.table(
            {
                "id": ["a", "b"],
                "text": [plain, r"\documentclass{x}\usepackage{y}\begin{document}\maketitle\end{document}"],
                "source": ["s"] * 2,
            }
        )
    )
    assert result.kept["text"].to_pylist() == [plain]
    assert result.rejected == {"strip_latex:empty": 1}
    assert result.funnel["00:strip_latex"]["counts"] == {"latex": 1}


@pytest.mark.parametrize(
    "source",
    [
        "{" * 100_000, r"\a{" * 50_000, "$" * 50_001, r"\begin{equation}" * 20_000, r"\[" * 50_000, r"\begin{verbatim}" * 20_000,
        r"\cite{" * 50_000, "%\n" * 50_000, r"\section{" * 30_000, r"\def\a{" * 20_000, r"\newcommand{\a}{\a\a}\a",
    ],
)  # fmt: skip
def test_damaged_latex_is_stripped_in_time_that_grows_with_its_size(source: str) -> None:
    """With a search that starts again at every opening each of these would take minutes."""
    assert len(latex.strip(r"\documentclass" + source)) <= 4 * len(source) + 10_000


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                "\\",
                "{",
                "}",
                "$",
                "a",
                "%",
                "\n",
                "[",
                "]",
                "\\begin{align}",
                "\\end{align}",
                "\\item",
                "\\def\\a{",
                "\\a",
                "中",
                "#1",
                "~",
            ]
        )
    )
)
def test_any_mixture_of_commands_ends(pieces: list[str]) -> None:
    for maths in ("keep", "replace", "drop"):
        latex.strip("\\documentclass" + "".join(pieces), maths).encode()


PAGE = """---
title: Hello
tags: [a, b]
---

# Title [![Build](https://img.example/x.svg)](https://ci.example) ![logo](a.png "t")

<!-- a comment
 over lines -->
See [the *docs*](http://a.example/c_(d) "T"), [ref][1], `[no](link) <b>` and snake_case_name.


```html
<!-- kept --> [x](y)


  indented
```

> quoted **bold** and _em_<br>H<sub>2</sub>O 3 < 4
- [ ] task [链接](http://x.example)，中文
{{< highlight >}} text {: .cls}

[1]: http://ref.example "x"
~~~
open code"""


def test_a_page_loses_what_no_reader_sees_and_keeps_its_code() -> None:
    expected = """# Title

See the *docs*, ref, `[no](link) <b>` and snake_case_name.

```html
<!-- kept --> [x](y)


  indented
```

> quoted **bold** and _em_
H2O 3 < 4
- [ ] task 链接，中文
 text

~~~
open code"""
    assert one(StripMarkdown(), PAGE) == expected
    plain = one(StripMarkdown(code="drop", marks="drop"), PAGE)
    assert plain.startswith("Title\n\nSee the docs, ref, `[no](link) <b>` and snake_case_name.")
    assert "quoted bold and em\nH2O" in plain
    assert "indented" not in plain and "open code" not in plain


@pytest.mark.parametrize(
    "text",
    [
        "a [b] c (d) and array[i] (x) = 3 < 4 > 2",
        "---\n\nA rule first, then text.\n\n---\n",
        "```\n<!-- only code -->\n```",
        "2 * 3 * 4 和 snake_case，`code`",
        "price <bb and c> d",
        "",
    ],
)
def test_text_without_markup_stays(text: str) -> None:
    assert one(StripMarkdown(), text) == text


def test_a_document_of_badges_is_rejected() -> None:
    texts = ["[![a](b)](c)\n![x](y)", "正文", "", None]
    verdict = StripMarkdown().process(pa.table({"text": texts}))
    assert verdict.reason is not None
    assert verdict.reason.to_pylist() == ["empty", None, None, None]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(
            st.sampled_from(["```", "~~~", "````", "\n", "[", "](x)", "!", "<!--", "-->", "# ", "中", "a", "`", " ", "---\n"])
        ).map("".join),
        max_size=4,
    )
)
def test_texts_are_edited_alone_and_code_is_never_touched(texts: list[str]) -> None:
    table = pa.table({"text": pa.array(texts, pa.large_string())})
    for operator in (StripMarkdown(), StripMarkdown(code="drop", marks="drop")):
        assert operator.process(table).table["text"].to_pylist() == [one(operator, text) for text in texts]
