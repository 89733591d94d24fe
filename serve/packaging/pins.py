"""Exact versions of the packages that an extra of this package needs, as installed here."""

from importlib.metadata import Distribution, PackageNotFoundError, distribution

from packaging.requirements import Requirement

from uni_instruct.errors import MissingExtraError

OWN = "uni-instruct"


def pins(extra: str) -> list[str]:
    """Return 'name==version', sorted by name, for every package that this package with that extra needs on this system.

    This package itself is left out. Raises MissingExtraError if one of them is not installed.
    """
    return [pin(name) for name in sorted(needed({extra}), key=str.lower)]


def pin(name: str) -> str:
    """Return 'name==version' as installed here, without a local version label. Raises MissingExtraError if not installed."""
    # A local label such as +cpu exists only on one package index. Without it the pin accepts any build of that version.
    return f"{name}=={_installed(name, '').version.partition('+')[0]}"


def needed(extras: set[str]) -> set[str]:
    """Return the names of all packages that this package with those extras needs, including indirect requirements.

    This package itself is left out. Raises MissingExtraError as `pins` does.
    """
    names: set[str] = set()
    seen: set[tuple[str, frozenset[str]]] = set()
    first = (sorted(extras) or [""])[0]
    for requirement in distribution(OWN).requires or []:
        _follow(Requirement(requirement), extras, names, seen, first)
    return names


def _follow(
    requirement: Requirement, extras: set[str], names: set[str], seen: set[tuple[str, frozenset[str]]], extra_to_install: str
) -> None:
    """Add a requirement to `names`, and recursively what it requires, if its marker applies on this system.

    extras: those of the package that has the requirement. extra_to_install: the extra that an error tells the user to install.
    """
    if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras or {""}):
        return
    found = _installed(requirement.name, extra_to_install)
    key = str(found.metadata["Name"])
    step = key, frozenset(requirement.extras)
    if key == OWN or step in seen:
        return
    seen.add(step)
    names.add(key)
    for nested in found.requires or []:
        _follow(Requirement(nested), set(requirement.extras), names, seen, extra_to_install)


def _installed(name: str, extra: str) -> Distribution:
    try:
        return distribution(name)
    except PackageNotFoundError as error:
        raise MissingExtraError(name, extra=extra) from error
