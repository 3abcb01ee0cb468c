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
from contextlib import closing
from dataclasses import asdict, fields, replace
from fractions import Fraction
from itertools import zip_longest
from pathlib import Path
from typing import Any

from hpm_video.data.manifest import read_listing, read_manifest
from hpm_video.decoding.locations import TarMember, is_frame_folder, is_image
from hpm_video.decoding.video_stream import SIMPLEST
from hpm_video.files.failures import Failure
from hpm_video.preparation.findings import COLUMNS as CHECK_COLUMNS
from hpm_video.preparation.findings import Stamp, stamp_of
from hpm_video.preparation.jobs import Journal, claim, remove, run_jobs, write_report, write_table
from hpm_video.preparation.shards import Sample, Shard, output_names, pack_shard, suffix_of
from hpm_video.preparation.transcode import Job, Output, Recipe, Transcoder
from hpm_video.workers.pool import Limits
from hpm_video.workers.progress_bar import ProgressBar

PROPERTIES = ("num_frames", "width", "height", "fps", "key_frame_distance")
COLUMNS = ("path", "label", "label_name", *PROPERTIES)
# Columns of the source's manifest that do not hold for outputs.
STALE = {*COLUMNS, *CHECK_COLUMNS, "kept_every"}
UNRELATED = ("hpm_video",)  # settings that may differ between the starts of one folder
HEADERS = 3 * 1024  # estimate of the bytes that a tar adds to a sample


