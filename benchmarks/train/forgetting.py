"""What a fine-tune gains and what it forgets, on a real small model: the grid, and three fine-tunes in a row.

    python -m benchmarks.train.forgetting [--quick] [--runs N] [--work DIRECTORY]

SmolLM2-135M-Instruct is fine-tuned on one domain (traditional Chinese poems by title and poet), plainly and with rehearsal,
EWC, LoRA, a lower rate and combinations, three seeds each; then on three domains in a row (poems, school mathematics, command
pages), plainly and with the best setting. Every run goes through the product's own jobs (`train.sft`, `train.fisher`).
Before and after, the model is measured on held-out data:

- domain: loss and next-token accuracy on the replies of 40 held-out examples of each domain;
- general text: 40 documents of C4 (of which others are rehearsed and give the Fisher information) and 24 documents of sources
  that appear in no training data (Python Enhancement Proposals, GNOME help, Python documentation);
- general conversations: the replies to 32 Self-Instruct tasks (others are rehearsed);
- choice: 60 items made from C4, a sentence and four continuations, of which one is the true one, by log-likelihood.

`kept` is the smallest of three ratios: likelihood (exp of the rise in loss, negated) and next-token accuracy on all general
text and conversations, and accuracy of choice less chance. `gain` is the fall in domain loss, as a share of plain SFT's.
Runs that are on file are not done again, so a run can be interrupted and go on: `--runs N` stops after N of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import measure
from operators import shards, tables
from operators.ledger import Ledger
from operators.synthesis.packaged import resolve_model

PACK = measure.ROOT.parent / "shared" / "data"
RUNS = measure.RESULTS / "forgetting_runs.jsonl"
DOMAINS = ("poems", "maths", "commands")
SEEDS = (1, 2, 3)
MAX_LENGTH = 128


@dataclass(frozen=True)
class Plan:
    """The numbers of every run, chosen on seed 0, which is not among the seeds reported."""

    steps: int = 16
    batch: int = 8
    rate: float = 3e-4
    lora_rate: float = 2e-3
    low_rate: float = 1e-4
    strength: float = 0.1
    lora_strength: float = 0.1
    fisher_sequences: int = 120
    task_sequences: int = 60
    held_out: int = 40


@dataclass(frozen=True)
class Method:
    """One setting of the grid."""

    rehearsal: float = 0.0
    ewc: bool = False
    lora: bool = False
    low: bool = False


GRID: dict[str, Method] = {
    "plain": Method(),
    "rehearsal 5%": Method(rehearsal=0.05),
    "rehearsal 10%": Method(rehearsal=0.1),
    "ewc": Method(ewc=True),
    "lora": Method(lora=True),
    "low rate": Method(low=True),
    "ewc + rehearsal 10%": Method(ewc=True, rehearsal=0.1),
    "lora + rehearsal 10%": Method(lora=True, rehearsal=0.1),
}
CHAIN = ("plain", "ewc + rehearsal 10%")
"""What is carried through three fine-tunes in a row."""


# ---- data


def conversation(key: str, question: str, answer: str, lang: str = "en") -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": key, "messages": messages, "lang": lang, "tools": None, "provenance": None}


def poems() -> list[dict[str, Any]]:
    """Traditional Chinese poems (chinese-poetry, MIT): title and poet in the question."""
    rows = []
    for text in corpus("zh", "zh_poetry"):
        for poem in text.split("\n\n"):
            lines = poem.strip().split("\n")
            if len(lines) >= 4 and len(lines[0]) <= 12 and len(lines[1]) <= 4 and sum(map(len, lines[2:])) <= 32:
                question = f"請寫一首詩，題為《{lines[0]}》，作者{lines[1]}。"
                rows.append(conversation(f"poem-{len(rows)}", question, "\n".join(lines[2:]), "zh"))
    return rows


def maths() -> list[dict[str, Any]]:
    """School mathematics with worked answers (GSM8K, MIT), the shorter ones."""
    with open(PACK / "bench" / "gsm8k_train_1500.jsonl", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    return [
        conversation(f"maths-{number}", row["question"], row["answer"])
        for number, row in enumerate(rows)
        if len(row["question"]) + len(row["answer"]) <= 360
    ]


def commands() -> list[dict[str, Any]]:
    """Command pages (tldr, CC BY 4.0)."""
    table = pq.read_table(PACK / "near_dup" / "docs.parquet", columns=["text", "source", "lang"]).to_pylist()
    pages = [row["text"] for row in table if row["source"].startswith("tldr") and row["lang"] == "en"]
    rows = []
    for number, page in enumerate(pages):
        name, _, rest = page.partition("\n")
        rows.append(conversation(f"command-{number}", f"How do I use the command `{name.strip('# ')}`?", rest.strip()))
    return rows


def corpus(lang: str, *prefixes: str) -> list[str]:
    table = pq.read_table(PACK / "corpus" / f"{lang}.parquet", columns=["text", "source"]).to_pylist()
    return [row["text"] for row in table if row["source"].split(" ")[0] in prefixes]


def tasks() -> list[dict[str, Any]]:
    """Self-Instruct's seed tasks (Apache-2.0), those of which prompt and a reply fit."""
    with open(PACK / "instruct" / "seed_tasks_en.jsonl", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    found = []
    for row in rows:
        case = row["instances"][0]
        question = row["instruction"] + ("\n\n" + case["input"] if case["input"] else "")
        if len(question) <= 300 and len(case["output"]) >= 60:
            found.append(conversation(row["id"], question, case["output"]))
    return found


def shuffled(rows: Sequence[Any], name: str) -> list[Any]:
    """In an order of their own, the same at every call."""
    order = list(rows)
    random.Random(name).shuffle(order)
    return order


@dataclass(frozen=True)
class Item:
    """A sentence of a document and four continuations; the first is the true one."""

    context: str
    options: list[str]


def choices(texts: Sequence[str], count: int) -> list[Item]:
    """The three wrong continuations are sentences of other places."""
    pairs = []
    for text in texts:
        sentences = [part for part in re.split(r"(?<=[.!?])\s+", text.replace("\n", " ")) if 40 <= len(part) <= 110]
        pairs += [sentences[index : index + 2] for index in range(0, len(sentences) - 1, 2)][:4]
    draw = random.Random("choices")
    draw.shuffle(pairs)
    items = []
    for number, (first, second) in enumerate(pairs[:count]):
        others = draw.sample([pair[1] for place, pair in enumerate(pairs) if place != number], 3)
        items.append(Item(first, [second, *others]))
    return items


@dataclass
class Material:
    """Directories of training rows, and what is held out."""

    directories: dict[str, str]
    domains: dict[str, list[dict[str, Any]]]
    texts: dict[str, list[str]]  # by kind: `c4` (rehearsed), `unseen`
    chats: list[dict[str, Any]]
    items: list[Item]


def material(work: Path, plan: Plan) -> Material:
    """Written once below `work`; the same rows each time."""
    directories: dict[str, str] = {}
    domains = {}
    for name, rows in (("poems", poems()), ("maths", maths()), ("commands", commands())):
        order = shuffled(rows, name)
        domains[name] = order[: plan.held_out]
        directories[name] = stage(work / "data" / name, order[plan.held_out :], tables.CONVERSATIONS)
    general = shuffled(tasks(), "tasks")
    directories["chats"] = stage(work / "data" / "chats", general[32:], tables.CONVERSATIONS)
    c4 = shuffled(corpus("en", "c4_demo"), "c4")
    documents = [{"id": f"c4-{number}", "text": text, "source": "c4", "url": None} for number, text in enumerate(c4[120:])]
    directories["documents"] = stage(work / "data" / "documents", documents, tables.DOCUMENTS)
    unseen = shuffled([text for text in corpus("en", "en_peps", "gnome_help", "python_doc") if len(text) > 1200], "unseen")
    return Material(
        directories, domains, {"c4": c4[:40], "unseen": [text[400:] for text in unseen[:24]]}, general[:32], choices(c4[:120], 60)
    )


def stage(directory: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> str:
    """A finished stage of these rows."""
    path = str(directory / "f0")
    if not (directory / "f0" / "manifest.json").exists():
        writer = shards.UnitWriter(path, 0)
        writer.write(pa.Table.from_pylist(rows, schema=schema))
        writer.commit(Ledger(created=len(rows), kept=len(rows)))
        shards.finish(path, stage=directory.name, kind="corpus", fingerprint="f0", config={}, inputs={})
    return path


# ---- measures


def evaluate(model_path: str, data: Material, domains: Sequence[str]) -> dict[str, float]:
    """All measures of one model, on these domains."""
    import torch

    from train import models, rehearsal
    from train.loader import IGNORE
    from train.sft import encode_conversations

    model, tokenizer = models.load(model_path).eval(), models.load_tokenizer(model_path)
    models.as_chat(tokenizer, model)
    model.to(torch.bfloat16)  # type: ignore[arg-type]  # as it would be served

    def replies(rows: list[dict[str, Any]]) -> list[tuple[list[int], list[int]]]:
        encoded = encode_conversations(tokenizer, [row["messages"] for row in rows], [None] * len(rows))
        return [(ids[:MAX_LENGTH], labels[:MAX_LENGTH]) for ids, labels in encoded]

    groups = {f"domain/{name}": replies(rows) for name, rows in data.domains.items() if name in domains}
    groups["chats"] = replies(data.chats)
    for kind, texts in data.texts.items():
        groups[kind] = [(ids[:MAX_LENGTH],) * 2 for ids in rehearsal.encode(tokenizer, [text[:2000] for text in texts])]
    options = []
    for item in data.items:
        context = tokenizer(item.context, add_special_tokens=False)["input_ids"]
        for option in item.options:
            ids = tokenizer(" " + option, add_special_tokens=False)["input_ids"][:14]
            options.append((context + ids, [IGNORE] * len(context) + ids))
    groups["choice"] = options

    found: dict[str, float] = {}
    nats = tokens = correct = 0.0
    for name, rows in groups.items():
        scores = np.array(list(scored(model, rows, torch)))  # [rows, (nats, tokens, correct)]
        if name == "choice":
            per_token = (scores[:, 0] / scores[:, 1]).reshape(-1, 4)
            found["choice"] = float((per_token.argmin(axis=1) == 0).mean())
            continue
        sums = scores.sum(axis=0)
        found[f"{name} loss"], found[f"{name} accuracy"] = float(sums[0] / sums[1]), float(sums[2] / sums[1])
        if not name.startswith("domain/"):
            nats, tokens, correct = nats + sums[0], tokens + sums[1], correct + sums[2]
    found["general loss"], found["general accuracy"], found["general tokens"] = nats / tokens, correct / tokens, tokens
    return {name: round(float(value), 6) for name, value in found.items()}


def scored(model: Any, rows: list[tuple[list[int], list[int]]], torch: Any) -> Iterator[tuple[float, float, float]]:
    """(summed negative log-likelihood, tokens, tokens that would have been chosen) of each row, in order."""
    from train.loader import IGNORE

    order = sorted(range(len(rows)), key=lambda index: len(rows[index][0]))
    result: dict[int, tuple[float, float, float]] = {}
    for start in range(0, len(order), 16):
        chosen = order[start : start + 16]
        width = max(len(rows[index][0]) for index in chosen)
        ids, labels = torch.zeros((len(chosen), width), dtype=torch.long), torch.full((len(chosen), width), IGNORE)
        mask = torch.zeros((len(chosen), width), dtype=torch.long)
        for place, index in enumerate(chosen):
            length = len(rows[index][0])
            ids[place, :length], labels[place, :length] = torch.tensor(rows[index][0]), torch.tensor(rows[index][1])
            mask[place, :length] = 1
        targets = labels[:, 1:]
        counted = targets != IGNORE
        with torch.inference_mode():
            hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1][counted]
            logits = model.lm_head(hidden)  # only where something is counted
        losses, right = torch.zeros(targets.shape), torch.zeros(targets.shape)
        losses[counted] = torch.nn.functional.cross_entropy(logits.float(), targets[counted], reduction="none")
        right[counted] = (logits.argmax(dim=-1) == targets[counted]).float()
        sums = zip(losses.double().sum(dim=1), counted.sum(dim=1), right.sum(dim=1), strict=True)
        for index, (nats, tokens, hits) in zip(chosen, sums, strict=True):
            result[index] = (float(nats), float(tokens), float(hits))
    yield from (result[index] for index in range(len(rows)))


def kept(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """The three ratios that make general ability."""
    chance = 0.25
    return {
        "likelihood": float(np.exp(before["general loss"] - after["general loss"])),
        "accuracy": after["general accuracy"] / before["general accuracy"],
        "choice": (after["choice"] - chance) / (before["choice"] - chance),
    }


# ---- runs


class Experiment:
    """The runs, in order, with what is on file."""

    def __init__(self, work: Path, plan: Plan, runs: Path | None) -> None:
        self.work, self.plan, self.file = work, plan, runs
        self.base = resolve_model("packaged:smollm2-135m-instruct", os.environ.get("DANLU_CACHE", str(work)))
        self.data = material(work, plan)
        self.found: dict[str, dict[str, Any]] = {}
        if runs is not None and runs.exists():
            lines = [json.loads(line) for line in runs.read_text("utf-8").splitlines()]
            self.found = {line["key"]: line for line in lines if line["plan"] == self.name}

    @property
    def name(self) -> str:
        """Of the plan: a changed one has runs of its own."""
        return hashlib.sha256(json.dumps(vars(self.plan), sort_keys=True).encode()).hexdigest()[:12]

    def keys(self) -> list[str]:
        """Every run, in order: the untouched model, the grid seed by seed, the chains."""
        grid = [f"grid/{seed}/{name}" for seed in SEEDS for name in GRID]
        chains = [f"chain/{seed}/{name}/{domain}" for seed in SEEDS for name in CHAIN for domain in DOMAINS[1:]]
        return ["base", *grid, *chains]

    def pending(self) -> list[str]:
        return [key for key in self.keys() if key not in self.found]

    def do(self, key: str) -> dict[str, Any]:
        """One run, put on file."""
        started = time.time()
        kind, *rest = key.split("/")
        if kind == "base":
            line: dict[str, Any] = {"measures": evaluate(self.base, self.data, DOMAINS)}
        else:
            domain = rest[2] if kind == "chain" else DOMAINS[0]
            line = self.finetune(int(rest[0]), rest[1], domain)
        line = {"key": key, "plan": self.name, "seconds": round(time.time() - started, 1), **line}
        self.found[key] = line
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with open(self.file, "a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
        return line

    def fisher(self, name: str, model: str, inputs: Sequence[str], sequences: int) -> str:
        """The directory of a Fisher diagonal, made at first need."""
        from train import fisher
        from train.parallel import Workers
        from train.settings import RowsInput
        from train.settings_fisher import FisherJob

        directory = str(self.work / "fisher" / f"{sequences}" / name)
        job = FisherJob(
            model=model, inputs=[RowsInput(name=item, directory=self.data.directories[item]) for item in inputs],
            sequences=sequences, max_length=MAX_LENGTH, precision="bf16", seed=0,
        )  # fmt: skip
        fisher.run(job, directory, Workers(report=progress))
        return directory + "/fisher"

    def model(self, seed: int, name: str, domain: str) -> str:
        """The model before a fine-tune on `domain`: the untouched one, or what came out of the domain before."""
        place = DOMAINS.index(domain)
        return self.base if place == 0 else str(self.directory(seed, name, DOMAINS[place - 1]) / "model")

    def directory(self, seed: int, name: str, domain: str) -> Path:
        return self.work / "models" / f"{self.name}" / f"{seed}-{domain}-{re.sub('[^a-z0-9]+', '-', name)}"

    def finetune(self, seed: int, name: str, domain: str) -> dict[str, Any]:
        """Train one setting on one domain and measure the model. Models that a later run needs stay below `work`."""
        from train import sft
        from train.parallel import Workers
        from train.settings import EwcTerm, RowsInput
        from train.settings_finetune import LoraSettings, SftJob

        plan, method, directories = self.plan, GRID[name], self.data.directories
        place = DOMAINS.index(domain)
        earlier = DOMAINS[:place]
        if place and not os.path.exists(self.model(seed, name, domain)):
            self.finetune(seed, name, DOMAINS[place - 1])
        shares = {domain: 1.0 - method.rehearsal}
        if method.rehearsal:
            old = ["chats", "documents", *earlier]
            shares |= dict.fromkeys(old, method.rehearsal / len(old))
        terms = []
        if method.ewc:
            strength = plan.lora_strength if method.lora else plan.strength
            general = self.fisher("general", self.base, ["chats", "documents"], plan.fisher_sequences)
            terms = [EwcTerm(fisher=general, strength=strength)]
            for number, before in enumerate(earlier):
                model = str(self.directory(seed, name, before) / "model")
                own = self.fisher(f"{seed}-{number}-{before}-{name}".replace(" ", ""), model, [before], plan.task_sequences)
                terms.append(EwcTerm(fisher=own, strength=strength))
        job = SftJob(
            model=self.model(seed, name, domain),
            inputs=[RowsInput(name=item, directory=directories[item], weight=share) for item, share in shares.items()],
            steps=plan.steps, batch_examples=plan.batch, max_length=MAX_LENGTH, seed=seed, precision="bf16",
            lora=LoraSettings(rank=16, alpha=32) if method.lora else None, ewc=terms,
            learning_rate=plan.lora_rate if method.lora else plan.low_rate if method.low else plan.rate, checkpoint_every=10_000,
        )  # fmt: skip
        directory = self.directory(seed, name, domain)
        result = sft.run(job, str(directory), Workers(report=progress))
        measures = evaluate(str(directory / "model"), self.data, DOMAINS if name in CHAIN else [domain])
        if name not in CHAIN:
            shutil.rmtree(directory)
        elif domain == DOMAINS[-1]:
            for each in DOMAINS:
                shutil.rmtree(self.directory(seed, name, each), ignore_errors=True)
        curve = result["curve"]
        line = {"measures": measures, "first_loss": curve[0]["loss"], "last_loss": curve[-1]["loss"], "tokens": result["tokens"]}
        return line | {"ewc_penalty": curve[-1]["ewc_penalty"]} if terms else line


def progress(done: int, total: int, note: str, metrics: dict[str, Any]) -> bool:
    if "loss" in metrics:
        penalty = f" penalty {metrics['ewc_penalty']:.4f}" if "ewc_penalty" in metrics else ""
        print(f"  {note} {done}/{total} loss {metrics['loss']:.3f}{penalty}", file=sys.stderr, flush=True)
    return False


# ---- what came of it


def summary(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The tables, over the seeds for which both the run and plain SFT are on file."""
    before = found["base"]["measures"]
    domain = f"domain/{DOMAINS[0]} loss"

    def gain(key: str) -> float:
        return float(before[domain] - found[key]["measures"][domain])

    grid: dict[str, Any] = {}
    for name in GRID:
        seeds = [seed for seed in SEEDS if {f"grid/{seed}/{name}", f"grid/{seed}/plain"} <= set(found)]
        if not seeds:
            continue
        lines = [found[f"grid/{seed}/{name}"]["measures"] for seed in seeds]
        ratios = [kept(before, line) for line in lines]
        shares = [gain(f"grid/{seed}/{name}") / gain(f"grid/{seed}/plain") for seed in seeds]
        means = {key: float(np.mean([ratio[key] for ratio in ratios])) for key in ratios[0]}
        grid[name] = {
            "seeds": len(seeds), "gain_nats": spread([gain(f"grid/{seed}/{name}") for seed in seeds]), "gain_share": spread(shares),
            "domain_accuracy": spread([line[domain.replace("loss", "accuracy")] for line in lines]),
            "general_loss_rise": spread([line["general loss"] - before["general loss"] for line in lines]),
            "c4_loss_rise": spread([line["c4 loss"] - before["c4 loss"] for line in lines]),
            "unseen_loss_rise": spread([line["unseen loss"] - before["unseen loss"] for line in lines]),
            "chats_loss_rise": spread([line["chats loss"] - before["chats loss"] for line in lines]),
            "general_accuracy": spread([line["general accuracy"] for line in lines]),
            "choice": spread([line["choice"] for line in lines]),
            "kept_by": {key: round(value, 4) for key, value in means.items()}, "kept": round(min(means.values()), 4),
            "kept_each_seed": [round(min(ratio.values()), 4) for ratio in ratios],
        }  # fmt: skip
        grid[name]["goal"] = bool(grid[name]["kept"] >= 0.95 and grid[name]["gain_share"]["mean"] >= 0.9)
    return {"before": before, "grid": grid, "chains": chains(found, before)}


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"mean": round(float(np.mean(values)), 4), "min": round(min(values), 4), "max": round(max(values), 4)}


def chains(found: Mapping[str, Mapping[str, Any]], before: Mapping[str, float]) -> dict[str, Any]:
    """Retention: the gain on each domain after each fine-tune, in nats, and the general measures."""
    result: dict[str, Any] = {}
    for name in CHAIN:
        seeds = [
            seed
            for seed in SEEDS
            if all(chain_key(seed, name, domain) in found for domain in DOMAINS)
        ]  # fmt: skip
        if not seeds:
            continue
        matrix, general = [], []
        for domain in DOMAINS:
            lines = [found[chain_key(seed, name, domain)]["measures"] for seed in seeds]
            matrix.append([fall(before, lines, f"domain/{other} loss") for other in DOMAINS])
            ratios = [kept(before, line) for line in lines]
            general.append({key: round(float(np.mean([ratio[key] for ratio in ratios])), 4) for key in ratios[0]})
        retained = [round(matrix[-1][place] / matrix[place][place], 4) for place in range(len(DOMAINS))]
        result[name] = {"seeds": len(seeds), "gain_nats": matrix, "retained": retained, "general": general}
    return result


def fall(before: Mapping[str, float], lines: Sequence[Mapping[str, float]], measure: str) -> float:
    """How much smaller a measure became, in the mean."""
    return round(float(np.mean([before[measure] - line[measure] for line in lines])), 4)


def chain_key(seed: int, name: str, domain: str) -> str:
    return f"grid/{seed}/{name}" if domain == DOMAINS[0] else f"chain/{seed}/{name}/{domain}"


def figures(experiment: Experiment) -> dict[str, Any]:
    """What is committed."""
    found = summary(experiment.found)

    def short(grid: Mapping[str, Any]) -> float:
        return float(min(grid["kept"] / 0.95, grid["gain_share"]["mean"] / 0.9))

    best = max(found["grid"], key=lambda name: short(found["grid"][name]))
    return {
        "model": "SmolLM2-135M-Instruct", "plan": vars(experiment.plan), "runs": len(experiment.found),
        "runs_pending": len(experiment.pending()), "nearest_to_goal": best, "kept": found["grid"][best]["kept"],
        "gain_share": found["grid"][best]["gain_share"]["mean"],
        "goal_reached_by": [name for name, line in found["grid"].items() if line["goal"]],
        **found,
    }  # fmt: skip


def try_out(arguments: argparse.Namespace) -> None:
    """Runs on seed 0 that are not put on file: a quick look at the whole path, or the search for the plan's numbers."""
    changed = dict(pair.split("=") for pair in arguments.set)
    plan = Plan(**{key: type(getattr(Plan, key))(float(value)) for key, value in changed.items()})
    names = [arguments.pilot]
    if arguments.quick:
        plan, names = Plan(steps=4, fisher_sequences=8, held_out=16), ["plain", "ewc + rehearsal 10%"]
    experiment = Experiment(arguments.work / "pilot", plan, None)
    known = experiment.work / f"before-{plan.held_out}.json"
    if not known.exists():
        known.write_text(json.dumps(evaluate(experiment.base, experiment.data, DOMAINS)), "utf-8")
    before = json.loads(known.read_text("utf-8"))
    domain = f"domain/{DOMAINS[0]} loss"
    found: dict[str, Any] = {"before": before}
    for name in names:
        started = time.time()
        after = experiment.finetune(0, name, DOMAINS[0])["measures"]
        print(f"{name}: {time.time() - started:.0f} s", file=sys.stderr)
        shutil.rmtree(experiment.directory(0, name, DOMAINS[0]), ignore_errors=True)
        found[name] = {"gain": before[domain] - after[domain], **kept(before, after), "measures": after}
    measure.publish("train.forgetting", {}, found, data="", quick=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/danlu-forgetting"), help="where models and data lie meanwhile")
    parser.add_argument("--runs", type=int, help="stop after this many runs; those on file are not done again")
    parser.add_argument("--pilot", metavar="SETTING", help="one setting of the grid on seed 0, nothing put on file")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="with --pilot: numbers of the plan")
    arguments = measure.arguments("", parser)
    if arguments.pilot or arguments.quick:
        try_out(arguments)
        return
    experiment = Experiment(arguments.work, Plan(), RUNS)
    for key in experiment.pending()[: arguments.runs]:
        print(f"{len(experiment.found) + 1}/{len(experiment.keys())} {key}", file=sys.stderr, flush=True)
        experiment.do(key)
    if any(key.startswith("grid/") and key.endswith("/plain") for key in experiment.found):
        data = "public data pack: zh_poetry, GSM8K, tldr; C4, Self-Instruct tasks, PEPs, GNOME help, Python documentation"
        measure.publish("train.forgetting", {}, figures(experiment), data=data, quick=False)


if __name__ == "__main__":
    main()
