"""``settings.json`` of a folder that several starts of a program fill, with the same settings."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

NAME = "settings.json"


def check_settings(
    folder: Path, settings: Mapping[str, Any], *, holds: str, unrelated: Collection[str]
) -> None:
    """Make sure that a folder is empty, or was begun with the same settings.

    Args:
        folder: it need not be there.
        settings: of this start.
        holds: what such a folder holds.
        unrelated: names of settings that may differ.

    Raises:
        FileExistsError: it holds something else, or of other settings. Every difference is named.
    """
    path = folder / NAME
    if not path.is_file():
        if folder.exists() and any(folder.iterdir()):
            raise FileExistsError(
                f"{folder} is not empty, and no folder of {holds} (it has no {NAME}); give a new "
                f"folder"
            )
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FileExistsError(
            f"{path} is not whole ({error}); give a new folder, or delete {folder}"
        ) from error
    differ = [
        f"  {name}: {before.get(name)} -> {settings.get(name)}"
        for name in {**before, **settings}
        if name not in unrelated and before.get(name) != settings.get(name)
    ]
    if differ:
        raise FileExistsError(
            f"{folder} holds {holds} of other settings:\n" + "\n".join(differ) + "\n"
            "Give a new folder, or the settings of before to go on in this one"
        )
