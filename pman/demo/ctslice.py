"""A ChRIS plugin: each DICOM slice as a picture, and its statistics.

python -m pman.demo.ctslice IN OUT     where pman is installed
python3 ctslice.py IN OUT              anywhere else: this file needs nothing of pman

For IN/a/b.dcm it writes OUT/a/b.png (8 bit, greyscale) and OUT/a/b.json. References are to DICOM
PS3.3 (https://dicom.nema.org/medical/dicom/current/output/html/part03.html).
"""

import json
import math
import sys
from argparse import ArgumentParser, Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from chris_plugin import PathMapper, chris_plugin  # type: ignore[import-untyped]
from PIL import Image
from pydicom.errors import InvalidDicomError

GREYSCALE = ("MONOCHROME1", "MONOCHROME2")
"""Low values are white, or black (C.7.6.3.1.2)."""

parser = ArgumentParser(description="Each DICOM slice as a PNG, and its statistics as JSON.")
parser.add_argument("--window-center", type=float, default=0.0, help="in Hounsfield units")
parser.add_argument(
    "--window-width",
    type=float,
    default=0.0,
    help="in Hounsfield units; 0: the slice's own window, else from its minimum to its maximum",
)
parser.add_argument("--pattern", type=str, default="**/*.dcm", help="which files are slices")


class NoSlice(Exception):
    """This file can't be shown as one greyscale slice; the text says why."""


@dataclass(frozen=True)
class Window:
    """Which values become black and which white (C.11.2.1.2.1), and where it came from."""

    center: float
    width: float
    source: str

    @property
    def edges(self) -> tuple[float, float]:
        """The highest value that is black, and the lowest that is white."""
        half = (self.width - 1) / 2
        return self.center - 0.5 - half, self.center - 0.5 + half


@dataclass(frozen=True)
class Slice:
    """The values of one slice, in the unit that its rescaling leads to."""

    dataset: pydicom.Dataset
    values: npt.NDArray[np.float64]
    padding: npt.NDArray[np.bool_]
    """Where there is no measured value (C.7.5.1.1.2)."""

    @classmethod
    def read(cls, path: Path) -> "Slice":
        """Raises NoSlice."""
        try:
            dataset = pydicom.dcmread(path)
            stored = dataset.pixel_array
        except InvalidDicomError:
            raise NoSlice("is no DICOM file") from None
        except Exception as error:  # pydicom and its decoders raise many kinds
            reason, *_ = str(error).splitlines() or [type(error).__name__]
            raise NoSlice(f"has no pixels that can be read: {reason}") from None
        if stored.ndim != 2 or dataset.get("PhotometricInterpretation") not in GREYSCALE:
            raise NoSlice("is not one greyscale slice: it has several frames or colours")
        stored = _used_bits(stored, dataset)
        values = stored * _number(dataset, "RescaleSlope", 1) + _number(
            dataset, "RescaleIntercept", 0
        )
        padding = _padding(stored, dataset)
        if padding.all():
            raise NoSlice("has no measured value: all of it is padding")
        return cls(dataset, values, padding)

    @property
    def measured(self) -> npt.NDArray[np.float64]:
        return self.values[~self.padding]

    @property
    def unit(self) -> str:
        """HU for CT; else what the slice calls it (C.11.1.1.2), US where it doesn't."""
        default = "HU" if self.dataset.get("Modality") == "CT" else "US"
        return str(self.dataset.get("RescaleType") or default)

    def window(self) -> Window:
        """The slice's own window, the first if there are several; else from min to max."""
        center = _number(self.dataset, "WindowCenter")
        width = _number(self.dataset, "WindowWidth")
        linear = self.dataset.get("VOILUTFunction", "LINEAR") == "LINEAR"
        if linear and center is not None and width is not None and width >= 1:
            return Window(center, width, "slice")
        low, high = float(self.measured.min()), float(self.measured.max())
        return Window((low + high + 1) / 2, high - low + 1, "min-max")

    def picture(self, window: Window) -> npt.NDArray[np.uint8]:
        """8-bit greys, 0 is black; padding is black."""
        low, high = window.edges
        if high > low:
            shade = np.clip((self.values - low) / (high - low), 0, 1)
        else:
            shade = (self.values > low).astype(np.float64)
        if self.dataset.get("PhotometricInterpretation") == "MONOCHROME1":
            shade = 1 - shade
        shade[self.padding] = 0
        return np.rint(255 * shade).astype(np.uint8)

    def statistics(self, window: Window) -> dict[str, Any]:
        """What the JSON holds; padding doesn't count, and the deviation is the population's."""
        rows, columns = self.values.shape
        return {
            "rows": rows,
            "columns": columns,
            "unit": self.unit,
            "min": float(self.measured.min()),
            "max": float(self.measured.max()),
            "mean": float(self.measured.mean()),
            "std": float(self.measured.std()),
            "padding_pixels": int(self.padding.sum()),
            "window": asdict(window),
        }


