"""The `danlu` command.

Exit codes: 0 done, 1 a stage failed, 2 wrong usage or recipe or input, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal

from rich.console import Console

from cluster import storage
from cluster.remote import PathError, StoreGone
from cluster.startup import defer_pandas
from operators.config import SettingsError
from operators.stage import Cancelled

_OUT = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 140)  # a pipe has no width
_ERR = Console(stderr=True, highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parsed = _parser().parse_args(arguments)
    defer_pandas()
    try:
        return int(parsed.run(parsed))
    except (SettingsError, PathError, FileNotFoundError, PermissionError, NotADirectoryError) as error:
        _complain(str(error), "error: ")
        return 2
    except OSError as error:
        from pipelines.runner import explain

        _complain(explain(error), "error: ")
        return 1 if error.errno == errno.ENOSPC or isinstance(error, StoreGone) else 2
    except KeyboardInterrupt:
        return 130


def _complain(message: str, before: str = "") -> None:
    """Lines for standard error, credentials taken out: what went wrong may quote what was given."""
    from pipelines.journal import without_secrets

    for line in without_secrets(message).splitlines():
        _ERR.print(f"{before}{line}", markup=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="danlu",
        description="Danlu (丹炉): from raw text to an aligned, evaluated language model, on Ray. One recipe, one command.",
        epilog="Exit codes: 0 done, 1 a stage failed, 2 wrong usage, recipe or input, 130 stopped by Ctrl-C.",
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a recipe; what is done already is not done again", description=_run.__doc__)
    _run_options(run)
    run.add_argument("--address", metavar="ADDRESS", help="join this Ray cluster (`auto`, or ray://...) instead of starting one")
    run.add_argument(
        "--metrics-port", type=_port, metavar="PORT", help="serve Prometheus metrics at http://127.0.0.1:PORT/metrics meanwhile"
    )
    run.add_argument(
        "--metrics-host", metavar="HOST",
        help="serve them on this address instead of 127.0.0.1: whoever reaches it may read them",
    )  # fmt: skip
    run.set_defaults(run=_run)

    check = commands.add_parser("check", help="check a recipe without running it", description=_check.__doc__)
    check.add_argument("recipe", metavar="RECIPE", help="path of a recipe (YAML)")
    check.add_argument("--runs", default="runs", metavar="DIR", help="folder or URI that holds the runs (default: runs)")
    check.add_argument("--limit", type=_positive, metavar="N", help="check for a trial run with this limit")
    check.add_argument("--workers", type=_positive, default=2, metavar="N", help="workers of a stage (default: 2)")
    check.add_argument("--train-workers", type=_positive, metavar="N", help="workers of a training stage (default: --workers)")
    check.add_argument("--lang", choices=["en", "zh"], help="language of the findings (default: the locale's)")
    check.add_argument("--json", action="store_true", help="print the findings alone, as JSON")
    check.add_argument("--strict", action="store_true", help="exit code 1 when there is a finding")
    check.set_defaults(run=_check)

    plan = commands.add_parser("plan", help="tell what a recipe would need and take on a cluster", description=_plan.__doc__)
    plan.add_argument("recipe", metavar="RECIPE", help="path of a recipe (YAML)")
    plan.add_argument(
        "--cluster", default="laptop", metavar="SPEC",
        help="laptop, 4xl20, 8xa100, 8xh100, 64cpu, or a YAML file that describes one (default: laptop)",
    )  # fmt: skip
    plan.add_argument("--rates", metavar="FILE", help="rates of your machine, as `danlu rates` writes them (default: those along)")
    plan.add_argument("--runs", default="runs", metavar="DIR", help="folder or URI that holds the runs (default: runs)")
    plan.add_argument("--limit", type=_positive, metavar="N", help="plan a trial run with this limit")
    plan.add_argument("--lang", choices=["en", "zh"], help="language of the table and the warnings (default: the locale's)")
    plan.add_argument("--json", action="store_true", help="print the plan as JSON")
    plan.add_argument("--strict", action="store_true", help="exit code 1 when there is a warning")
    plan.set_defaults(run=_plan)

    rates = commands.add_parser("rates", help="measure this machine for `danlu plan`", description=_rates.__doc__)
    rates.add_argument("--out", default="rates.yaml", metavar="FILE", help="file or URI to write (default: rates.yaml)")
    rates.add_argument("--disk", default=".", metavar="DIR", help="folder on the disk to be measured (default: this one)")
    rates.add_argument("--seconds", type=_positive, default=60, metavar="N", help="take about so long (default: 60)")
    rates.set_defaults(run=_rates)

    diagnose = commands.add_parser("diagnose", help="measure the symptoms of a model made worse", description=_diagnose.__doc__)
    diagnose.add_argument("directory", metavar="RUN", help="a run's directory, e.g. runs/quickstart")
    diagnose.add_argument("--stage", metavar="NAME", help="a stage that made a model (default: the last one that did)")
    diagnose.add_argument("--max-new-tokens", type=_positive, default=96, metavar="N", help="tokens of a reply (default: 96)")
    diagnose.add_argument("--lang", choices=["en", "zh"], help="language of names and remedies (default: the locale's)")
    diagnose.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    diagnose.add_argument("--strict", action="store_true", help="exit code 1 when a symptom is bad")
    diagnose.set_defaults(run=_diagnose)

    ops = commands.add_parser("ops", help="list operators and stages, or explain one", description=_ops.__doc__)
    ops.add_argument("action", nargs="?", choices=["list", "show"], default="list")
    ops.add_argument("name", nargs="?", metavar="NAME", help="an operator, a stage kind, or an import path")
    ops.set_defaults(run=_ops)

    report = commands.add_parser("report", help="write a run's report.html again", description=_report.__doc__)
    report.add_argument("directory", metavar="RUN", help="a run's directory, e.g. runs/quickstart")
    report.set_defaults(run=_report)

    trace = commands.add_parser("trace", help="tell what became of one document or row", description=_trace.__doc__)
    trace.add_argument("directory", metavar="RUN", help="a run's directory, e.g. runs/quickstart")
    trace.add_argument("id", metavar="ID", help="the id of a document, conversation or preference pair")
    trace.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    trace.set_defaults(run=_trace)

    stats = commands.add_parser("stats", help="count and measure the rows of a stage or of files", description=_stats.__doc__)
    stats.add_argument(
        "path", metavar="PATH", help="RUN/STAGE (e.g. runs/quickstart/clean), a stage's directory, a file, folder or glob"
    )
    stats.add_argument("--tokenizer", metavar="DIR", help="count tokens with the tokenizer.json in this directory")
    stats.add_argument(
        "--format", metavar="FORMAT", help="how the files are written, as `read: {format: ...}` (default: by file name)"
    )
    stats.add_argument("--text-column", metavar="NAME", help="column or key of the text in files (default: text)")
    stats.add_argument("--columns", metavar="NAME[:TYPE]", nargs="+", help="further columns of files to count or measure")
    stats.add_argument("--workers", type=_positive, default=2, metavar="N", help="processes (default: 2)")
    stats.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    stats.set_defaults(run=_stats)

    decide = commands.add_parser("decide", help="tell what other thresholds would change in a run", description=_decide.__doc__)
    decide.add_argument("directory", metavar="RUN", help="a run's directory, e.g. runs/quickstart")
    decide.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="[STAGE.]OPERATOR.OPTION=VALUE",
        help="an option to change, e.g. web.gopher_quality.min_words=30 or gopher_quality.zh.min_words=20; may be repeated",
    )
    decide.add_argument("--stage", metavar="STAGE", help="only this corpus stage")
    decide.add_argument("--examples", type=_count, default=3, metavar="N", help="rows to show of each change (default: 3)")
    decide.add_argument("--workers", type=_positive, default=1, metavar="N", help="processes that replay (default: 1)")
    decide.add_argument("--address", metavar="ADDRESS", help="replay on this Ray cluster (`auto`, or ray://...)")
    decide.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    decide.set_defaults(run=_decide)

    review = commands.add_parser("review", help="have people judge a sample of a stage's rows", description=_review.__doc__)
    acts = review.add_subparsers(title="actions", required=True, metavar="ACTION", dest="action")
    export = acts.add_parser("export", help="write a sample as a page (review.html) and as JSON Lines (review.jsonl)")
    _stage_arguments(export)
    export.add_argument("--rows", type=_positive, default=100, metavar="N", help="rows of the sample (default: 100)")
    export.add_argument("--seed", type=_count, default=0, metavar="N", help="another sample (default: 0)")
    export.add_argument(
        "--by", nargs="*", choices=["source", "method", "lang"], default=["source", "method"],
        help="what the strata are made of (default: source method)",
    )  # fmt: skip
    export.add_argument("--out", required=True, metavar="DIR", help="folder or URI to write to")
    take = acts.add_parser("import", help="check verdicts and keep them in the run")
    _stage_arguments(take)
    take.add_argument("files", nargs="+", metavar="FILE", help="verdicts as the page downloads them, or a review.jsonl filled in")
    take.add_argument("--reviewer", metavar="NAME", help="who wrote the lines that name no reviewer")
    take.add_argument("--replace", action="store_true", help="verdicts may replace earlier ones of the same reviewer")
    tell = acts.add_parser("report", help="acceptance with its interval by source and method, and how far reviewers agree")
    tell.add_argument("directory", metavar="RUN", help="a run's directory, e.g. runs/quickstart")
    tell.add_argument("stage", nargs="?", metavar="STAGE", help="a stage (default: all with a sample)")
    tell.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    review.set_defaults(run=_review)

    status = commands.add_parser("status", help="tell how far a run is, from another shell", description=_status.__doc__)
    status.add_argument("directory", metavar="RUN", help="a run's directory, e.g. runs/quickstart")
    status.add_argument("--json", action="store_true", help="print one JSON object (one a line with --watch)")
    status.add_argument(
        "--prometheus", action="store_true", help="print Prometheus metrics, as for node_exporter's textfile collector"
    )
    status.add_argument("--watch", action="store_true", help="look again and again until the run has ended")
    status.add_argument("--every", type=_positive, default=5, metavar="S", help="seconds between two looks (default: 5)")
    status.set_defaults(run=_status)
    diff = commands.add_parser(
        "diff", help="compare two runs: settings, counts, rows that changed sides", description=_diff.__doc__
    )
    diff.add_argument("first", metavar="RUN", help="a run's directory, e.g. runs/before")
    diff.add_argument("second", metavar="RUN", help="the other run's directory")
    diff.add_argument("--stage", metavar="NAME", help="compare this stage alone")
    diff.add_argument("--examples", type=_count, default=3, metavar="N", help="rows shown for each change (default: 3)")
    diff.add_argument(
        "--memory-rows", type=_positive, default=4_000_000, metavar="N", help="rows joined in memory at once (default: 4000000)"
    )
    diff.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    diff.set_defaults(run=_diff)
    clean = commands.add_parser("clean", help="remove temporary and unreferenced files of a run", description=_clean.__doc__)
    clean.add_argument("directory", metavar="RUN", help="a run's directory, e.g. runs/quickstart")
    clean.add_argument("--dry-run", action="store_true", help="only tell what would be removed")
    clean.add_argument(
        "--superseded", action="store_true", help="also stage directories of fingerprints that the run has left behind"
    )
    clean.add_argument(
        "--older",
        nargs="+",
        default=[],
        metavar="FINGERPRINT",
        help="with --superseded: only these (FINGERPRINT or STAGE/FINGERPRINT)",
    )
    clean.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    clean.set_defaults(run=_clean)

    forget = commands.add_parser("forget", help="take documents out of a run, with all made from them", description=_forget.__doc__)
    forget.add_argument("directory", metavar="RUN", help="a run's directory, e.g. runs/quickstart")
    forget.add_argument("id", nargs="*", metavar="ID", help="ids of documents, conversations or pairs")
    forget.add_argument("--ids", metavar="FILE", help="further ids, one a line (UTF-8)")
    forget.add_argument("--dry-run", action="store_true", help="only tell what would go, and which models saw it")
    forget.add_argument("--reason", default="", metavar="TEXT", help="kept with the takedown, e.g. a ticket's number")
    forget.add_argument(
        "--with-duplicates",
        action="store_true",
        help="also the rows that dedup removed as copies of these, or kept instead of them",
    )
    forget.add_argument("--lang", choices=["en", "zh"], help="language of the output (default: the locale's)")
    forget.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    forget.set_defaults(run=_forget)

    submit = commands.add_parser("submit", help="run a recipe as a Ray job on a cluster", description=_submit.__doc__)
    _run_options(submit)
    submit.add_argument("--address", required=True, metavar="URL", help="the cluster's job server, e.g. http://127.0.0.1:8265")
    submit.add_argument("--working-dir", default=".", metavar="DIR", help="the checkout to ship (default: this folder)")
    submit.add_argument("--no-wait", action="store_true", help="return once submitted instead of following the logs")
    submit.set_defaults(run=_submit)
    jobs = commands.add_parser("jobs", help="list, follow and stop jobs on a cluster", description=_jobs.__doc__)
    jobs.add_argument("action", nargs="?", choices=["list", "logs", "stop"], default="list")
    jobs.add_argument("job", nargs="?", metavar="JOB", help="the job's name, for logs and stop")
    jobs.add_argument("--address", required=True, metavar="URL", help="the cluster's job server, e.g. http://127.0.0.1:8265")
    jobs.add_argument("--follow", action="store_true", help="logs: go on until the job ends, and return its exit code")
    jobs.add_argument("--all", action="store_true", help="list: jobs that others submitted as well")
    jobs.add_argument("--json", action="store_true", help="list: as JSON, one object a line")
    jobs.set_defaults(run=_jobs)

    manifest = commands.add_parser(
        "manifest", help="write KubeRay, launcher, Slurm or container files for a cluster", description=_manifest.__doc__
    )
    manifest.add_argument(
        "target", choices=["kuberay", "launcher", "slurm", "containerfile", "grafana", "settings"],
        help="what to write (grafana: a dashboard for the metrics of runs; settings: list them)",
    )  # fmt: skip
    manifest.add_argument("--kind", choices=["job", "cluster"], help="kuberay: RayJob or RayCluster (default: job)")
    manifest.add_argument("--recipe", metavar="RECIPE", help="the recipe that it is for: decides the groups of workers")
    manifest.add_argument("--runs", metavar="DIR", help="folder or URI that holds the runs (default: runs)")
    manifest.add_argument(
        "--set", action="append", default=[], dest="settings", metavar="PATH=VALUE",
        help="a setting to change, e.g. workers.gpu.max=8; may be repeated; `danlu manifest settings` lists them",
    )  # fmt: skip
    manifest.add_argument("--out", metavar="FILE", help="write to this file instead of the terminal")
    manifest.set_defaults(run=_manifest)
    return parser


def _stage_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="RUN", help="a run's directory, e.g. runs/quickstart")
    parser.add_argument("stage", metavar="STAGE", help="a finished stage with conversations, preference pairs or documents")


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="path of a recipe (YAML)")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="folder or URI that holds the runs (default: runs)")
    parser.add_argument("--limit", type=_positive, metavar="N", help="trial run: N rows a read, N synthesised rows, N steps")
    parser.add_argument("--workers", type=_positive, default=2, metavar="N", help="workers of a stage (default: 2)")
    parser.add_argument(
        "--train-workers",
        type=_positive,
        metavar="N",
        help="workers of a training stage (default: one a GPU, else --workers)",
    )
    parser.add_argument("--cpus", type=_positive, metavar="N", help="logical CPUs of the Ray that is started here")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _port(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 65535:
        raise argparse.ArgumentTypeError(f"must be a port, 1 to 65535, got {number}")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {number}")
    return number


def _run(parsed: argparse.Namespace) -> int:
    """Run a recipe. Finished stages are found by fingerprint and skipped; an unfinished one goes on where it stopped."""
    from pipelines.progress import Display
    from pipelines.recipe import load_recipe
    from pipelines.report.summary import summary_table
    from pipelines.runner import Options, RayLost, Run, RunError, resume_command

    if parsed.metrics_host and not parsed.metrics_port:
        raise SettingsError("--metrics-host says nothing without --metrics-port")
    recipe, text = load_recipe(parsed.recipe)
    options = Options(
        runs=parsed.runs,
        limit=parsed.limit,
        workers=parsed.workers,
        train_workers=parsed.train_workers,
        address=parsed.address,
        cpus=parsed.cpus,
        command=shlex.join(["danlu", *sys.argv[1:]]),
    )
    again = resume_command(options, parsed.recipe)
    with Display(_ERR) as display, contextlib.ExitStack() as services:
        run = Run(recipe, text, options, display)
        if parsed.metrics_port:
            from pipelines.metrics import served

            host = parsed.metrics_host or "127.0.0.1"
            services.enter_context(served(parsed.metrics_port, host, lambda: run.live.status))
            run.live.first_s = 0.0
            display.line(f"metrics at http://{host}:{parsed.metrics_port}/metrics")

        def stop(_signal: int, _frame: Any) -> None:
            if run.cancelled.is_set():
                os._exit(130)
            display.line("stopping at the next commit; press Ctrl-C again to stop at once")
            run.stop()

        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        code, message, waiting = 0, "", False
        try:
            run.execute()
        except Cancelled:
            code, message, waiting = 130, f"stopped; what was committed stays. Go on with: {again}", True
        except RayLost as error:
            code, message, waiting = 1, f"{error}; what was committed stays. Go on with: {again}", True
        except RunError as error:
            code, message = 1, f"{error}\nwhat was committed stays. Once it is mended, go on with: {again}"
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
    _OUT.print(summary_table(run.directory))
    _complain(message)
    _OUT.print(storage.join(run.directory, "report.html"), markup=False)
    if waiting:  # threads that still wait on Ray would hold the process back
        sys.stdout.flush()
        os._exit(code)
    return code


def _check(parsed: argparse.Namespace) -> int:
    """Check a recipe: keys, operators, inputs, files, the graph; then look for the known causes of a model made worse, in the
    settings and in what finished stages have left. Findings are warnings; with --strict their number decides the exit code."""
    import json

    from pipelines.checks import rules
    from pipelines.checks.evidence import Evidence
    from pipelines.graph import plan
    from pipelines.recipe import load_recipe
    from pipelines.runner import preflight

    recipe, _ = load_recipe(parsed.recipe)
    nodes = plan(recipe, storage.join(storage.absolute(parsed.runs, os.getcwd()), recipe.name), os.getcwd(), parsed.limit)
    for node in nodes:
        preflight(node, os.getcwd())
    workers = parsed.train_workers or parsed.workers
    findings = rules.run(Evidence(recipe, {node.name: node for node in nodes}, os.getcwd(), workers))
    language = _language(parsed.lang)
    if parsed.json:
        print(json.dumps([finding.as_json(language) for finding in findings], ensure_ascii=False, indent=1))
        return 1 if parsed.strict and findings else 0
    for node in nodes:
        done = "done" if storage.exists(storage.join(node.directory, "manifest.json")) else "to do"
        inputs = f" <- {', '.join(node.inputs)}" if node.inputs else ""
        _OUT.print(f"{node.name:<16} {node.stage.kind:<18} {node.fingerprint}  {done}{inputs}", markup=False)
    for finding in findings:
        _OUT.print(f"warning: {finding.line(language)}", markup=False)
    _OUT.print(f"{parsed.recipe}: {len(nodes)} stages, no errors, {len(findings)} warnings", markup=False)
    return 1 if parsed.strict and findings else 0


def _diagnose(parsed: argparse.Namespace) -> int:
    """Have a run's model answer a few dozen built-in prompts in English and Chinese, and tell what ails it: each symptom with
    its number, its bound, the number of the model before, and a remedy. Writes diagnosis.json into the run, and its report anew."""
    import json

    from pipelines.diagnose import diagnose, summary
    from pipelines.report.build import build_report

    language: Any = parsed.lang or ("zh" if os.environ.get("LC_ALL", os.environ.get("LANG", "")).startswith("zh") else "en")
    found = diagnose(
        storage.absolute(parsed.directory, os.getcwd()), parsed.stage, max_new_tokens=parsed.max_new_tokens,
        base_directory=os.getcwd(), progress=lambda line: _ERR.print(line, markup=False),
    )  # fmt: skip
    symptoms = found["symptoms"]
    report = build_report(storage.absolute(parsed.directory, os.getcwd()))
    if parsed.json:
        told = {**found, "symptoms": [symptom.as_json(language) for symptom in symptoms]}
        print(json.dumps(told, ensure_ascii=False, indent=1))
    else:
        for symptom in symptoms:
            _OUT.print(symptom.line(language), markup=False)
        _OUT.print(summary(found, language), markup=False)
        _OUT.print(report, markup=False)
    return 1 if parsed.strict and any(symptom.verdict == "bad" for symptom in symptoms) else 0


def _plan(parsed: argparse.Namespace) -> int:
    """Plan before running: for every stage the units, CPU, GPU and memory of a task, bytes exchanged, disk, tokens and time on a
    cluster, from rates measured on one core, and what will not fit there."""
    import json

    from pipelines.planning import show
    from pipelines.recipe import load_recipe

    recipe, _ = load_recipe(parsed.recipe)
    cluster, rates = show.load_cluster(parsed.cluster), show.load_rates(parsed.rates)
    laid = show.make_plan(recipe, parsed.runs, os.getcwd(), cluster, rates, parsed.limit)
    language = _language(parsed.lang)
    if parsed.json:
        _OUT.print(json.dumps(show.as_json(laid, rates, language), ensure_ascii=False), markup=False)
    else:
        for piece in show.pieces(laid, rates, parsed.rates is None, language):
            _OUT.print(piece)
    warned = bool(laid.warnings) or any(stage.warnings for stage in laid.stages)
    return 1 if parsed.strict and warned else 0


def _rates(parsed: argparse.Namespace) -> int:
    """Measure what a core, the disk and a GPU of this machine do in a second, and write the file that `danlu plan` reads."""
    from pipelines.planning.measure import measure
    from pipelines.planning.show import write_rates

    command, disk = shlex.join(["danlu", *sys.argv[1:]]), storage.absolute(parsed.disk, os.getcwd())
    found = measure(parsed.seconds, disk, command, lambda line: _ERR.print(line, markup=False))
    write_rates(found, storage.absolute(parsed.out, os.getcwd()))
    _OUT.print(parsed.out, markup=False)
    return 0


def _language(asked: Literal["en", "zh"] | None) -> Literal["en", "zh"]:
    """The language asked for, else the locale's."""
    locale = os.environ.get("LC_ALL") or os.environ.get("LANG", "")
    return asked or ("zh" if locale.startswith("zh") else "en")


