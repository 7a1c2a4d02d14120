"""What the four kinds of training job are told, as typed settings. Importing this module loads no framework."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from operators.config import Settings
from train.schedule import Schedule


class ModelShape(Settings):
    """A decoder-only transformer: RoPE, grouped-query attention, RMSNorm, SwiGLU."""

    architecture: Literal["llama", "qwen3"] = Field(default="llama", description="Qwen3 adds RMSNorm on queries and keys.")
    layers: int = Field(default=4, ge=1, description="Transformer blocks.")
    hidden: int = Field(default=256, ge=8, description="Width of the residual stream.")
    heads: int = Field(default=4, ge=1, description="Query heads; must divide `hidden`.")
    kv_heads: int | None = Field(default=None, ge=1, description="Key and value heads; must divide `heads`. Default: `heads`.")
    intermediate: int | None = Field(
        default=None, ge=8, description="Width of the MLP. Default: 8/3 of `hidden`, rounded up to a multiple of 64."
    )
    vocab: int | None = Field(default=None, ge=1, description="Rows of the embedding. Default, and least: the tokenizer's size.")
    context: int | None = Field(default=None, ge=8, description="Longest position. Default: the packed length.")
    rope_theta: float = Field(default=10_000.0, gt=0, description="Base of the rotary frequencies.")
    tie_embeddings: bool = Field(default=True, description="One matrix for input and output embeddings.")
    norm_eps: float = Field(default=1e-6, gt=0, description="Epsilon of RMSNorm.")
    initializer: float = Field(default=0.02, gt=0, description="Standard deviation of initial weights.")


class RowsInput(Settings):
    """One input of a mixture, as workers are told of it."""

    name: str = Field(description="Name in reports: the stage's name.")
    directory: str = Field(description="The stage's directory, absolute or a URI.")
    weight: float = Field(default=1.0, gt=0, description="Share of the mixture, on any scale.")


class OptimizerSettings(Settings):
    """What all training has in common."""

    steps: int = Field(ge=1, description="Optimizer steps.")
    schedule: Schedule = Field(default=Schedule(), description="Warm-up and decay of the learning rate.")
    clip: float = Field(default=1.0, gt=0, description="Largest global norm of the gradient.")
    precision: Literal["fp32", "bf16"] = Field(default="fp32", description="bf16 runs matrix products under autocast.")
    checkpoint_every: int = Field(default=50, ge=1, description="Steps between checkpoints.")


class PretrainSettings(OptimizerSettings):
    """How to pretrain."""

    batch_sequences: int = Field(default=8, ge=1, description="Sequences of one step over all workers, who must divide it.")
    micro_batch_sequences: int | None = Field(default=None, ge=1, description="Sequences of one forward pass on one worker.")
    learning_rate: float = Field(default=1e-3, gt=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(default=0.1, ge=0, description="Of matrices; vectors (norms) have none.")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW's decay of moments.")


class PretrainJob(PretrainSettings):
    """Everything a pretraining run depends on."""

    inputs: list[RowsInput] = Field(min_length=1, description="Packed corpora with their shares of tokens.")
    model: ModelShape | str = Field(description="A shape to start from scratch, or the directory of a model to go on from.")
    seed: int = Field(default=0, description="Of the initial weights and the order of samples.")


class LoraSettings(Settings):
    """Low-rank adapters (Hu et al. 2021): the base stays frozen, a rank-r product is added to chosen matrices."""

    rank: int = Field(default=16, ge=1, description="Rank of the added product.")
    alpha: int = Field(default=32, ge=1, description="The product is scaled by alpha / rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout before the adapter.")
    targets: list[str] | Literal["all-linear"] = Field(
        default="all-linear", description="Names of the matrices with an adapter; `all-linear` is every one but the output head."
    )


class FinetuneSettings(OptimizerSettings):
    """What SFT and DPO have in common."""

    mix_by: Literal["examples", "tokens"] = Field(
        default="examples",
        description="What the weights of inputs are shares of: examples, or tokens with loss (longer examples count more).",
    )
    batch_examples: int = Field(default=8, ge=1, description="Examples of one step over all workers, who must divide it.")
    micro_batch_examples: int | None = Field(default=None, ge=1, description="Examples of one forward pass on one worker.")
    max_length: int = Field(
        default=512, ge=8, description="Tokens an example is cut to; one without a token with loss left is set aside and counted."
    )
    lora: LoraSettings | None = Field(
        default=None, description="Train adapters and export the merged model too; without it all weights are trained."
    )
    learning_rate: float = Field(gt=0, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's weight decay.")


class FinetuneJob(FinetuneSettings):
    """The part of a fine-tuning job that is not settings."""

    model: str = Field(description="Directory of the model to start from, Hugging Face layout, absolute or a URI.")
    inputs: list[RowsInput] = Field(min_length=1, description="Inputs with their weights.")
    seed: int = Field(default=0, description="Of the adapters' initial weights and the order of samples.")


class SftSettings(FinetuneSettings):
    """How to fine-tune on conversations."""

    neftune_alpha: float | None = Field(default=None, gt=0, description="NEFTune noise on embeddings (Jain et al. 2023).")


class SftJob(SftSettings, FinetuneJob):
    """Everything a supervised fine-tuning depends on."""


class DpoSettings(FinetuneSettings):
    """How to align by preference pairs."""

    beta: float = Field(default=0.1, gt=0, description="How strongly the model is held to its reference.")
    loss: Literal["sigmoid", "ipo", "hinge"] = Field(
        default="sigmoid", description="DPO, IPO (Azar et al. 2023), or SLiC's hinge (Zhao et al. 2023)."
    )
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5, description="Assumed share of pairs labelled the wrong way round.")
    held_out: float = Field(default=0.2, ge=0, lt=1, description="Share of pairs, drawn by id and seed, kept for evaluation.")


class DpoJob(DpoSettings, FinetuneJob):
    """Everything an alignment by preference pairs depends on; `seed` also draws the held-out pairs."""


class NamedModel(Settings):
    """A model under the name that tables show."""

    name: str = Field(description="The stage's name.")
    path: str = Field(description="Directory in Hugging Face layout, absolute or a URI.")


class Prompt(Settings):
    """One prompt that all models answer."""

    text: str = Field(min_length=1, description="What the user says.")
    lang: str = Field(default="", description="Language, for the table.")


class EvaluateSettings(Settings):
    """How to evaluate."""

    max_documents: int = Field(default=100, ge=1, description="Documents scored a language, drawn by a hash of their id.")
    max_tokens: int = Field(default=2048, ge=2, description="Tokens scored of one document.")
    length: int = Field(default=512, ge=2, description="Longest context in tokens; a model's own limit may be shorter.")
    batch_tokens: int = Field(default=8192, ge=2, description="Tokens of one forward pass, padding included.")
    max_pairs: int = Field(default=500, ge=1, description="Preference pairs scored at most.")
    reference: str | None = Field(
        default=None, description="One of `models`: preference accuracy is also given on margins less this model's."
    )
    prompts: list[Prompt] = Field(default=[], description="Prompts that every model answers greedily.")
    max_new_tokens: int = Field(default=48, ge=1, description="Tokens of one reply at most.")


class EvaluateJob(EvaluateSettings):
    """Everything an evaluation depends on."""

    models: list[NamedModel] = Field(min_length=1, description="Models to compare.")
    documents: list[str] = Field(default=[], description="Directories of stages with documents.")
    held_out: float = Field(default=0.0, ge=0, le=1, description="Share of documents kept out of packing.")
    pairs: list[str] = Field(default=[], description="Directories of stages with preference pairs.")
    pairs_held_out: float = Field(default=0.0, ge=0, le=1, description="Share of pairs kept out of DPO; 0 scores all.")
    seed: int = Field(default=0, description="With which documents and pairs were held out.")
