"""A folder of transcoded data: its state, its remaining work, and its manifest.

It holds
    manifest.csv        path, label and properties of each file: train on this
    failed.csv          files that failed, and the reasons
    settings.json       the settings: a folder never mixes two
    journal.jsonl       what is done, a line each; a second start goes on from there
and, by the chosen format,
    videos/NAME.mp4     or for an image images/NAME.jpg
    frames/NAME/        a folder of 000000.jpg, 000001.jpg ...
    shard-000000.tar    and so on; the samples lie in the order of the manifest
Each output is complete or absent.
"""

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from typing_extensions import Self

from hpm_video.data.manifest import Listing, Manifest
from hpm_video.decoding.locations import TarMember, is_frame_folder
from hpm_video.decoding.video_stream import SIMPLEST
from hpm_video.files.failures import Failure
from hpm_video.preparation.check import stamp_of
from hpm_video.preparation.findings import COLUMNS as CHECK_COLUMNS
from hpm_video.preparation.jobs import Journal, claim, remove, write_failures, write_table
from hpm_video.preparation.shards import Sample, Shard, output_names, suffix_of
from hpm_video.preparation.transcode import Job, Output, Recipe

COLUMNS = (
    "path",
    "label",
    "label_name",
    "num_frames",
    "width",
    "height",
    "fps",
    "key_frame_distance",
)
STALE = {*COLUMNS, *CHECK_COLUMNS}
"""Columns of the source's manifest that do not hold for outputs."""
UNRELATED = ("hpm_video",)
"""Settings that may differ between the starts of one folder."""
TRIAL_SECONDS = 20.0
"""Seconds of each file in an estimate."""
HEADERS = 3 * 1024
"""Estimate of the bytes that a tar adds to a sample."""


@dataclass(frozen=True)
class Rows:
    """Rows of a manifest."""

    manifest: Manifest
    others: Mapping[str, Sequence[str]]
    """Its further columns, which hold for outputs as well."""
    rates: Sequence[str] = ()
    """Frame rates as the manifest has them; empty where it does not."""

    @classmethod
    def of(cls, manifest: Manifest, listing: Listing) -> "Rows":
        """Make rows of a manifest and the listing that it was read from."""
        kept = [row for row, verdict in enumerate(listing.column("verdict")) if verdict != "bad"]
        cells = {name: listing.column(name) for name in (*listing.table.columns, "fps")}
        cells = {name: [column[row] for row in kept] for name, column in cells.items()}
        others = {name: column for name, column in cells.items() if name not in STALE}
        return cls(manifest, others, cells["fps"])

    def label(self, row: int) -> tuple[int, str]:
        """Return label and class name of a row; -1 and an empty name if it has none."""
        names, label = self.manifest.label_names or (), self.manifest.labels[row]
        return label, names[label] if 0 <= label < len(names) else ""


