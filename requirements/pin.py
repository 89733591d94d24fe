"""Prints a pin for everything that uni-instruct[all,test] needs, as installed here: `make pins` writes it to all.txt."""

from importlib.metadata import distribution

from packaging.requirements import Requirement

BUILD = ("setuptools", "wheel")  # the editable install is built with what is pinned


def main() -> None:
    """Follows the extras that the pinned set is for."""
    names: set[str] = set(BUILD)
    for requirement in distribution("uni-instruct").requires or []:
        follow(Requirement(requirement), {"train", "export", "serve", "evaluate", "benchmark", "tensorrt-rtx", "test"}, names)
    for name in sorted(names, key=str.lower):
        # A local version, such as +cpu, names one index's build; the pin admits any build of that version.
        print(f"{name}=={distribution(name).version.partition('+')[0]}")


def follow(requirement: Requirement, extras: set[str], names: set[str]) -> None:
    """Adds the requirement, if it applies here, and all that it requires."""
    wanted = extras or {""}
    if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in wanted):
        return
    found = distribution(requirement.name)
    key = found.metadata["Name"]
    if key == "uni-instruct" or (key in names and not requirement.extras):
        return
    names.add(key)
    for nested in found.requires or []:
        follow(Requirement(nested), set(requirement.extras), names)


if __name__ == "__main__":
    main()
