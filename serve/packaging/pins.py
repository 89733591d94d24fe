"""Exact versions of what an extra of this package needs, taken from what is installed here."""

from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement

from uni_instruct.errors import MissingExtraError

OWN = "uni-instruct"


def pins(extra: str) -> list[str]:
    """'name==version' of all that this package with that extra needs on a system like this, itself left out, by name.

    Raises MissingExtraError where something of it is not installed.
    """
    return [pin(name) for name in sorted(needed({extra}), key=str.lower)]


def pin(name: str) -> str:
    """'name==version' as installed here."""
    # A local version, such as +cpu, names one index's build; the pin admits any build of that version.
    return f"{name}=={_installed(name, '').version.partition('+')[0]}"


def needed(extras: set[str]) -> set[str]:
    """Names of all that this package with those extras needs, itself left out. Raises MissingExtraError as `pins` does."""
    names: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    first = (sorted(extras) or [""])[0]
    for requirement in distribution(OWN).requires or []:
        _follow(Requirement(requirement), extras, names, seen, first)
    return names


def _follow(
    requirement: Requirement, extras: set[str], names: set[str], seen: set[tuple[str, frozenset[str]]], blamed: str
) -> None:
    """Adds the requirement of something with these extras, if it applies here, and all that it requires itself."""
    if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras or {""}):
        return
    found = _installed(requirement.name, blamed)
    key = str(found.metadata["Name"])
    step = key, frozenset(requirement.extras)
    if key == OWN or step in seen:
        return
    seen.add(step)
    names.add(key)
    for nested in found.requires or []:
        _follow(Requirement(nested), set(requirement.extras), names, seen, blamed)


def _installed(name: str, extra: str) -> Distribution:
    try:
        return distribution(name)
    except PackageNotFoundError as error:
        raise MissingExtraError(name, extra=extra) from error
