"""`ddpm-hf ema`: averages of other lengths from a run's snapshots, after the training; and which is best."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..utils.errors import UserError
from .command_line import Parser
from .evaluate import add_evaluation_flags, measure

SWEEP = "ema_sweep"
_GRID = (0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.06, 0.075, 0.10, 0.125, 0.15, 0.175, 0.20, 0.25)
_OF_BOTH = ("run", "sigma_rel", "step", "output")  # flags; those of ddpm-hf evaluate are for the sweep
_OWN = "the run's own EMA"


def ema_parser(prog: str | None = None) -> Parser:
    """Return the parser of `ddpm-hf ema`."""
    what = "Models of other EMA lengths from a run's snapshots (post-hoc EMA), after the training."
    usage = "RUN --sigma_rel X,Y --output FOLDER\n       %(prog)s RUN --sweep [flags of ddpm-hf evaluate]"
    parser = Parser(prog, what, usage)
    flag = parser.group("run and lengths")
    flag("run", str, None, "the folder of a run that was trained with --posthoc_ema, the default", metavar="RUN")
    text = "widths of the averages relative to the run: 0.05,0.1; with --sweep, left out: all that are possible of "
    flag("--sigma_rel", str, None, text + ",".join(f"{length:g}" for length in _GRID))
    flag("--step", int, None, "the update after which the averages end; left out: the last")
    text = "measure each length, and the run's own EMA, as ddpm-hf evaluate does, and say which is best"
    flag("--sweep", bool, False, f"{text}; writes RUN/{SWEEP}")
    add_evaluation_flags(parser)
    return parser


def ema(arguments: Sequence[str], prog: str | None = None) -> None:
    """Run `ddpm-hf ema`."""
    parser = ema_parser(prog)
    values = parser.parse_args(arguments)
    if values.model is not None or values.compare is not None:
        raise UserError("--model and --compare go with ddpm-hf evaluate; here the model is RUN")
    if values.sweep and values.output is not None:
        raise UserError(f"--sweep writes into RUN/{SWEEP}; leave out --output")
    if not values.sweep and (values.sigma_rel is None or values.output is None):
        raise UserError("give the lengths and where to: --sigma_rel 0.05,0.1 --output FOLDER; or --sweep")
    for name, default in vars(parser.parse_args([values.run])).items():
        if not values.sweep and name not in _OF_BOTH and getattr(values, name) != default:
            raise UserError(f"--{name} goes with --sweep")
    from ..training.posthoc_ema import Snapshots, possible_lengths
    from ..utils.files import check_new_folder
    from ..utils.processes import processes, raise_on_all_ranks, start_process

    start_process()
    snapshots = Snapshots(Path(values.run))
    update = snapshots.last if values.step is None else values.step
    if values.sigma_rel is None:
        lengths = possible_lengths(snapshots.known, update, _GRID)
    else:
        try:
            lengths = list(dict.fromkeys(float(part) for part in values.sigma_rel.split(",")))
        except ValueError:
            raise UserError(f"--sigma_rel takes numbers such as 0.05,0.1, got {values.sigma_rel!r}") from None
        for length in lengths:
            snapshots.check(length, update)
    if values.sweep:
        _sweep(values, snapshots, lengths, update)
        return
    with raise_on_all_ranks():
        if not processes().is_main_process:
            return
        check_new_folder(output := Path(values.output))
        for length in lengths:
            folder = output if len(lengths) == 1 else output / f"sigma_rel-{length:g}"
            error = snapshots.check(length, update)[1]
            _write(snapshots, length, update, folder)
            print(f"wrote {folder}: sigma_rel {length:g} after update {update}, predicted error {error:.2%}")


def _write(snapshots: Any, length: float, update: int, folder: Path) -> None:
    """Write the model of a length, with a card that says so."""
    from ..hub.files import facts_of_run, write_model
    from ..hub.model_card import CardFacts
    from ..models.unet_2d import check_weights
    from ..pipelines.checkpoints import recorded_state

    pipe = snapshots.pipeline(length, update)
    check_weights(pipe.unet)
    state = recorded_state(snapshots.run, "latest")  # whose checkpoints may have been removed
    facts = CardFacts(folder.name) if state is None else facts_of_run(snapshots.run, folder.name, state, update)
    text = f"power function of relative width sigma_rel {length:g}, ending after update {update} (post-hoc EMA, "
    text += f"Karras et al. 2024), reconstructed from snapshots after updates {', '.join(map(str, snapshots.files))}"
    facts = dataclasses.replace(facts, recipe={**facts.recipe, "EMA weights": text})
    write_model(folder, pipe, facts)


def _sweep(values: Any, snapshots: Any, lengths: list[float], update: int) -> None:
    """Measure every length and the run's own EMA; write a table, JSON and a plot."""
    from ..evaluation.plots import figure_class
    from ..evaluation.report import EvaluationReport
    from ..evaluation.run import parse_metrics
    from ..utils.files import writable_folder
    from ..utils.processes import log, processes, raise_on_all_ranks

    parse_metrics(values.metrics)
    figure_class()  # for what is written last
    folder = snapshots.run / SWEEP
    with raise_on_all_ranks():
        writable_folder(folder, "RUN")
    reports: dict[str, EvaluationReport] = {}
    own, own_name = snapshots.run / f"checkpoint-{update}", _OWN  # the published model may be of another update
    if not own.exists():
        own, own_name = snapshots.run, f"{_OWN}, the newest (there is no {own.name})"
    for length in [*lengths, None]:
        name = own_name if length is None else f"sigma_rel-{length:g}"
        model, output = (own, folder / "own") if length is None else (folder / "model" / name, folder / name)
        try:
            with raise_on_all_ranks():
                if length is not None and processes().is_main_process:
                    _write(snapshots, length, update, model)
            log(f"\n{name}")
            values.model, values.output = str(model), str(output)
            measure(values)
            reports[own_name if length is None else f"{length:g}"] = EvaluationReport.load(output)
        finally:
            if processes().is_main_process:
                shutil.rmtree(folder / "model", ignore_errors=True)
                with suppress(OSError):
                    folder.rmdir()  # empty, where nothing could be measured
    if processes().is_main_process:
        _write_sweep(folder, reports, update)


