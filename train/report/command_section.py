"""The report's section of commands: how to repeat the run, and what to do with its generator."""

import shlex

from uni_instruct.bundle import USUAL_VAE
from uni_instruct.hub import is_on_hub
from uni_instruct.train.report.inputs import ReportInputs

_NEEDS_DECODER = (
    "`export`, `evaluate` and `serve` need a generator of pictures. This one makes latents; attach the VAE's decoder first "
    "(`import` above)."
)


def command_section(inputs: ReportInputs) -> list[str]:
    """The commands as a shell block, to be run in the folder where the run was started."""
    lines = ["```sh"]
    for why, *words in _commands(inputs):
        lines += [f"# {why}", f"uni-instruct {shlex.join(map(str, words))}"]
    lines.append("```")
    # Commands that would fail are left out above. These lines say why.
    if not inputs.makes_pictures:
        lines += ["", _NEEDS_DECODER]
    elif inputs.plan.dataset is None:
        lines += ["", "This run was trained without real images. To evaluate it, give some: `evaluate --reference DATA`."]
    return lines


def command_words(inputs: ReportInputs) -> list[str]:
    """The same commands as strings, for report.json."""
    return [f"uni-instruct {shlex.join(map(str, words))}" for _, *words in _commands(inputs)]


def _commands(inputs: ReportInputs) -> list[tuple[object, ...]]:
    """The commands, each as (explanation, word, word, ...)."""
    folder, generator = inputs.folder, inputs.folder / "generator"
    plan, pictures = inputs.plan, inputs.makes_pictures
    images = ("--out", folder / "images", "--grid", folder / "grid.png") if pictures else ("--out", folder / "latents.npz")
    commands: list[tuple[object, ...]] = [
        ("the same training once more", "train", folder / "recipe.yaml", "--out", f"{folder}-again"),
        ("images of 64 seeds" if pictures else "latents of 64 seeds", "generate", generator, "--seeds", "0-63", *images),
    ]
    if pictures:
        commands.insert(1, ("a faster engine, checked against PyTorch", "export", generator, "--to", "onnx"))
    else:
        attach = ("import", generator, "--decoder", USUAL_VAE, "--out", f"{generator}-pictures")
        commands.append(("the same with its VAE's decoder, which makes pictures", *attach))
    if pictures and plan.dataset is not None:
        reference = ("--reference", plan.recipe.data, "--teacher", _source(inputs))
        commands.append(("scores of as many samples as the data has", "evaluate", generator, *reference))
    if pictures:
        commands.append(("an HTTP service with a web demo", "serve", generator))
    return commands


def _source(inputs: ReportInputs) -> str:
    teacher = inputs.teacher
    return teacher.origin if is_on_hub(teacher.origin) else str(teacher.path)
