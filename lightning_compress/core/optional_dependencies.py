"""Ask for optional packages where they are used, in words that say how to get them."""

from importlib import import_module


def need(*packages: str, extra: str = "export") -> None:
    """Import these packages.

    Raises:
        ModuleNotFoundError: if one is missing; the message says what to install.
    """
    for package in packages:
        try:
            import_module(package)
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"This needs {package}, which cannot be imported ({error}): pip install 'lightning-compress[{extra}]'",
                name=package,
            ) from error