def _write_sweep(folder: Path, reports: dict[str, Any], update: int) -> None:
    """Write and print what was measured, the best of each number marked with `*`."""
    from ..evaluation.plots import save_figure, sweep_figure
    from ..evaluation.samples import higher_is_better
    from ..utils.files import write_text
    from ..utils.text import finite, number, table

    first = next(iter(reports.values()))
    names = [name for name in first.values if higher_is_better(name) is not None]
    found = {key: {name: report.values[name] for name in names} for key, report in reports.items()}
    best = {}
    for name in names:
        choose = max if higher_is_better(name) else min
        best[name] = choose(found, key=lambda key: found[key][name]["value"])
    rows = [["sigma_rel", *names]]
    for key, numbers in found.items():
        cells = [number(entry["value"], entry["standard_error"]) for entry in numbers.values()]
        rows.append([key, *(cell + " *" * (best[n] == key) for n, cell in zip(names, cells, strict=True))])
    lines = [f"averages that end after update {update}; * is the best\n", table(rows), ""]
    *lengths, own = found
    lines += [f"best by {name}: {key if key == own else f'sigma_rel {key}'}" for name, key in best.items()]
    write_text(folder / "sweep.md", "\n".join(lines) + "\n")
    content = {"update": update, "best": best, "values": found, "settings": first.settings}
    write_text(folder / "sweep.json", json.dumps(finite(content), indent=1) + "\n")
    curves = {name: [found[key][name]["value"] for key in lengths] for name in names}
    paper = {name: entry["value"] for name, entry in found[own].items()}
    save_figure(sweep_figure([float(key) for key in lengths], curves, paper), folder / "sweep.png")
    print("\n" + "\n".join(lines) + f"\nwrote sweep.md, sweep.json and sweep.png into {folder}")