def _ops(parsed: argparse.Namespace) -> int:
    """List what a recipe may name, or show one operator or stage with every setting, its type, default and meaning."""
    from pipelines.describe import describe_one, list_all

    if parsed.action == "show" and not parsed.name:
        raise SettingsError("danlu ops show needs the NAME of an operator or stage; `danlu ops` lists them")
    if parsed.action == "list" and parsed.name:
        raise SettingsError(f"did you mean `danlu ops show {parsed.name}`?")
    for line in describe_one(parsed.name) if parsed.name else list_all():
        _OUT.print(line, markup=False)
    return 0


def _report(parsed: argparse.Namespace) -> int:
    """Write report.html of a run again from its manifests, print the table and the path."""
    from pipelines.report.build import build_report
    from pipelines.report.summary import summary_table

    if not storage.exists(storage.join(parsed.directory, "run.json")):
        raise FileNotFoundError(f"{parsed.directory} is no run: it has no run.json (a run is e.g. runs/quickstart)")
    report = build_report(storage.absolute(parsed.directory, os.getcwd()))
    _OUT.print(summary_table(storage.absolute(parsed.directory, os.getcwd())))
    _OUT.print(report, markup=False)
    return 0


def _trace(parsed: argparse.Namespace) -> int:
    """Tell what became of one row: kept, rejected (by what, why), removed as duplicate of which, packed where, seen when."""
    import json

    from pipelines.trace import trace

    events = trace(storage.absolute(parsed.directory, os.getcwd()), parsed.id)
    if parsed.json:
        _OUT.print(json.dumps({"id": parsed.id, "events": [event.__dict__ for event in events]}, ensure_ascii=False), markup=False)
    else:
        for event in events:
            _OUT.print(f"{event.stage:<16} {event.what:<12} {event.detail}", markup=False)
    if not events:
        raise FileNotFoundError(f"no stage of {parsed.directory} knows a row with id {parsed.id!r}")
    return 0


