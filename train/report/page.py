"""Writes report.md, report.html and report.json. Sections are made independently, so that one can fail without the others."""

import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from uni_instruct import __version__
from uni_instruct.evaluate import Evaluator
from uni_instruct.system.files import atomic_file, atomic_folder
from uni_instruct.system.progress import ProgressFactory, silent
from uni_instruct.train.plan import Plan
from uni_instruct.train.report.class_section import class_section
from uni_instruct.train.report.command_section import command_section, command_words
from uni_instruct.train.report.html import write_html
from uni_instruct.train.report.inputs import Json, ReportInputs, open_run
from uni_instruct.train.report.markdown import text
from uni_instruct.train.report.result_sections import curve_section, neighbour_section, sample_section, score_section
from uni_instruct.train.report.run_sections import objective_section, subject_section, time_section, warning_section
from uni_instruct.train.report.steps_section import step_section

REPORT, HTML, JSON, PICTURES = "report.md", "report.html", "report.json", "report"
Section = Callable[[ReportInputs], list[str]]
SECTIONS: dict[str, Section] = {
    "What was trained": subject_section,
    "Samples": sample_section,
    "Scores": score_section,
    "Steps": step_section,
    "Classes": class_section,
    "Nearest training images": neighbour_section,
    "Curves": curve_section,
    "Warnings": warning_section,
    "Objective": objective_section,
    "Commands": command_section,
}
_log = logging.getLogger(__name__)


def write_report(
    folder: Path, plan: Plan | None = None, evaluator: Evaluator | None = None, with_progress: ProgressFactory = silent
) -> Path:
    """Write a finished run's report.md, with its pictures in report/. Returns its path. Replaces an existing report.

    report.html has the same content in one file, with the pictures embedded; report.json has the measurements. Pass plan and
    evaluator if they exist already, to avoid opening the data and computing its features again. A section that fails is
    replaced by its error. Raises RequestError if the run is not finished, DiskError if nothing can be written.
    """
    start = time.monotonic()
    with atomic_folder(folder / PICTURES) as pictures, with_progress("report", len(SECTIONS), "sections") as shown:
        inputs = open_run(folder, pictures, plan, evaluator)
        blocks = [f"# {text(inputs.plan.recipe.name)}"]
        for title, section in SECTIONS.items():
            lines = _section_or_error(section, inputs, title)
            blocks += [f"## {title}", "\n".join(lines)] if lines else []
            shown.advance(1, title.lower())
        blocks += ["## Time", "\n".join(time_section(inputs, time.monotonic() - start))]
    page = "\n\n".join(blocks) + "\n"
    write_html(page, folder / HTML)
    with atomic_file(folder / JSON) as partial:
        partial.write_text(json.dumps(_facts(inputs), indent=2) + "\n")
    with atomic_file(folder / REPORT) as partial:
        partial.write_text(page)
    return folder / REPORT


def report_is_current(folder: Path) -> bool:
    """Whether the report is newer than the last line of the log."""
    report, log = folder / REPORT, folder / "log.jsonl"
    # In nanoseconds, because a short run may end in the same second in which its report is written.
    return report.exists() and (not log.exists() or report.stat().st_mtime_ns >= log.stat().st_mtime_ns)


def _facts(inputs: ReportInputs) -> dict[str, Json]:
    """The content of report.json: what was trained, what was measured, the versions, and the commands."""
    return {
        "recipe": inputs.plan.recipe.name,
        "weights_sha256": inputs.generator.weights_sha256,
        "teacher_sha256": inputs.teacher.weights_sha256,
        "parameters": inputs.parameters,
        "versions": {"uni_instruct": __version__, "torch": torch.__version__},
        "time_s": {stage: dict(spent) for stage, spent in inputs.times.items()},
        **inputs.facts,
        "commands": command_words(inputs),
    }


def _section_or_error(section: Section, inputs: ReportInputs, title: str) -> list[str]:
    try:
        return section(inputs)
    except Exception as error:  # drawing and scoring may raise anything; a report without one section is better than none
        _log.warning("section '%s' of the report could not be made: %s: %s", title, type(error).__name__, error)
        return [f"This section could not be made: {text(str(error) or type(error).__name__)}"]
