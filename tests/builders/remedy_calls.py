# ruff: noqa: E501
"""Wrong calls of the command line, and how the remedy of each is followed: what it says, and nothing that it does not."""

import re
import shlex
from collections.abc import Callable
from typing import NamedTuple

from builders.remedies import example, first_choice, with_value, without

Arguments = list[str]
Follow = Callable[[str, Arguments], Arguments]


class Call(NamedTuple):
    """Where its message is made (file and beginning), the words of a wrong call, and those of one that follows the remedy.

    Words in braces are the test's bundles and places.
    """

    path: str
    message: str
    words: str
    follow: Follow


def left_out(option: str, values: int = 1) -> Follow:
    """The remedy says to leave something out; where it names the option, it must be this one."""

    def follow(remedy: str, arguments: Arguments) -> Arguments:
        named = re.findall(r"--[\w-]+", remedy)
        assert "leave" in remedy
        assert option in named or not named or "use" in remedy, remedy
        return without(arguments, option, values)

    return follow


def both_left_out(*options: str) -> Follow:
    def follow(remedy: str, arguments: Arguments) -> Arguments:
        for option in re.findall(r"--[\w-]+", remedy):
            assert option in options
            arguments = without(arguments, option, 1) if option in arguments else arguments
        return arguments

    return follow


def chosen(option: str) -> Follow:
    return lambda remedy, arguments: with_value(arguments, option, first_choice(remedy))


def such_as(option: str, folder: str = "{tmp}/") -> Follow:
    return lambda remedy, arguments: with_value(arguments, option, folder + example(remedy))


def spelled(option: str, pattern: str) -> Follow:
    """The value that the pattern finds in the remedy."""

    def follow(remedy: str, arguments: Arguments) -> Arguments:
        found = re.search(pattern, remedy)
        assert found, remedy
        return with_value(arguments, option, found[1])

    return follow


def value(option: str, wanted: str, said: str) -> Follow:
    """A value that the remedy describes in words."""

    def follow(remedy: str, arguments: Arguments) -> Arguments:
        assert said in remedy, remedy
        return with_value(arguments, option, wanted)

    return follow


def instead(word: str, pattern: str) -> Follow:
    """What the pattern finds, in place of an argument."""

    def follow(remedy: str, arguments: Arguments) -> Arguments:
        found = re.search(pattern, remedy)
        assert found, remedy
        return [found[1] if argument == word else argument for argument in arguments]

    return follow


def command(remedy: str, arguments: Arguments) -> Arguments:
    """The command that the remedy is, or that it quotes."""
    found = re.search(r"uni-instruct (.*?)(?: prints| lists|$)", remedy)
    assert found, remedy
    return shlex.split(found[1])


def found_option(remedy: str) -> str:
    """'leave --steps out' -> '--steps'."""
    found = re.search(r"leave (--[\w-]+) out", remedy)
    assert found, remedy
    return found[1]


def written_by_evaluate(remedy: str, arguments: Arguments) -> Arguments:
    """The first result is one that 'evaluate --json' wrote before, of other weights than the second."""
    assert re.match(r"write one: uni-instruct evaluate .*--json > FILE", remedy), remedy
    return [arguments[0], "{other}", *arguments[2:]]