def _status(parsed: argparse.Namespace) -> int:
    """Tell how far a run is: units, rows, pace and time left of each stage, failures and retries, who holds the run since when.
    Works from any machine that sees the run's directory. Exit code 1 when the run failed or was killed."""
    import json

    from pipelines.status import Watch, table

    if parsed.prometheus and (parsed.json or parsed.watch):
        raise SettingsError("--prometheus prints one look in one format: leave out --json and --watch")
    watch = Watch(storage.absolute(parsed.directory, os.getcwd()))
    while True:
        found = watch.look()
        if parsed.prometheus:
            from pipelines.metrics import text

            sys.stdout.write(text(found))
            return 0
        if parsed.json:
            print(json.dumps(found.to_json(), ensure_ascii=False), flush=True)
        else:
            if parsed.watch and _OUT.is_terminal:
                _OUT.clear()
            _OUT.print(table(found))
        if not parsed.watch or found.state != "running":
            return 1 if found.state in ("failed", "killed") else 0
        time.sleep(parsed.every)


def _diff(parsed: argparse.Namespace) -> int:
    """Compare two runs stage by stage: settings, counts and statistics, and which rows changed sides, by what and why. Rows are
    joined by the hashes of their ids on disk, so memory does not grow with them. Exit code 0 whether they differ or not."""
    import json

    from pipelines.diff import diff, lines

    first, second = (storage.absolute(path, os.getcwd()) for path in (parsed.first, parsed.second))
    found = diff(first, second, stage=parsed.stage, examples=parsed.examples, memory_rows=parsed.memory_rows)
    if parsed.json:
        print(json.dumps(found.to_json(), ensure_ascii=False))
    else:
        for line in lines(found):
            _OUT.print(line, markup=False)
    return 0


