"""Before and after: a model's scores on held-out sets before the first step of training and after the last.

Both are made by the workers that train, with the model that they hold, so nothing is loaded twice. Scores of the model before are
kept in a file named by a hash of

    (files of the model and of its adapters, precision, quantisation, versions; token ids of all rows and which are scored)

so another stage or run with the same model and sets computes none, and a job that was killed goes on with the ones on file.
A row's pass depends on the rows alone, so scores are the same on any number of workers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import transformers
from peft import PeftModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from cluster import storage
from operators.synthesis import packaged
from operators.synthesis.packaged import content_revision
from train import adapters, artifacts, evaluation_sets, layout, retention, scoring
from train.errors import JobCancelled
from train.evaluation_sets import Item, Scorable
from train.parallel import Workers
from train.scoring import Row
from train.settings_evaluate import ComparedSet, Comparison

Score = Callable[[Sequence[Row]], np.ndarray]
"""float64[rows]: the summed log-probability of each row's scored tokens. Called by all workers with the same rows; all get all."""

_VERSION = 1
_LOGIT_BYTES = 512 << 20  # of one forward pass
_MOST_TOKENS = 8_192


class Compared:
    """The sets of one job: `before` it trains and `after`. All workers make it and call it alike.

    `identity` is what scores depend on besides the model's files and the rows (precision, quantisation). Raises
    evaluation_sets.Overlap, a ValueError, where a set that was asked for holds rows that were trained on; ValueError where such
    a set has no rows.
    """

    def __init__(
        self, settings: Comparison, model: str, seed: int, directory: str, workers: Workers, identity: dict[str, Any]
    ) -> None:
        self.settings, self.model, self.workers, self.identity = settings, model, workers, identity
        self._own = storage.join(directory, "evaluation", "before.json")
        read = workers.together(lambda: [(chosen, _read(chosen, seed)) for chosen in settings.sets])

        def left_out() -> set[tuple[str, str]]:
            asked = [(chosen, items) for chosen, items in read if not chosen.automatic]
            evaluation_sets.refuse_overlap(asked, [*settings.own, *settings.earlier], seed)
            return evaluation_sets.overlapping([(c, items) for c, items in read if c.automatic], settings.own, seed)

        out = workers.share(workers.on_first(left_out))
        self.left_out = Counter(name for name, _ in out)
        self.sets: list[tuple[ComparedSet, list[Item]]] = [
            (chosen, [item for item in items if (chosen.name, item.id) not in out]) for chosen, items in read
        ]
        if settings.bounded and not any(items for chosen, items in self.sets if chosen.role == "general"):
            raise ValueError(
                "evaluate.most_lost bounds what general ability may be lost, and no general set has a row that is not trained on: "
                "name a set under evaluate.general, or give the general input more rows"
            )
        self._before: dict[str, dict[str, dict[str, Any]]] = {}

    def cut(self, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        """Cut documents to the text that `tokenizer` reads in `length` tokens, so that another tokenizer is asked of the same.

        Raises ValueError for other sets: what a chat template makes of them is no common text.
        """
        for place, (chosen, items) in enumerate(self.sets):
            if any(item.text is None or item.choices for item in items):
                raise ValueError(
                    f"evaluate: set {chosen.name!r} holds no documents, and the tokenizer before is another than the one after: "
                    "only scores on documents can be compared"
                )
            shorter = []
            for item in items:
                ends = tokenizer(item.text or "", add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
                text = item.text or ""
                shorter.append(dataclasses.replace(item, text=text[: ends[length - 1][1]] if len(ends) > length else text))  # type: ignore[index]
            self.sets[place] = (chosen, shorter)

    def before(self, score: Callable[[], Score], tokenizer: PreTrainedTokenizerBase, length: int) -> None:
        """Score the model as it is, or take what is on file; `score` is made only if it is needed.

        Raises JobCancelled when the user stopped.
        """
        found = self._scorable(tokenizer, length)
        name = self.workers.share(self.workers.on_first(lambda: self._name(found)))
        places = [self._own, *([storage.join(self.settings.cache, f"{name}.json")] if self.settings.cache else [])]
        scores = self.workers.share(self.workers.on_first(lambda: _kept(places, name)))
        if scores is None:
            scores = self._score(score(), found, "rows scored before training")
        about = json.dumps({"name": name, "model": self.model, "scores": scores}, sort_keys=True, ensure_ascii=False).encode()

        def write() -> None:
            for place in places:
                if not storage.exists(place) or json.loads(storage.read_bytes(place)).get("name") != name:
                    storage.write_bytes(place, about)

        self.workers.on_first(write)
        self._before = {key: {row["id"]: row for row in rows} for key, rows in scores.items()}

    def after(self, score: Score, tokenizer: PreTrainedTokenizerBase, length: int) -> dict[str, Any]:
        """Score the model as it is now: {"sets": one row a set, "empty": names of sets without a row}.

        A row is {"set", "role", "measure", "rows", "tokens", "before", "after", "kept", "lost", "left_out"} and what the recipe
        calls it; `kept` as in train.retention. Losses are nats a token of the tokenizer before.
        """
        scores = self._score(score, self._scorable(tokenizer, length), "rows scored after training")
        rows, empty = [], []
        for chosen, _ in self.sets:
            first = self._before.get(chosen.name, {})
            last = {row["id"]: row for row in scores.get(chosen.name, [])}
            both = [key for key in first if key in last]
            if not both:
                empty.append(chosen.name)
                continue
            tokens = sum(first[key]["tokens"] for key in both)
            size = len(both) if chosen.measure == "accuracy" else tokens
            old, new = (round(math.fsum(side[key]["value"] for key in both) / size, 6) for side in (first, last))
            share = retention.kept(old, new, chosen.measure)
            rows.append(
                {
                    "set": chosen.name, "role": chosen.role, "measure": chosen.measure, "rows": len(both), "tokens": tokens,
                    "before": old, "after": new, "kept": round(share, 6), "lost": round(1.0 - share, 6),
                    "left_out": self.left_out[chosen.name], "automatic": chosen.automatic, **chosen.source,
                }
            )  # fmt: skip
        return {"sets": rows, "empty": empty}

    def _scorable(self, tokenizer: PreTrainedTokenizerBase, length: int) -> list[Scorable]:
        size = min(length, self.settings.length)
        return self.workers.together(
            lambda: [evaluation_sets.scorable(chosen, items, tokenizer, size) for chosen, items in self.sets if items]
        )

    def _name(self, sets: Sequence[Scorable]) -> str:
        """A hash of all that the scores depend on."""
        cache = str(artifacts.cache_directory())
        digest = hashlib.sha256()
        for found in sets:
            ids = [[item.id, item.lang, item.right, list(item.choices)] for item in found.items]
            digest.update(json.dumps([found.chosen.name, found.chosen.measure, ids, found.groups]).encode())
            for row in found.rows:
                digest.update(len(row.ids).to_bytes(8, "little") + row.ids.astype("<i8").tobytes() + row.scored.tobytes())
        identity = {
            "version": _VERSION,
            "model": [content_revision(part, cache) for part in adapters.directories(_resolved(self.model))],
            "rows": digest.hexdigest(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            **self.identity,
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]

    def _score(self, score: Score, sets: Sequence[Scorable], note: str) -> dict[str, list[dict[str, Any]]]:
        total = sum(len(found.items) for found in sets)
        done = 0
        scores = {}
        for found in sets:
            sums = score(found.rows)
            if not np.isfinite(sums).all():
                raise ValueError(f"evaluate: the model gives rows of set {found.chosen.name!r} no finite log-probability")
            scores[found.chosen.name] = found.scores(sums)
            done += len(found.items)
            if self.workers.stop_requested(done, total, note, {}):
                raise JobCancelled(f"stopped after {done} of {total} {note}")
        return scores


def _read(chosen: ComparedSet, seed: int) -> list[Item]:
    return evaluation_sets.drawn(chosen, seed) if chosen.automatic else evaluation_sets.read(chosen, seed)


def _resolved(model: str) -> str:
    return packaged.resolve_model(model, str(artifacts.cache_directory())) if model.startswith(packaged.PREFIX) else model


def _kept(places: Sequence[str], name: str) -> dict[str, list[dict[str, Any]]] | None:
    for place in places:
        if storage.exists(place):
            content = json.loads(storage.read_bytes(place))
            if content.get("name") == name:
                return dict(content["scores"])
    return None


def scorer(model: Any, workers: Workers, precision: str, *, bare: bool = False) -> Score:
    """By a model that a trainer holds, whole on each worker or cut by FSDP2; `bare` leaves its adapter out."""

    def score(rows: Sequence[Row]) -> np.ndarray:
        vocab = int(model.config.get_text_config().vocab_size)
        budget = min(_MOST_TOKENS, max(1, _LOGIT_BYTES // (4 * vocab)))
        order = scoring.passes(rows, budget)
        device = workers.device
        found = torch.zeros(len(rows), dtype=torch.float64, device=device)
        training = model.training
        model.eval()
        try:
            with (
                torch.no_grad(),
                torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"),
                model.disable_adapter() if bare and isinstance(model, PeftModel) else nullcontext(),
            ):
                # A sharded model is called by all workers alike: one without a pass of its own does the last one again.
                for number in range(-(-len(order) // workers.world)):
                    index = number * workers.world + workers.rank
                    chosen = order[min(index, len(order) - 1)]
                    sums = scoring.summed(model, [rows[row] for row in chosen], device)
                    if index < len(order):
                        found[torch.tensor(chosen, device=device)] = torch.from_numpy(sums).to(device)
        finally:
            model.train(training)
        layout.reshard(model)
        return np.asarray(workers.sum(found).cpu().numpy())

    return score
