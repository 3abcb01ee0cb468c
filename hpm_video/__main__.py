"""The command ``hpm-video``: each program in tools/ is a subcommand of the same name."""

import re
import sys
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROGRAMS = HERE / "programs" if (HERE / "programs").is_dir() else HERE.parent / "tools"
"""An installed package contains the programs; in the repository they are beside it."""


def describe() -> dict[str, str]:
    """Return the name of each program, as the user types it, and what it does."""
    found = {}
    for path in sorted(PROGRAMS.glob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "\ndef main(" in text:
            about = text.partition("\n")[0].strip('"')
            found[path.stem.replace("_", "-")] = re.sub("[:?]? python .*", "", about)
    return found


def main() -> None:
    """Run a program with the rest of the command line, or list all programs."""
    programs, (name, *rest) = describe(), sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        width = max(map(len, programs))
        rows = [f"  {each:{width}}  {text.rstrip('.')}" for each, text in programs.items()]
        print("\n".join(["usage: hpm-video COMMAND ... (COMMAND --help says more)", "", *rows]))  # noqa: T201
        return
    if name.replace("_", "-") not in programs:
        sys.stderr.write(f"error: there is no command {name}; hpm-video --help lists them\n")
        sys.exit(2)
    sys.argv = [f"hpm-video {name}", *rest]
    sys.path.insert(0, str(PROGRAMS))
    sys.exit(import_module(name.replace("-", "_")).main())


if __name__ == "__main__":
    main()