def _clean(parsed: argparse.Namespace) -> int:
    """Remove what no record of a run names: temporary files, scratch, unreferenced parts, keys that finished stages exchanged.
    Committed data is never touched; a run at work is not cleaned."""
    import json

    from pipelines.clean import clean, lines

    directory = storage.absolute(parsed.directory, os.getcwd())
    found = clean(directory, dry_run=parsed.dry_run, superseded=parsed.superseded, older=parsed.older)
    if parsed.json:
        print(json.dumps(found.to_json(), ensure_ascii=False))
    else:
        for line in lines(found):
            _OUT.print(line, markup=False)
    return 0


def _forget(parsed: argparse.Namespace) -> int:
    """Take documents out of a run: rewrite the files that hold them or rows that were made from them, keep them out of what the run
    reads later, and list the models that saw them. May be killed at any time; the next command on the run finishes it. Exit code 0
    when all ids were found (now or by an earlier takedown), 1 when some were not, 2 for wrong usage or a run at work."""
    import json

    from pipelines.forget.takedown import forget, lines

    ids = list(parsed.id)
    if parsed.ids is not None:
        text = storage.read_bytes(storage.absolute(parsed.ids, os.getcwd())).decode("utf-8")
        ids += [line.strip() for line in text.splitlines() if line.strip()]
    directory = storage.absolute(parsed.directory, os.getcwd())
    told = forget(directory, ids, dry_run=parsed.dry_run, reason=parsed.reason, with_duplicates=parsed.with_duplicates)
    if parsed.json:
        print(json.dumps(told.to_json(), ensure_ascii=False))
    else:
        for line in lines(told, _language(parsed.lang)):
            _OUT.print(line, markup=False)
    return 1 if told.not_found else 0


