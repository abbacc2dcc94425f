"""What brings a package that only a part of fdpp needs."""


def install(extra: str) -> str:
    """The command that installs an extra, for the end of a message."""
    return f"pip install 'fdpp[{extra}]' where fdpp is installed, pip install '.[{extra}]' in its checkout"