class PreparedFolder:
    """A folder of outputs, and what its journal says of them."""

    def __init__(self, path: Path, recipe: Recipe, source: Path, root: Path | None) -> None:
        """``source``: a manifest or a folder, whose paths start from ``root``."""
        self.path = path.absolute()
        self.recipe = recipe
        self.outputs: dict[str, Output] = {}  # by place, as are the others
        self.failures: dict[str, Failure] = {}
        manifest, listing = read_manifest(source, root), read_listing(source, root)
        kept = [row for row, verdict in enumerate(listing.column("verdict")) if verdict != "bad"]
        # Of sections the whole file is prepared: they are columns that stay as they are.
        self.manifest = replace(manifest, files=tuple(listing.files[row] for row in kept))
        cells = {n: listing.column(n) for n in (*listing.table.columns, "fps", "verdict")}
        cells = {name: [column[row] for row in kept] for name, column in cells.items()}
        self._rates, self._verdicts = cells["fps"], cells["verdict"]
        # Further columns of the manifest, which hold for outputs as well.
        self._others = {name: column for name, column in cells.items() if name not in STALE}
        if recipe.fps is None and (recipe.keep_every > 1 or manifest.kept_every):
            self._others["kept_every"] = [
                ""
                if is_image(place)
                else str(manifest.kept_every.get(place, 1) * recipe.keep_every)
                for place in manifest.files
            ]
        base = root or (source if source.is_dir() else source.parent)
        self.base = str(base.absolute())
        dots, nests = recipe.form != "shards", recipe.form != "frames"
        self.names = output_names(self.manifest.files, self.base, dots=dots, nests=nests)
        self._row = {place: row for row, place in reversed([*enumerate(self.manifest.files)])}
        self._shards: dict[str, dict[str, Any]] = {}  # existing shards as the journal has them
        # Shards of which some content has changed: the rest is packed anew, and they go.
        self._outdated: set[str] = set()
        self._packed: dict[str, TarMember] = {}  # by place; in a shard that may be outdated
        self._journal: Journal | None = None
        self._unfinished = self.path / ".unfinished"
        self._parts = self.path / ".parts"

    def close(self) -> None:
        """Release the folder."""
        if self._journal is not None:
            with contextlib.suppress(OSError):  # it is empty, unless this run was stopped
                self._unfinished.rmdir()
            self._journal.close()

    def claim(self, settings: Mapping[str, Any]) -> None:
        """Claim the folder for these settings (see :func:`claim`), and find out what is done."""
        self._journal = claim(self.path, settings, holds="prepared data", unrelated=UNRELATED)
        remove(str(self._unfinished))
        self._unfinished.mkdir()
        for record in self._journal.read():
            if shard := Path(record.get("shard", "")).name:
                path = self.path / shard
                if path.is_file() and path.stat().st_size == record["bytes"]:
                    self._shards[shard] = record
                    for place, *where in record["members"]:
                        self._packed[place] = TarMember(shard, *where)
            elif record.get("name") and self.names.get(record["place"]) == record["name"]:
                known = {each.name for each in fields(Output)} & record.keys()
                output = Output(**{name: record[name] for name in known})
                self.outputs[record["place"]] = output
                self._packed.pop(record["place"], None)  # a shard has what it was before
        self.outputs = {p: made for p, made in self.outputs.items() if self._is_done(p, made)}
        self._packed = {p: member for p, member in self._packed.items() if p in self.outputs}
        self._outdated = {name for name in self._shards if not self._is_current(name)}

    def _is_done(self, place: str, made: Output) -> bool:
        """Whether the source of an output has not changed, and the output is still there.

        A missing source may have been deleted on purpose. Frames are only counted: there may be
        millions.
        """
        if stamp_of(place) not in (Stamp(), Stamp(made.source_bytes, made.source_modified)):
            return False
        if place in self._packed:
            return True
        output = place if self.recipe.copy else self._output(place)
        if is_frame_folder(output):
            names = os.listdir(output) if Path(output).is_dir() else []  # noqa: PTH208 - quick
            return sum(name.endswith(".jpg") for name in names) == made.num_frames
        return stamp_of(output).bytes == made.bytes

    def _is_current(self, shard: str) -> bool:
        """Whether what a shard holds of this manifest is unchanged, and labelled as there."""
        record = self._shards[shard]
        return all(
            self._shard_of(place) == shard and label == [*self._label(self._row[place])]
            for (place, *_), label in zip_longest(record["members"], record.get("labels", ()))
            if place in self.names
        )

    def missing(self) -> list[str]:
        """Return the places without an output, each once, in the order of the manifest."""
        return [place for place in self.names if place not in self.outputs]

    def make(self, places: Sequence[str], workers: int, limits: Limits) -> None:
        """Make outputs, and record them. Raises as :func:`run_jobs`."""
        jobs = {place: self.job(place) for place in places}
        with (
            closing(ProgressBar(len(jobs), "files", "frames/s")) as bar,
            closing(run_jobs(Transcoder(self.recipe), jobs, workers, limits)) as results,
        ):
            for place, result in results:
                if isinstance(result, Output):
                    self.note(place, result)
                    bar.advance(result.num_frames)
                else:
                    remove(jobs[place].temporary)
                    self.failures[place] = Failure(place, result.reason)
                    bar.advance(0)

    def pack(self, workers: int, limits: Limits) -> None:
        """Write the shards that are missing, and record them. OSError: one cannot be written."""
        groups = self.unpacked()
        jobs = {name: self.shard(name, places) for name, places in groups.items()}
        # Nothing is decoded, and a large file is copied in one step: it may take longer.
        limits = replace(limits, seconds=10 * limits.seconds)
        with (
            closing(ProgressBar(len(jobs), "shards", "MB/s")) as bar,
            closing(run_jobs(pack_shard, jobs, workers, limits)) as results,
        ):
            for name, result in results:
                if isinstance(result, Failure):
                    remove(jobs[name].temporary)
                    raise OSError(f"{jobs[name].target} cannot be written: {result.reason}")
                self._note_shard(name, groups[name], result)
                bar.advance(sum(member.size for member in result) / 1e6)

    def job(self, place: str) -> Job:
        """Make the job of a place."""
        row = self._row[place]
        count, fps = self.manifest.num_frames[row], None
        # A check counts the frames that training can read; of the others some can be mended.
        is_wanted = count > 0 and (self.recipe.copy or not self._verdicts[row])
        with contextlib.suppress(ValueError, ZeroDivisionError):
            rate = Fraction(self._rates[row])
            fps = rate.limit_denominator(SIMPLEST) if 0 < rate < 1000 else None
        temporary = f"{self._unfinished}/{row}{self.recipe.suffix(place)}"
        return Job(place, temporary, self._output(place), fps, count if is_wanted else None)

    def note(self, place: str, output: Output) -> None:
        """Record an output."""
        self.outputs[place] = output
        self._note({"place": place, "name": self.names[place], **asdict(output)})

    def _note(self, record: Mapping[str, Any]) -> None:
        assert self._journal is not None, "the folder is claimed before anything is written to it"
        self._journal.append(record)

    def unpacked(self) -> dict[str, list[str]]:
        """Return the places of each shard that is still to be written, as full as allowed."""
        groups: list[list[str]] = []
        room = 0
        for place in self.names:
            if place not in self.outputs or self._is_packed(place):
                continue
            size = self.outputs[place].bytes + HEADERS
            if not groups or size > room:
                groups.append([])
                room = self.recipe.shard_bytes
            groups[-1].append(place)
            room -= size
        first = max((int(name[6:12]) + 1 for name in self._shards), default=0)
        return {f"shard-{number:06d}.tar": group for number, group in enumerate(groups, first)}

    def shard(self, name: str, places: Sequence[str]) -> Shard:
        """Make the job of a shard."""
        samples = tuple(map(self._sample, places))
        return Shard(f"{self._unfinished}/{name}", f"{self.path}/{name}", samples)

    def _note_shard(self, name: str, places: Sequence[str], members: Sequence[TarMember]) -> None:
        """Record a shard, and delete the files that it was made of."""
        packed = dict(zip(places, members, strict=True))
        self._packed |= packed
        self._shards[name] = {
            "shard": name,
            "bytes": (self.path / name).stat().st_size,
            "members": [[place, it.name, it.offset, it.size] for place, it in packed.items()],
            "labels": [self._label(self._row[place]) for place in places],
        }
        self._note(self._shards[name])
        if not self.recipe.copy:
            for place in places:
                remove(self._output(place))

    def write_lists(self) -> None:
        """Write ``manifest.csv`` in the order of the source, and ``failed.csv``."""
        places = enumerate(self.manifest.files)
        rows = [self._cells(row, place) for row, place in places if self._path_of(place)]
        write_table(self.path / "manifest.csv", [*COLUMNS, *self._others], rows)
        failed, reasons = self.path / "failed.csv", self.failures.values()
        failed.unlink(missing_ok=True)
        if reasons:
            write_report(failed, ("path", "reason"), ((bad.path, bad.reason) for bad in reasons))
        if self._shards and all(map(self._is_packed, self.outputs)):
            remove(str(self._parts))
            for name in self._outdated:
                remove(str(self.path / name))

    def _shard_of(self, place: str) -> str:
        return self._packed[place].tar if place in self._packed else ""

    def _is_packed(self, place: str) -> bool:
        return place in self._packed and self._shard_of(place) not in self._outdated

    def _label(self, row: int) -> tuple[int, str]:
        names, label = self.manifest.label_names or (), self.manifest.labels[row]
        return label, names[label] if 0 <= label < len(names) else ""

    def _output(self, place: str) -> str:
        suffix = self.recipe.suffix(place)
        folder = {".jpg": "images", ".mp4": "videos", "/": "frames"}[suffix]
        root = self._parts if self.recipe.form == "shards" else self.path / folder
        return f"{root}/{self.names[place]}{suffix}"

    def _path_of(self, place: str) -> str | None:
        """Path of an output relative to the folder, if it is there."""
        if place not in self.outputs:
            return None
        if self.recipe.form != "shards":
            return self._output(place).removeprefix(f"{self.path}/")
        return str(self._packed[place]) if self._is_packed(place) else None

    def _cells(self, row: int, place: str) -> list[object]:
        (label, name), output = self._label(row), self.outputs[place]
        fps = f"{output.fps:.4f}".rstrip("0").rstrip(".") if output.fps else ""
        properties = [fps if each == "fps" else getattr(output, each) for each in PROPERTIES]
        others = [column[row] for column in self._others.values()]
        return [self._path_of(place), label if label >= 0 else "", name, *properties, *others]

    def _sample(self, place: str) -> Sample:
        label, name = self._label(self._row[place])
        info: dict[str, Any] = {
            "num_frames": self.outputs[place].num_frames,
            "source": place.removeprefix(self.base.rstrip("/") + "/"),
        }
        info |= {"label": label} if label >= 0 else {}
        info |= {"label_name": name} if name else {}
        suffix, path = self.recipe.suffix(place), self._output(place)
        if self.recipe.copy:
            suffix, path = suffix_of(place), place
        if place in self._packed:
            member = self._packed[place]
            path = str(replace(member, tar=f"{self.path}/{member.tar}"))
        return Sample(self.names[place], path, suffix, label, info)