def _stats(parsed: argparse.Namespace) -> int:
    """Count rows, characters, words and tokens, by language, and tell the distribution of lengths and of every score."""
    import json

    from pipelines.stats import statistics, tables

    options = {"format": parsed.format, "text_column": parsed.text_column, "columns": parsed.columns}
    given = {name: value for name, value in options.items() if value is not None}
    found = statistics(parsed.path, tokenizer=parsed.tokenizer, workers=parsed.workers, options=given)
    if parsed.json:
        _OUT.print(json.dumps(found.to_json(), ensure_ascii=False), markup=False)
    else:
        _OUT.print(tables(found))
    return 0


def _decide(parsed: argparse.Namespace) -> int:
    """Decide again from stored measures, without reading text: which rows another threshold would keep or reject. Without
    --set, check that the replay makes the decisions of the run again (exit code 1 if it does not)."""
    import json

    from pipelines.decide import decide, lines

    decisions = decide(
        storage.absolute(parsed.directory, os.getcwd()),
        parsed.settings,
        stage=parsed.stage,
        examples=parsed.examples,
        workers=parsed.workers,
        address=parsed.address,
    )
    if parsed.json:
        _OUT.print(json.dumps([decision.to_json() for decision in decisions], ensure_ascii=False), markup=False)
    else:
        for decision in decisions:
            for line in lines(decision):
                _OUT.print(line, markup=False)
    if not decisions:
        raise SettingsError(f"no stage of {parsed.directory} kept measures")
    return 1 if any(decision.outcome.disagreeing for decision in decisions) else 0