class PreparedFolder:
    """A folder of outputs, and what its journal says of them."""

    def __init__(self, path: Path, recipe: Recipe, rows: Rows, base: Path) -> None:
        """``base``: outputs are named by the paths of their sources below it."""
        self.path = path.absolute()
        self.recipe = recipe
        self.rows = rows
        self.outputs: dict[str, Output] = {}
        """Outputs by place."""
        self.failures: dict[str, Failure] = {}
        """Failures by place."""
        self.changed = 0
        """Number of files whose source or label has changed since they were done."""
        self._base = str(base)
        self._names = output_names(
            rows.manifest.files,
            self._base,
            dots=recipe.form != "shards",
            nests=recipe.form != "frames",
        )
        self._of_name = {name: place for place, name in self._names.items()}
        self._row = {place: row for row, place in reversed([*enumerate(rows.manifest.files)])}
        self._shards: dict[str, dict[str, Any]] = {}
        """Existing shards as the journal has them. Some content of an outdated one has changed: the
        rest is packed anew, and then the shard is deleted."""
        self._packed: dict[str, TarMember] = {}
        """Member of each place, in a shard of this folder that may be outdated."""
        self._journal: Journal | None = None
        self._unfinished = self.path / ".unfinished"
        self._parts = self.path / ".parts"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Release the folder."""
        if self._journal is not None:
            with contextlib.suppress(OSError):  # it is empty, unless this run was stopped
                self._unfinished.rmdir()
            self._journal.close()

    # --- What is there -----------------------------------------------------------------------

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Claim the folder for these settings, and find out what is done.

        Raises:
            FileExistsError: it holds something else.
            BlockingIOError: another program writes to it.
        """
        self._journal = claim(self.path, settings, holds="prepared data", unrelated=UNRELATED)
        remove(str(self._unfinished))
        self._unfinished.mkdir()
        for record in self._journal.read():
            if shard := Path(record.get("shard", "")).name:
                path = self.path / shard
                if path.is_file() and path.stat().st_size == record["bytes"]:
                    self._shards[shard] = record
            elif record.get("name") and self._names.get(record["place"]) == record["name"]:
                known = {
                    each.name: record[each.name] for each in fields(Output) if each.name in record
                }
                self.outputs[record["place"]] = Output(**known)
        for name, record in self._shards.items():
            for place, *where in record["members"]:
                if place in self._names:
                    self._packed[place] = TarMember(name, *where)
        self._drop_what_changed()

    def _drop_what_changed(self) -> None:
        """Forget outputs whose source, label or file has changed."""
        changed = {place for place in self.outputs if self._has_changed(place)}
        relabelled = {
            place
            for name, record in self._shards.items()
            for (place, *_), label in zip(record["members"], record.get("labels", ()), strict=False)
            if self._shard_of(place) == name and (*label,) != self.rows.label(self._row[place])
        }
        self.changed = len(changed | relabelled)
        self.outputs = {place: made for place, made in self.outputs.items() if place not in changed}
        for name, record in [*self._shards.items()]:
            known = [member for member in record["members"] if member[0] in self._names]
            good = [m for m in known if m[0] in self.outputs and self._shard_of(m[0]) == name]
            is_new = {member[0] for member in known}.isdisjoint(relabelled)
            if len(good) < len(known) or not is_new or record.get("outdated"):
                # Its valid members are packed anew.
                outdated = {"shard": name, "bytes": record["bytes"], "members": good}
                outdated["outdated"] = True
                if outdated != record:
                    self._note(outdated)
                    self._shards[name] = outdated
        self._packed = {p: where for p, where in self._packed.items() if p in self.outputs}
        self.outputs = {
            place: made for place, made in self.outputs.items() if self._is_there(place)
        }

    def _has_changed(self, place: str) -> bool:
        """Whether a source has changed. A missing one may have been deleted on purpose."""
        made = self.outputs[place]
        try:
            stamp = stamp_of(place)
        except OSError:
            return False
        noted = made.source_modified or stamp.modified  # older journals lack it
        return (made.source_bytes, noted) != (stamp.bytes, stamp.modified)

    def _is_there(self, place: str) -> bool:
        """Whether the output of a place, which has been checked once, is still there.

        Frames of a folder are only counted: there may be many millions.
        """
        if place in self._packed:
            return True
        try:
            if not self.recipe.copy and is_frame_folder(self._output(place)):
                with os.scandir(self._output(place)) as entries:
                    frames = sum(entry.name.endswith(".jpg") for entry in entries)
                return frames == self.outputs[place].num_frames
            now = stamp_of(place if self.recipe.copy else self._output(place))
        except OSError:
            return False
        return now.bytes == self.outputs[place].bytes

    def missing(self) -> list[str]:
        """Return the places without an output, each once, in the order of the manifest."""
        for place, name in self._names.items():
            if name is None:
                self.fail(place, "its name holds control characters; rename the file")
            elif self.recipe.copy and is_frame_folder(place):
                self.fail(place, "a folder of frames cannot be packed as it is; leave out --copy")
        return [p for p in self._names if p not in self.outputs and p not in self.failures]

    def __len__(self) -> int:
        """Number of files that are done, of which some may still have to be packed."""
        return len(self.outputs)

    @property
    def num_places(self) -> int:
        """Number of different files in the manifest."""
        return len(self._names)

    # --- Work --------------------------------------------------------------------------------

    def job(self, place: str, trial: Path | None = None) -> Job:
        """Make the job of a place; as a ``trial``, for its first seconds in that folder."""
        name = f"{self._row[place]}{self.recipe.suffix(place)}"
        stated = self._stated(place)
        if trial is not None:
            temporary, target = f"{trial}/temporary-{name}", f"{trial}/{name}"
            return Job(place, temporary, target, **stated, cut=TRIAL_SECONDS)
        return Job(place, f"{self._unfinished}/{name}", self._output(place), **stated)

    def note(self, place: str, output: Output) -> None:
        """Record an output."""
        self.outputs[place] = output
        self._note({"place": place, "name": self._names[place], **asdict(output)})

    def fail(self, place: str, reason: str) -> None:
        """Record a failure."""
        self.failures[place] = Failure(place, reason)

    def unpacked_shards(self) -> list[Shard]:
        """Return the shards that are still to be written, each as full as allowed."""
        shards: list[list[Sample]] = []
        room = 0
        for place in self._names:
            if place not in self.outputs or self._is_packed(place):
                continue
            size = self.outputs[place].bytes + HEADERS
            if not shards or size > room:
                shards.append([])
                room = self.recipe.shard_bytes
            shards[-1].append(self._packable(place))
            room -= size
        first = max((int(name[6:12]) + 1 for name in self._shards), default=0)
        names = [f"shard-{first + i:06d}.tar" for i in range(len(shards))]
        return [
            Shard(f"{self._unfinished}/{name}", f"{self.path}/{name}", tuple(samples))
            for name, samples in zip(names, shards, strict=True)
        ]

    def note_shard(self, shard: Shard, members: Sequence[TarMember]) -> None:
        """Record a shard, and delete the files that it was made of."""
        name = Path(shard.target).name
        places = [self._of_name[sample.key] for sample in shard.samples]
        packed = dict(zip(places, members, strict=True))
        self._packed |= packed
        self._shards[name] = {
            "shard": name,
            "bytes": Path(shard.target).stat().st_size,
            "members": [[place, it.name, it.offset, it.size] for place, it in packed.items()],
            "labels": [self.rows.label(self._row[place]) for place in places],
        }
        self._note(self._shards[name])
        if not self.recipe.copy:
            for place in places:
                remove(self._output(place))

    def write_lists(self) -> None:
        """Write ``manifest.csv`` in the order of the source, and ``failed.csv``."""
        there = [row for row, place in enumerate(self.rows.manifest.files) if self._place_of(place)]
        header = [*COLUMNS, *self.rows.others]
        write_table(self.path / "manifest.csv", header, map(self._cells, there))
        write_failures(self.path / "failed.csv", [*self.failures.values()])
        if self._shards and all(map(self._is_packed, self.outputs)):
            remove(str(self._parts))
            for name, record in self._shards.items():
                if record.get("outdated"):
                    remove(str(self.path / name))

    # --- Inside ------------------------------------------------------------------------------

    def _note(self, record: Mapping[str, Any]) -> None:
        assert self._journal is not None, "the folder is claimed before anything is written to it"
        self._journal.append(record)

    def _shard_of(self, place: str) -> str:
        return self._packed[place].tar if place in self._packed else ""

    def _is_packed(self, place: str) -> bool:
        return place in self._packed and not self._shards[self._shard_of(place)].get("outdated")

    def _output(self, place: str) -> str:
        suffix = self.recipe.suffix(place)
        folder = {".jpg": "images", ".mp4": "videos", "/": "frames"}[suffix]
        root = self._parts if self.recipe.form == "shards" else self.path / folder
        return f"{root}/{self._names[place]}{suffix}"

    def _place_of(self, place: str) -> str | None:
        """Return the place of an output relative to the folder, if it is there."""
        if place not in self.outputs:
            return None
        if self.recipe.form != "shards":
            return self._output(place).removeprefix(f"{self.path}/")
        return str(self._packed[place]) if self._is_packed(place) else None

    def _cells(self, row: int) -> list[object]:
        place = self.rows.manifest.files[row]
        (label, name), output = self.rows.label(row), self.outputs[place]
        return [
            self._place_of(place),
            label if label >= 0 else "",
            name,
            output.num_frames,
            output.width,
            output.height,
            f"{output.fps:.4f}".rstrip("0").rstrip(".") if output.fps else "",
            output.key_frame_distance,
            *(column[row] for column in self.rows.others.values()),
        ]

    def _stated(self, place: str) -> dict[str, Any]:
        """Return number and rate of frames of a source, as far as the manifest has them."""
        count = self.rows.manifest.num_frames[self._row[place]]
        stated: dict[str, Any] = {"num_frames": count} if count > 0 else {}
        with contextlib.suppress(ValueError, ZeroDivisionError):
            rate = Fraction(self.rows.rates[self._row[place]] if self.rows.rates else "")
            if 0 < rate < 1000:
                stated["fps"] = rate.limit_denominator(SIMPLEST)
        return stated

    def _packable(self, place: str) -> Sample:
        label, name = self.rows.label(self._row[place])
        info: dict[str, Any] = {
            "num_frames": self.outputs[place].num_frames,
            "source": place.removeprefix(self._base.rstrip("/") + "/"),
        }
        info |= {"label": label} if label >= 0 else {}
        info |= {"label_name": name} if name else {}
        suffix, path = self.recipe.suffix(place), self._output(place)
        if self.recipe.copy:
            suffix, path = suffix_of(place), place
        if place in self._packed:
            member = self._packed[place]
            path = str(replace(member, tar=f"{self.path}/{member.tar}"))
        return Sample(str(self._names[place]), path, suffix, label, info)
