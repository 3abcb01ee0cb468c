"""A folder of transcoded data: its state, its remaining work, and its manifest.

It holds
    manifest.csv        path, label and properties of each file: train on this
    failed.csv          files that failed, and the reasons
    settings.json       the settings: a folder never mixes two
    journal.jsonl       what is done, a line each; a second start goes on from there
and, by the chosen format,
    videos/NAME.mp4     or for an image images/NAME.jpg
    frames/NAME/        a folder of 000000.jpg, 000001.jpg ...
    shard-000000.tar    and so on, in the layout of webdataset
Each output is complete or absent.

In a shard the samples lie in the order of the manifest. The files of one follow each other and
share a key, the name up to the first dot: ``class/a.cls`` (the class, if it has one) and
``class/a.mp4``. The same samples give the same bytes.
"""

import io
import os
import tarfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, astuple, replace
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import hpm_video
from hpm_video.data.manifest import read_listing, read_manifest, write_manifest
from hpm_video.decoding.locations import TarMember, is_frame_folder, is_image
from hpm_video.decoding.video_stream import SIMPLEST
from hpm_video.files.atomic import written_beside
from hpm_video.files.failures import Failure
from hpm_video.files.wording import counted
from hpm_video.preparation.findings import COLUMNS as CHECK_COLUMNS
from hpm_video.preparation.findings import Stamp, stamp_of
from hpm_video.preparation.jobs import Journal, claim, remove, run_jobs, write_report
from hpm_video.preparation.output_names import output_names, suffix_of
from hpm_video.preparation.transcode import Job, Output, Recipe, Transcoder
from hpm_video.workers.pool import Limits
from hpm_video.workers.progress_bar import ProgressBar

PROPERTIES = ("num_frames", "width", "height", "fps", "key_frame_distance")
COLUMNS = ("path", "label", "label_name", *PROPERTIES)
# Columns of the source's manifest that do not hold for outputs.
STALE = {*COLUMNS, *CHECK_COLUMNS, "kept_every"}
HEADERS = 3 * 1024  # estimate of the bytes that a tar adds to a sample