def _review(parsed: argparse.Namespace) -> int:
    """Review by people: export a stratified sample as a page that works offline, import the verdicts, report what they say."""
    from pipelines.review import command

    run = storage.absolute(parsed.directory, os.getcwd())
    if parsed.action == "export":
        lines = command.export(run, parsed.stage, parsed.rows, parsed.seed, parsed.by, storage.absolute(parsed.out, os.getcwd()))
    elif parsed.action == "import":
        files = [storage.absolute(path, os.getcwd()) for path in parsed.files]
        lines = command.import_verdicts(run, parsed.stage, files, parsed.reviewer, parsed.replace)
    else:
        for piece in command.report(run, parsed.stage, parsed.json):
            _OUT.print(piece, markup=False)
        return 0
    for line in lines:
        _OUT.print(line, markup=False)
    return 0


def _jobs(parsed: argparse.Namespace) -> int:
    """List the jobs that were submitted to a cluster, write one's output, or stop one."""
    import datetime
    import json

    from cluster import jobs

    if (parsed.job is None) != (parsed.action == "list"):
        needs = "takes no JOB" if parsed.action == "list" else "needs a JOB; `danlu jobs` lists them"
        raise SettingsError(f"danlu jobs {parsed.action} {needs}")
    if parsed.action == "logs":
        return jobs.logs(parsed.address, parsed.job, parsed.follow)
    if parsed.action == "stop":
        _OUT.print(f"{parsed.job} {jobs.stop(parsed.address, parsed.job)}", markup=False)
        return 0
    for job in jobs.listed(parsed.address, parsed.all):
        if parsed.json:
            _OUT.print(json.dumps(job.__dict__, ensure_ascii=False), markup=False, soft_wrap=True)
            continue
        began = datetime.datetime.fromtimestamp(job.began).strftime("%Y-%m-%d %H:%M:%S") if job.began else "not yet"
        took = f"{(job.ended or time.time()) - job.began:,.0f} s" if job.began else ""
        _OUT.print(f"{job.name:<40} {job.status:<10} {began:<20} {took:>10}  {job.recipe}", markup=False, soft_wrap=True)
    return 0