# Of a benchmark and of scores, what takes least.
BRIEFLY = "--rounds 1 --seconds 0.001 --engine torch"
SCORED = "--reference digits --metrics fd"
COMPARE, BENCHMARK, EVALUATE, SHARDS = (
    "uni_instruct/commands/compare.py",
    "uni_instruct/commands/benchmark.py",
    "uni_instruct/commands/evaluate.py",
    "uni_instruct/sampling/shards.py",
)
GENERATE, IMPORT = (
    "uni_instruct/commands/generate.py",
    "uni_instruct/commands/import_checkpoint.py",
)
NOISE, FORMS, SPEC, IMAGES = (
    "uni_instruct/noise.py",
    "uni_instruct/sampling/forms.py",
    "uni_instruct/spec.py",
    "uni_instruct/generate.py",
)
CALLS = [
    Call(GENERATE, "--class and --by-class", "generate {tiny} --seeds 0-9 --by-class --class 1 --out {out}",
         left_out("--by-class", 0)),
    Call(GENERATE, "--classes draws", "generate {tiny} --seeds 0-9 --classes uniform --class 1 --out {out}",
         left_out("--class")),
    Call(GENERATE, "generator '{}' has no classes", "generate {plain} --seeds 0-9 --classes data --out {out}",
         left_out("--classes")),
    Call(GENERATE, "generator '{}' does not say how many", "generate {tiny} --seeds 0-9 --classes data --out {out}",
         spelled("--classes", r"use --classes (\w+)")),
    Call(GENERATE, "--grid {} is not the name", "generate {tiny} --seeds 0-3 --grid {tmp}/a.jpg", such_as("--grid")),
    Call(GENERATE, "--grid without --out holds", "generate {tiny} --seeds 0-1024 --grid {tmp}/a.png",
         value("--out", "{tmp}/x.npz", "give --out")),
    Call(IMAGES, "generator '{}' has no classes", "generate {plain} --seeds 0 --by-class --out {out}",
         left_out("--by-class", 0)),
    Call(IMAGES, "generator '{}' has no classes", "generate {plain} --seeds 0 --class 1 --out {out}", left_out("--class")),
    Call(IMAGES, "{} classes were given for {} seeds", "generate {tiny} --seeds 0-3 --class 1 --class 2 --out {out}",
         lambda remedy, arguments: without(arguments, "--class", 1) if "give one class" in remedy else arguments),
    Call(IMAGES, "{} seeds cannot be divided equally", "generate {tiny} --seeds 0-3 --by-class --out {out}",
         lambda remedy, arguments: with_value(arguments, "--seeds", f"0-{int(remedy.split()[1]) - 1}")),
    Call(SPEC, "class {} is {}", "generate {tiny} --seeds 0 --class 12 --out {out}",
         value("--class", "9", "'uni-instruct inspect' lists the classes")),
    Call(SPEC, "no class is named {}", "generate {numbers} --seeds 0 --class 0 --out {out}",
         spelled("--class", r"give a name, such as (\w+) for")),
    Call(SPEC, "{} classes are named", "generate {twins} --seeds 0 --class ape --out {out}",
         spelled("--class", r"give an id: (\d+)")),
    Call(NOISE, "seeds '{}' cannot be read", "generate {tiny} --seeds 1..3 --out {out}",
         spelled("--seeds", r"write them as \d+, (\S+) or")),
    Call(NOISE, "seed range {} is empty", "generate {tiny} --seeds 5-3 --out {out}",
         value("--seeds", "3-5", "put the smaller seed first")),
    Call(NOISE, "seeds '{}' are more than", "generate {tiny} --seeds 0-99999999999 --out {out}",
         value("--seeds", "0-3", "give fewer seeds")),
    Call(NOISE, "seed {} is not an integer", "generate {tiny} --seeds 9223372036854775808 --out {out}",
         spelled("--seeds", r"to (\d+)")),
    Call(FORMS, "--out {} has the unsupported suffix {}", "generate {tiny} --seeds 0-3 --out {tmp}/x.png",
         lambda remedy, arguments: with_value(arguments, "--out", "{tmp}/x" + re.findall(r"\.\w+", remedy)[-1])),
    Call(FORMS, "generator '{}' makes a VAE's latents", "generate {latents} --seeds 0-3 --out {out}",
         lambda remedy, arguments: with_value(arguments, "--out", "{tmp}/x" + re.findall(r"\.\w+", remedy)[0])),
    Call(FORMS, "{} seeds are repeated", "generate {tiny} --seeds 1,1 --out {out}",
         lambda remedy, arguments: with_value(arguments, "--out", "{tmp}/x" + re.findall(r"\.\w+", remedy)[-1])),
    Call("uni_instruct/sampling/run.py", "(is_finished)", "generate {tiny} --seeds 0-3 --out {filled}",
         value("--out", "{out}", "choose another --out")),
    Call("uni_instruct/sampling/run.py", "{} holds an unfinished run", "generate {tiny} --seeds 0-3 --out {begun}",
         value("--out", "{out}", "choose another --out")),
    Call("uni_instruct/system/files.py", "cannot write {}: no folder", "generate {tiny} --seeds 0 --out /proc/x/y",
         value("--out", "{out}", "write elsewhere")),
    Call("uni_instruct/system/files.py", "{} is not a {}, so it is not", "import {weights} --out {bento}", value("--out", "{out}", "write elsewhere")),
    Call("uni_instruct/system/files.py", "--out {} ends in {}, and", "import {weights} --out {tmp}/x.pkl", such_as("--out")),
    Call("uni_instruct/bundle.py", "{} holds something that is not", "import {weights} --out {filled}",
         value("--out", "{out}", "name another folder")),
    Call("uni_instruct/checkpoints/import_bundle.py", "{} holds a bundle that was not imported", "import {weights} --out {copy}",
         value("--out", "{out}", "name another folder")),
    Call("uni_instruct/system/files.py", "{} cannot be used: {}", f"inspect {'a' * 300}",
         lambda remedy, arguments: [word.replace("a" * 300, "digits") for word in arguments if remedy == "give a shorter name"]),
    Call("uni_instruct/bundle.py", "{} is the folder of a training", "generate {run} --seeds 0 --out {out}",
         instead("{run}", r"give (\S+)")),
    Call("train/recipe.py", "{} is the folder of a training", "train {run} --dry-run", instead("{run}", r"give its recipe: (\S+)")),
    Call("uni_instruct/bundle.py", "(find_bundle)", "generate {tmp}/nothing --seeds 0 --out {out}",
         instead("{tmp}/nothing", r"shipped generator: (\w+)")),
    Call("uni_instruct/engine.py", "bundle {} has no {} engine", "generate {copy} --seeds 0 --engine onnx --out {out}", command),
    Call("uni_instruct/engine.py", "engine '{}' is unknown", "generate {tiny} --seeds 0 --engine jax-fp32 --out {out}",
         lambda remedy, arguments: with_value(arguments, "--engine", remedy.split(", ")[-1])),
    Call("uni_instruct/data/sources.py", "there is no data set", "data prepare {tmp}/nothing --out {tmp}/x.zip",
         lambda remedy, arguments: [first_choice(remedy) if word == "{tmp}/nothing" else word for word in arguments]),
    Call("uni_instruct/commands/data.py", "--out {} is not the name", "data prepare digits --out {tmp}/x.tar", such_as("--out")),
    Call("uni_instruct/commands/inspect.py", "there is no bundle, data set", "inspect {tmp}/nothing",
         instead("{tmp}/nothing", r"a data set \((\w+)")),
    Call(IMPORT, "{} is a bundle already", "import {tiny} --out {out}",
         lambda remedy, arguments: [
             "{weights}" if "a checkpoint's file" in remedy and word == "{tiny}" else word for word in arguments
         ]),
    Call("uni_instruct/checkpoints/import_bundle.py", "the file holds no network", "import {weights} --network ema --out {out}",
         chosen("--network")),
    Call("uni_instruct/networks/build.py", "network.patch is {}", "import {weights} --patch 3 --out {out}", chosen("--patch")),
    Call("export/targets.py", "{} engines have no precision", "export {copy} --to onnx --precision int8", chosen("--precision")),
    Call("serve/packaging/bento.py", "--out {} does not end in .bento", "package digits --out {tmp}/x.tar", such_as("--out")),
    Call("serve/packaging/bento.py", "--out {} exists already", "package digits --out {bento}",
         value("--out", "{tmp}/x.bento", "choose another --out")),
    Call("serve/packaging/bento.py", "{} has no engine that runs without torch", "package {copy} --out {tmp}/x.bento", command),
    Call("serve/packaging/bento.py", "{} has no engine {} that runs in a Bento", "package digits --engine onnx-int8 --out {tmp}/x.bento",
         chosen("--engine")),
    Call("train/recipe.py", "recipe '{}' is unknown", "train nothing --dry-run",
         instead("nothing", r" (digits),")),
    Call("train/recipe.py", "--set {} has no value", "train digits --dry-run --set seed",
         lambda remedy, arguments: with_value(arguments, "--set", example(f"such as {remedy}").replace("write", "seed=1"))),
    Call("train/recipe.py", "--set key '{}' is ambiguous", "train digits --dry-run --set batch=8",
         lambda remedy, arguments: with_value(arguments, "--set", f"{remedy.split()[1]}=8")),
    Call(GENERATE, "--workers, --ray and --shard", "generate {tiny} --seeds 0-3 --workers 1 --grid {tmp}/g.png", value("--out", "{out}", "give --out")),
    Call(GENERATE, "--grid cannot be combined with --shard", "generate {tiny} --seeds 0-3 --shard 1/2 --out {out} --grid {tmp}/g.png", left_out("--grid")),
    Call(SHARDS, "--shard {} cannot be read", "generate {tiny} --seeds 0-3 --shard 3of16 --out {out}", spelled("--shard", r"it as (\S+)")),
    Call(SHARDS, "--shard {} is out of range", "generate {tiny} --seeds 0-3 --shard 5/4 --out {out}", spelled("--shard", r"to (\S+)")),
    Call("uni_instruct/engines/hardware/device.py", "device '{}' is unknown", "generate {tiny} --seeds 0 --device gpu --out {out}",
         spelled("--device", r"use (\w+)")),
    # One of two messages, as the machine has a GPU or none.
    Call("uni_instruct/engines/hardware/device.py", "device {} was asked for, and", "generate {tiny} --seeds 0 --device cuda:99 --out {out}",
         lambda remedy, arguments: with_value(arguments, "--device", "cpu" if "--device cpu" in remedy else "cuda:0")),
    Call(COMPARE, "there is no result or bundle", "compare {tmp}/none.json {result}", written_by_evaluate),
    Call(COMPARE, "{} is not a result", "compare {weights} {result}", written_by_evaluate),
    Call(COMPARE, "{} has no {}", "compare {result} {other} --metric beauty",
         lambda remedy, arguments: with_value(arguments, "--metric", first_choice(remedy))),
    Call(COMPARE, "{} has {} {}, which cannot", "compare {endless} {other} --metric fd",
         lambda remedy, arguments: with_value(arguments, "--metric", "pr") if "choose another --metric" in remedy else arguments),
    Call(COMPARE, "{} contains the same weights twice", "compare {result},{result} {other}",
         lambda remedy, arguments: [word.partition(",")[0] if "each training once" in remedy else word for word in arguments]),
    Call(COMPARE, "bundles are scored against", "compare {tiny} {copy} --samples 40", value("--reference", "digits", "give --reference DATA")),
    Call(COMPARE, "--{} applies to bundles", "compare {result} {other} --sets 3", left_out("--sets")),
    Call(COMPARE, "{} and {} differ in", "compare {result} {uniform}",
         lambda remedy, arguments: ["{other}" if word == "{uniform}" and "the same --classes" in remedy else word for word in arguments]),
    Call(BENCHMARK, "batches '{}' are not sizes", f"benchmark {{tiny}} --batches one {BRIEFLY}", spelled("--batches", r"them as (\S+)")),
    Call(BENCHMARK, "{} batch sizes", f"benchmark {{tiny}} --batches {','.join(map(str, range(1, 18)))} {BRIEFLY}",
         lambda remedy, arguments: with_value(arguments, "--batches", ",".join(map(str, range(1, 1 + int(re.findall(r"\d+", remedy)[0])))))),
    Call("uni_instruct/commands/benchmark_report.py", "--plot {} is not", f"benchmark {{tiny}} --batches 1 {BRIEFLY} --plot {{tmp}}/x.txt", such_as("--plot")),
    Call("uni_instruct/engines/benchmark/comparison.py", "'{}' is a teacher of {} steps", f"benchmark {{teacher}} --batches 1 {BRIEFLY}",
         lambda remedy, arguments: [example(remedy) if word == "{teacher}" else word for word in arguments]),
    Call("export/commands/export.py", "--sm applies only to", "export {copy} --to onnx --precision fp32 --sm 89", left_out("--sm")),
    Call("export/targets.py", "{} is a teacher of", "export {teacher} --to onnx --precision fp32",
         lambda remedy, arguments: ["{copy}" if word == "{teacher}" and "distilled from it" in remedy else word for word in arguments]),
    Call(EVALUATE, "--seeds already says", f"evaluate {{tiny}} {SCORED} --seeds 0-63 --samples 64", both_left_out("--seed", "--samples")),
    Call(EVALUATE, "{} seeds cannot be divided", f"evaluate {{tiny}} {SCORED} --seeds 0-64 --sets 2", value("--seeds", "0-63", "a multiple of --sets")),
    Call(EVALUATE, "a seed is repeated", f"evaluate {{tiny}} {SCORED} --seeds 0-31,0-31 --sets 2", value("--seeds", "0-63", "each seed once")),
    Call(EVALUATE, "--save-statistics {} is not", f"evaluate {{tiny}} {SCORED} --seeds 0-63 --save-statistics {{tmp}}/x.txt", such_as("--save-statistics")),
    Call("uni_instruct/bundle.py", "(with_steps)", f"evaluate {{tiny}} {SCORED} --seeds 0-63 --steps 3", left_out("--steps")),
    Call(EVALUATE, "--extractor-weights does not apply", f"evaluate {{tiny}} {SCORED} --seeds 0-63 --extractor-weights {{tmp}}/x.pt", left_out("--extractor-weights")),
    Call(EVALUATE, "there is no bundle and there are no images", f"evaluate {{tmp}}/nothing {SCORED}",
         lambda remedy, arguments: ["{unlabelled}" if word == "{tmp}/nothing" and "zip or npz of images" in remedy else word for word in arguments]),
    Call(EVALUATE, "{} applies to bundles", f"evaluate {{unlabelled}} {SCORED} --seeds 0-63", left_out("--seeds")),
    Call("uni_instruct/evaluate/scores.py", "metric '{}' cannot", "evaluate {tiny} --reference digits --seeds 0-63 --metrics fd,is",
         value("--metrics", "fd", "leave it out")),
    Call("uni_instruct/evaluate/class_draw.py", "generator '{}' has no classes", f"evaluate {{plain}} {SCORED} --seeds 0-63 --classes uniform", left_out("--classes")),
    Call("train/commands/average.py", "{} exists already", "average {run} --std 0.05 --out {filled}", value("--out", "{out}", "another folder as --out")),
    Call("train/commands/train.py", "--status takes no --out", "train {tiny} --status --out {begun_run}", command),
    Call("train/commands/train.py", "--status can only be combined", "train {begun_run} --status --dry-run", command),
    Call("uni_instruct/commands/import_checkpoint.py", "{} applies to checkpoints", "import {latents} --decoder {vae} --steps 3 --out {out}",
         lambda remedy, arguments: without(arguments, found_option(remedy), 1)),
    Call("uni_instruct/engine.py", "bundle {} has no {} engine", "generate {teacher} --seeds 0 --engine onnx --out {out}", chosen("--engine")),
    Call("export/commands/export.py", "--sm '{}' cannot be read", "export {copy} --to tensorrt-rtx --sm hopper", spelled("--sm", r"it as (\d+)")),
    Call("serve/packaging/bento.py", "{} is a teacher of", "package {teacher} --out {tmp}/x.bento",
         lambda remedy, arguments: ["digits" if word == "{teacher}" and "the generator that 'train' distilled" in remedy else word for word in arguments]),
]  # fmt: skip