class PreparedFolder:
    """A folder of outputs, and what its journal says of them."""

    def __init__(self, path: Path, recipe: Recipe, source: Path, root: Path | None) -> None:
        """``source``: a manifest or a folder, whose paths start from ``root``."""
        self.path, self.recipe = path.absolute(), recipe
        self.outputs: dict[str, Output] = {}  # by place, as are the others
        self.failures: dict[str, Failure] = {}
        manifest, listing = read_manifest(source, root), read_listing(source, root)
        verdicts = listing.column("verdict")
        kept = [row for row, verdict in enumerate(verdicts) if verdict != "bad"]
        self._is_checked = [verdicts[row] != "" for row in kept]
        self._rates = [manifest.fps.get(file) for file in manifest.files]
        names = manifest.label_names or ()
        self._labels = [
            (label, names[label] if 0 <= label < len(names) else "") for label in manifest.labels
        ]
        # Of sections the whole file is prepared: they are columns that stay as they are.
        self.manifest = replace(manifest, files=tuple(listing.files[row] for row in kept))
        # Further columns of the manifest, which hold for outputs as well.
        others = [name for name in listing.table.columns if name not in STALE]
        self._others = listing.table[others].iloc[kept]
        if recipe.fps is None and (recipe.keep_every > 1 or manifest.kept_every):
            kept_every = [
                "" if is_image(place) else manifest.kept_every.get(place, 1) * recipe.keep_every
                for place in manifest.files
            ]
            self._others = self._others.assign(kept_every=kept_every)
        base = root or (source if source.is_dir() else source.parent)
        self._settings = {
            "hpm_video": hpm_video.__version__,
            "source": str(source),
            "root": str(base.absolute()),
            **asdict(recipe),
            "fps": recipe.fps and str(recipe.fps),
            "tune": "none" if recipe.form == "frames" or recipe.copy else "fastdecode",
        }
        dots = recipe.form != "shards"
        self.names = output_names(self.manifest.files, str(base.absolute()), dots=dots)
        self._row = {place: row for row, place in reversed([*enumerate(self.manifest.files)])}
        self._packed: dict[str, TarMember] = {}  # by place
        self._shards: dict[str, dict[str, Any]] = {}  # by name, as the journal has them
        self._journal: Journal | None = None
        self._unfinished = self.path / ".unfinished"

    def close(self) -> None:
        """Release the folder."""
        if self._journal is not None:
            remove(self._unfinished)
            self._journal.close()

    def claim(self) -> None:
        """Claim the folder for these settings (see :func:`claim`), and find out what is done.

        FileExistsError: its shards hold files that have changed since, or that have other labels.
        """
        self._journal = claim(
            self.path, self._settings, holds="prepared data", unrelated=("hpm_video",)
        )
        remove(self._unfinished)
        self._unfinished.mkdir()
        for record in self._journal.read():
            if "shard" in record:
                self._shards[record["shard"]] = record
            elif self.names.get(place := record.pop("place")) == record.pop("name"):
                self.outputs[place] = Output(**record)
        if outdated := self._find_packed():
            raise FileExistsError(
                f"the shards of {self.path} hold {counted(len(outdated), 'file')} whose "
                f"content or label has changed, such as {outdated[0]}. Give a new folder; to "
                "change labels alone, pack these shards again: their manifest.csv with new labels, "
                "and --copy"
            )
        self.outputs = {
            place: output
            for place, output in self.outputs.items()
            if place in self._packed or (self._is_there(place) and not self._has_changed(place))
        }

    def _find_packed(self) -> list[str]:
        """Find what the shards hold. -> the places of what is out of date there"""
        outdated = []
        for name, record in [*self._shards.items()]:
            path = self.path / name
            if not path.is_file() or path.stat().st_size != record["bytes"]:
                del self._shards[name]
                continue
            for (place, *where), label in zip(record["members"], record["labels"], strict=True):
                if place in self.outputs:
                    self._packed[place] = TarMember(name, *where)
                    if label != [*self._labels[self._row[place]]] or self._has_changed(place):
                        outdated.append(place)
        return outdated

    def _has_changed(self, place: str) -> bool:
        """Whether a source has changed. A missing one may have been deleted on purpose."""
        made = self.outputs[place]
        return stamp_of(place) not in (Stamp(), Stamp(made.source_bytes, made.source_modified))

    def _is_there(self, place: str) -> bool:
        """Whether an output is still there. Frames are only counted: there may be millions."""
        made, output = self.outputs[place], place if self.recipe.copy else self._output(place)
        if is_frame_folder(output):
            names = os.listdir(output) if Path(output).is_dir() else []  # noqa: PTH208 - quick
            return sum(name.endswith(".jpg") for name in names) == made.num_frames
        return stamp_of(output).bytes == made.bytes

    def missing(self) -> list[str]:
        """Return the places without an output, each once, in the order of the manifest."""
        return [place for place in self.names if place not in self.outputs]

    def make(self, workers: int, limits: Limits) -> None:
        """Make the outputs that are missing, and record them. Raises as :func:`run_jobs`."""
        jobs = {place: self.job(place) for place in self.missing()}
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

    def pack(self) -> None:
        """Write the shards that are missing, record them, and delete what they were made of.

        OSError: one cannot be written. What is done stays.
        """
        groups = self.unpacked()
        with closing(ProgressBar(len(groups), "shards", "MB/s")) as bar:
            for name, places in groups.items():
                packed = self._write_shard(self.path / name, places)
                self._packed |= packed
                self._shards[name] = {
                    "shard": name,
                    "bytes": (self.path / name).stat().st_size,
                    "members": [[place, *astuple(it)[1:]] for place, it in packed.items()],
                    "labels": [self._labels[self._row[place]] for place in places],
                }
                self._note(self._shards[name])
                for place in () if self.recipe.copy else places:
                    remove(self._output(place))
                bar.advance(sum(member.size for member in packed.values()) / 1e6)
        remove(self.path / ".parts")

    def _write_shard(self, path: Path, places: Sequence[str]) -> dict[str, TarMember]:
        """Write a tar file atomically. -> the member of each place"""
        names = {}
        with written_beside(path) as beside:
            with tarfile.open(beside, "w", format=tarfile.PAX_FORMAT) as tar:
                for place in places:
                    key, (label, _) = self.names[place], self._labels[self._row[place]]
                    source = place if self.recipe.copy else self._output(place)
                    member = TarMember.parse(source)
                    names[place] = key + suffix_of(source)
                    if label >= 0:
                        _add(tar, f"{key}.cls", io.BytesIO(str(label).encode()))
                    with io.BytesIO(member.read()) if member else Path(source).open("rb") as file:
                        _add(tar, names[place], file)
            with tarfile.open(beside, "r:") as tar:
                written = {each.name: (each.offset_data, each.size) for each in tar}
        return {place: TarMember(path.name, name, *written[name]) for place, name in names.items()}

    def job(self, place: str) -> Job:
        """Make the job of a place."""
        row = self._row[place]
        count, rate = self.manifest.num_frames[row], self._rates[row]
        # A check counts the frames that training can read; of the others some can be mended.
        is_wanted = count > 0 and (self.recipe.copy or not self._is_checked[row])
        temporary = f"{self._unfinished}/{row}{self.recipe.suffix(place)}"
        fps = Fraction(rate).limit_denominator(SIMPLEST) if rate and rate < 1000 else None
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
            if place not in self.outputs or place in self._packed:
                continue
            size = self.outputs[place].bytes + HEADERS
            if not groups or size > room:
                groups.append([])
                room = self.recipe.shard_bytes
            groups[-1].append(place)
            room -= size
        first = max((int(name[6:12]) + 1 for name in self._shards), default=0)
        return {f"shard-{number:06d}.tar": group for number, group in enumerate(groups, first)}

    def write_lists(self) -> None:
        """Write ``manifest.csv`` in the order of the source, and ``failed.csv``."""
        rows = [row for row, place in enumerate(self.manifest.files) if place in self.outputs]
        cells = [self._cells(row) for row in rows]
        columns: dict[str, Any] = {
            name: [each[i] for each in cells] for i, name in enumerate(COLUMNS)
        }
        table = self._others.iloc[rows].assign(**columns)
        write_manifest(table[[*COLUMNS, *self._others.columns]], self.path / "manifest.csv")
        failed = self.path / "failed.csv"
        failed.unlink(missing_ok=True)
        if self.failures:
            write_report(failed, ("path", "reason"), map(astuple, self.failures.values()))

    def _output(self, place: str) -> str:
        suffix = self.recipe.suffix(place)
        folder = {".jpg": "images", ".mp4": "videos", "/": "frames"}[suffix]
        folder = ".parts" if self.recipe.form == "shards" else folder
        return f"{self.path}/{folder}/{self.names[place]}{suffix}"

    def _cells(self, row: int) -> list[object]:
        """Return the cells of ``COLUMNS`` in a row of the manifest."""
        place = self.manifest.files[row]
        (label, name), output = self._labels[row], self.outputs[place]
        path = self._packed.get(place) or self._output(place).removeprefix(f"{self.path}/")
        fps = f"{output.fps:.4f}".rstrip("0").rstrip(".") if output.fps else ""
        properties = [fps if each == "fps" else getattr(output, each) for each in PROPERTIES]
        return [str(path), label if label >= 0 else "", name, *properties]


def _add(tar: tarfile.TarFile, name: str, file: IO[bytes]) -> None:
    """Append a file without times and owners, by which equal shards would differ."""
    header = tarfile.TarInfo(name)
    header.size = file.seek(0, os.SEEK_END)
    file.seek(0)
    tar.addfile(header, file)
