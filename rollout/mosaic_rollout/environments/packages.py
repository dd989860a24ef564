"""The benchmark packages that environments stand on: installed by name, in the one version that is known."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from mosaic_rollout.errors import UserError


class EnvironmentMissing(UserError):
    """A benchmark's package is not installed, or not in the version its adapter was written for."""


def require_package(name: str, known_version: str, install_hint: str) -> None:
    """Raise EnvironmentMissing unless the package is installed in exactly `known_version`.

    install_hint: what the user runs to have it, in the imperative.
    """
    try:
        installed = version(name)
    except PackageNotFoundError:
        raise EnvironmentMissing(f"the package {name} is not installed; {install_hint}") from None
    if installed != known_version:
        raise EnvironmentMissing(
            f"{name} {installed} is installed, but its insides are used and only {known_version} is known to "
            f"fit; {install_hint}"
        )