def _number(dataset: pydicom.Dataset, keyword: str, default: Any = None) -> Any:
    """The first number of an element that may be missing, empty or hold several."""
    try:
        value = dataset.get(keyword)
        first = value[0] if isinstance(value, pydicom.multival.MultiValue) and value else value
        return default if first is None or first == "" else float(first)
    except (TypeError, ValueError):
        raise NoSlice(f"has a {keyword} that is no number") from None


def _used_bits(stored: npt.NDArray[Any], dataset: pydicom.Dataset) -> npt.NDArray[Any]:
    """Without the bits that don't belong to the value: old files have overlays in them, and the
    sign of a 12-bit value need not be in bits 12 to 15 (PS3.5, 8.1.1)."""
    if stored.dtype.kind not in "iu":
        return stored
    size = 8 * stored.dtype.itemsize
    used: npt.NDArray[Any] = stored << (size - 1 - dataset.HighBit) >> (size - dataset.BitsStored)
    return used


def _padding(stored: npt.NDArray[Any], dataset: pydicom.Dataset) -> npt.NDArray[np.bool_]:
    first = dataset.get("PixelPaddingValue")
    if first is None:
        return np.zeros(stored.shape, dtype=bool)
    last = dataset.get("PixelPaddingRangeLimit", first)
    # A negative value is often written as its unsigned twin: make both what the pixels are.
    low, high = sorted(np.array([first, last]).astype(stored.dtype))
    inside: npt.NDArray[np.bool_] = (stored >= low) & (stored <= high)
    return inside


def convert(source: Path, target: Path, wanted: Window | None) -> None:
    """Write `target`, a PNG, and the JSON beside it. Raises NoSlice."""
    image = Slice.read(source)
    window = wanted or image.window()
    Image.fromarray(image.picture(window)).save(target)
    statistics = {"file": source.name, **image.statistics(window)}
    target.with_suffix(".json").write_text(json.dumps(statistics, indent=2) + "\n")
    print(
        f"{source.name}: {statistics['columns']} x {statistics['rows']}, "
        f"{statistics['min']:g} to {statistics['max']:g} {statistics['unit']}, "
        f"window {window.center:g} / {window.width:g} ({window.source})"
    )


def wanted_window(center: float, width: float) -> Window | None:
    """The window that the options ask for; None: each slice's own."""
    if center == width == 0:
        return None
    if not math.isfinite(center) or not 1 <= width < math.inf:
        sys.exit(
            f"ctslice: there is no window with the center {center:g} and the width {width:g}: "
            "a width is 1 or more"
        )
    return Window(center, width, "options")


@chris_plugin(  # type: ignore[untyped-decorator]
    parser=parser,
    title="CT slice to picture",
    category="Visualization",
    min_memory_limit="200Mi",
    min_cpu_limit="1000m",
)
def main(options: Namespace, inputdir: Path, outputdir: Path) -> None:
    """Convert what can be converted; exit 1 if something can't."""
    wanted = wanted_window(options.window_center, options.window_width)
    wrong = 0
    for source, target in PathMapper.file_mapper(
        inputdir, outputdir, glob=options.pattern, suffix=".png"
    ):
        try:
            convert(source, target, wanted)
        except NoSlice as error:
            wrong += 1
            print(f"ctslice: {source.relative_to(inputdir)} {error}", file=sys.stderr)
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
