"""What a core, a disk and a GPU do in a second, as measured on one machine, and what a plan assumes of data it has not seen."""

from __future__ import annotations

from pathlib import Path

import pydantic
from pydantic import Field

DEFAULT = Path(__file__).parent / "rates.yaml"
"""The rates that come along; the file says which machine they are from."""


class _Described(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Assumptions(_Described):
    """Ratios of data that no stage has seen yet. A finished run of the stage takes their place."""

    html_text_share: float = Field(default=0.10, gt=0, description="bytes of main text in a byte of HTML")
    html_page_bytes: float = Field(default=60_000, gt=0, description="bytes of a page's HTML, where none could be looked at")
    document_bytes: float = Field(default=4_000, gt=0, description="bytes of text in a document, where none could be looked at")
    kept: dict[str, float] = Field(
        default={
            "detect_language": 0.90, "language_share": 0.90, "gopher_repetition": 0.85, "gopher_quality": 0.80, "c4_quality": 0.85,
            "fineweb_quality": 0.85, "filter_urls": 0.97, "filter_lengths": 0.90, "extract_html": 0.95, "score_quality": 0.70,
            "filter_perplexity": 0.80, "bad_words": 0.99, "curate": 0.80, "score": 0.80,
        },
        description="share of its rows that an operator or stage keeps",
    )  # fmt: skip
    kept_otherwise: float = Field(default=0.95, gt=0, le=1, description="the same of filters that `kept` does not name")
    duplicates: float = Field(default=0.15, ge=0, lt=1, description="share of rows that deduplication removes")
    repeated_text: float = Field(default=0.03, ge=0, lt=1, description="share of text that line and substring dedup remove")
    bucket_rows: float = Field(default=0.18, ge=0, le=1, description="share of rows with another row in a bucket (docs/scale.md)")
    bucket_pairs: float = Field(default=6.5, ge=0, description="pairs a such row (docs/scale.md)")
    stored_text: float = Field(default=0.42, gt=0, description="bytes on disk of a byte of text, zstd Parquet with its columns")
    tokens_per_byte_en: float = Field(default=0.25, gt=0, description="tokens a byte of English, vocabulary of 32,000")
    tokens_per_byte_zh: float = Field(default=0.25, gt=0, description="tokens a byte of Chinese, of a tokenizer learnt from it")
    tokens_per_byte_zh_foreign: float = Field(default=0.65, gt=0, description="tokens a byte of Chinese, of one made for English")
    vocabulary_exponent: float = Field(
        default=0.11, ge=0, description="tokens of one's own tokenizer go as (32,000 / its size) to this power"
    )
    chat_bytes: float = Field(default=900, gt=0, description="bytes of text in a conversation or pair that a model wrote")
    prompt_tokens: float = Field(default=350, gt=0, description="tokens of a prompt")
    reply_fill: float = Field(default=0.6, gt=0, le=1, description="tokens of a reply as a share of its `max_tokens`")
    yield_: float = Field(default=0.5, gt=0, le=1, alias="yield", description="new tasks kept of those a model writes")
    mfu: float = Field(default=0.40, gt=0, le=1, description="share of a GPU's bf16 peak in training, where no rate was measured")
    decode_efficiency: float = Field(
        default=0.5, gt=0, le=1, description="share of the bound by memory bandwidth and arithmetic that decoding on a GPU reaches"
    )
    decode_step_s_a_layer: float = Field(default=0.00025, ge=0, description="least seconds of a decoding step on a GPU, a layer")
    cpu_generation: float = Field(default=0.5, gt=0, description="operations/s of vLLM on a CPU core over those of training")
    activation_bytes: float = Field(
        default=34.0, gt=0, description="bytes a token, layer and unit of width for the backward pass in bf16 (Korthikanti et al. "
        "2022, arXiv 2205.05198, eq. 2 with fused attention)",
    )  # fmt: skip

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    def share_kept(self, operator: str, is_filter: bool = True) -> float:
        return self.kept.get(operator, self.kept_otherwise if is_filter else 1.0)


class Rates(_Described):
    """Rates of one core unless they say otherwise. `danlu rates --out FILE` measures them."""

    machine: str = Field(description="the machine they were measured on")
    date: str = Field(description="when")
    command: str = Field(description="by what command")
    note: str = Field(default="", description="what one should know about them")
    read_mb_s: dict[str, float] = Field(description="MB/s of decompressed input by format; `*` for any other")
    analysis_mb_s: float = Field(gt=0, description="MB/s of text cut into words and lines, once for all filters in a row")
    operator_mb_s: dict[str, float] = Field(description="MB/s of text (extract_html: of HTML) by operator; `*` for any other")
    write_mb_s: float = Field(gt=0, description="MB/s of text written as zstd Parquet")
    scan_mb_s: float = Field(gt=0, description="MB/s of text read from zstd Parquet")
    sign_mb_s: float = Field(gt=0, description="MB/s of text shingled, signed by 112 permutations and banded")
    join_keys_mb_s: float = Field(default=60, gt=0, description="MB/s of keys sorted and joined")
    learn_mb_s: float = Field(gt=0, description="MB/s of text that byte-pair encoding is learnt from, on all cores of a node")
    encode_mb_s: float = Field(gt=0, description="MB/s of text encoded into tokens")
    pack_tokens_s: float = Field(gt=0, description="tokens/s laid into sequences and written")
    train_flops: dict[str, float] = Field(description="operations/s of training on a CPU core, by precision (fp32, bf16)")
    gpu: str | None = Field(default=None, description="the GPU measured, if any")
    gpu_mfu: float | None = Field(default=None, gt=0, le=1, description="share of its bf16 peak that training reached")
    cpu_generate_flops: float | None = Field(default=None, gt=0, description="operations/s of vLLM on a CPU core, if measured")
    disk_write_mb_s: float = Field(gt=0, description="MB/s of this machine's disk")
    disk_read_mb_s: float = Field(gt=0, description="MB/s of this machine's disk")
    ray_start_s: float = Field(default=8, ge=0, description="seconds until Ray runs")
    first_task_s: float = Field(default=10, ge=0, description="seconds until the first task of a run works: processes, imports")
    stage_s: float = Field(default=2, ge=0, description="seconds until the tasks of a later stage work: kernels are loaded")
    train_start_s: float = Field(default=60, ge=0, description="seconds until the training workers work")
    engine_start_s: float = Field(default=60, ge=0, description="seconds until vLLM answers")
    task_s: float = Field(default=0.02, ge=0, description="seconds that a unit costs beside its work")
    assumptions: Assumptions = Field(default=Assumptions(), description="ratios that take the place of unseen data")

    @property
    def disk_mb_s(self) -> float:
        """The slower of writing and reading."""
        return min(self.disk_write_mb_s, self.disk_read_mb_s)

    def read_rate(self, format_: str) -> float:
        return self.read_mb_s.get(format_, self.read_mb_s["*"]) * 1e6

    def operator_rate(self, name: str) -> float:
        return self.operator_mb_s.get(name, self.operator_mb_s["*"]) * 1e6

    @pydantic.model_validator(mode="after")
    def _any_other(self) -> Rates:
        for name in ("read_mb_s", "operator_mb_s"):
            if "*" not in getattr(self, name):
                raise ValueError(f"{name} needs an entry `*`, the rate of what it does not name")
        for precision in ("fp32", "bf16"):
            if precision not in self.train_flops:
                raise ValueError(f"train_flops needs an entry {precision}")
        return self