def _submit(parsed: argparse.Namespace) -> int:
    """Ship this checkout and a recipe to a cluster, run it there as a Ray job, follow its logs, return its exit code."""
    from cluster.jobs import submit
    from pipelines.recipe import load_recipe

    load_recipe(parsed.recipe)
    extra = ["--workers", str(parsed.workers), "--address", "auto"]
    if parsed.train_workers is not None:
        extra += ["--train-workers", str(parsed.train_workers)]
    if parsed.limit is not None:
        extra += ["--limit", str(parsed.limit)]
    return submit(
        parsed.recipe,
        parsed.address,
        working_dir=parsed.working_dir,
        arguments=extra,
        wait=not parsed.no_wait,
        runs=parsed.runs,
    )


def _manifest(parsed: argparse.Namespace) -> int:
    """Write what brings up a cluster: KubeRay resources, YAML for Ray's cluster launcher, a Slurm script, a container file; or the
    Grafana dashboard for what `danlu run --metrics-port` and `danlu status --prometheus` tell."""
    from pipelines.manifest import manifest

    text = manifest(parsed)
    if parsed.out is None:
        sys.stdout.write(text)
    else:
        storage.write_bytes(storage.absolute(parsed.out, os.getcwd()), text.encode())
        _ERR.print(f"wrote {parsed.out}", markup=False)
    return 0
