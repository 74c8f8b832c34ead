"""The demo: its plugin against other computations, and the whole of it on this machine."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
import pytest
from chris_plugin._registration import get_registered  # type: ignore[import-untyped]
from chris_plugin.parameters import serialize  # type: ignore[import-untyped]
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.pixels.processing import apply_modality_lut, apply_windowing

from pman.demo import ctslice
from tests.waiting import wait_for

CT_SMALL = Path(str(get_testdata_file("CT_small.dcm", download=False)))

Pixels = npt.NDArray[Any]


def write_slice(path: Path, stored: Pixels, **elements: Any) -> Path:
    """CT_small.dcm with other pixels and elements; None removes one."""
    dataset = pydicom.dcmread(CT_SMALL)
    dataset.Rows, dataset.Columns = stored.shape
    dataset.PixelData = stored.astype(stored.dtype.newbyteorder("<")).tobytes()
    dataset.BitsAllocated = dataset.BitsStored = 8 * stored.dtype.itemsize
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    for name, value in ({"PixelPaddingValue": None} | elements).items():
        setattr(dataset, name, value)
        if value is None:
            delattr(dataset, name)
    dataset.HighBit = dataset.BitsStored - 1
    path.parent.mkdir(exist_ok=True)
    dataset.save_as(path)
    return path


def pixels(path: Path) -> Pixels:
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)


def converted(
    tmp_path: Path, stored: Pixels, *options: str, **elements: Any
) -> tuple[Pixels, dict[str, Any]]:
    """What the plugin makes of one slice: the picture and the statistics."""
    write_slice(tmp_path / "in" / "slice.dcm", stored, **elements)
    run_plugin(tmp_path / "in", tmp_path / "out", *options)
    statistics = json.loads((tmp_path / "out" / "slice.json").read_text())
    return pixels(tmp_path / "out" / "slice.png"), statistics


def run_plugin(source: Path, target: Path, *options: str) -> None:
    ctslice.main(ctslice.parser.parse_args(options), source, target)


# --- the plugin's numbers ---


def test_ct_small_against_its_bytes(tmp_path: Path) -> None:
    raw = pydicom.dcmread(CT_SMALL).PixelData
    numbers = [int.from_bytes(raw[i : i + 2], "little", signed=True) for i in range(0, len(raw), 2)]
    hounsfield = [number - 1024 for number in numbers]
    mean = sum(hounsfield) / len(hounsfield)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "ct.dcm").symlink_to(CT_SMALL)

    run_plugin(tmp_path / "in", tmp_path / "out", "--window-center=40", "--window-width=401")

    found = json.loads((tmp_path / "out" / "ct.json").read_text())
    assert (found["rows"], found["columns"], found["unit"]) == (128, 128, "HU")
    assert (found["min"], found["max"]) == (min(hounsfield), max(hounsfield))
    assert found["mean"] == pytest.approx(mean, rel=1e-12)
    variance = sum((number - mean) ** 2 for number in hounsfield) / len(hounsfield)
    assert found["std"] == pytest.approx(variance**0.5, rel=1e-12)
    assert found["window"] == {"center": 40, "width": 401, "source": "options"}
    # -160.5 is black and 239.5 is white (C.11.2.1.2.1).
    shades = [round(255 * min(1, max(0, (number + 160.5) / 400))) for number in hounsfield]
    assert pixels(tmp_path / "out" / "ct.png").ravel().tolist() == shades


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    ("dtype", "rescale", "window"),
    [
        ("int16", (1, -1024), (40, 400)),
        ("uint16", (1, -1024), (-600, 1500)),
        ("int16", (0.5, 3.25), (100.5, 77.25)),
        ("uint16", (2.5, -1000), (20000, 1)),
        ("uint8", (1, 0), (128, 256)),
        ("int8", (-3, 7), (0, 100)),
    ],
)
def test_window_as_pydicom_applies_it(
    tmp_path: Path,
    dtype: str,
    rescale: tuple[float, float],
    window: tuple[float, float],
    photometric: str,
) -> None:
    slope, intercept = rescale
    center, width = window
    limits = np.iinfo(dtype)
    stored = np.random.default_rng(1).integers(
        limits.min, limits.max, (31, 17), dtype=dtype, endpoint=True
    )
    picture, statistics = converted(
        tmp_path,
        stored,
        PhotometricInterpretation=photometric,
        RescaleSlope=slope,
        RescaleIntercept=intercept,
        WindowCenter=center,
        WindowWidth=width,
    )
    dataset = pydicom.dcmread(tmp_path / "in" / "slice.dcm")
    values = apply_modality_lut(dataset.pixel_array, dataset)
    assert statistics["min"] == values.min()
    assert statistics["max"] == values.max()
    assert statistics["mean"] == pytest.approx(values.mean(), rel=1e-12)
    assert statistics["std"] == pytest.approx(values.std(), rel=1e-12)
    assert statistics["window"] == {"center": center, "width": width, "source": "slice"}
    windowed = apply_windowing(values, dataset)
    black, white = apply_windowing(np.array([-1e9, 1e9]), dataset)
    expected = 255 * (windowed - black) / (white - black)
    if photometric == "MONOCHROME1":
        expected = 255 - expected
    assert np.abs(picture - expected).max() <= 0.5 + 1e-6  # rounded, not cut off


def test_bits_beyond_the_stored_ones_are_not_part_of_the_value(tmp_path: Path) -> None:
    values = np.array([[-2048, -1, 0, 2047]], dtype=np.int16)
    overlay = np.array([[0x3000, 0x5000, 0xA000, 0xF000]], dtype=np.uint16)
    stored = ((values.view(np.uint16) & 0x0FFF) | overlay).view(np.int16)
    _, statistics = converted(tmp_path, stored, BitsStored=12, RescaleIntercept=0)
    assert (statistics["min"], statistics["max"]) == (-2048, 2047)
    assert statistics["mean"] == values.mean()


@pytest.mark.parametrize("dtype", ["int16", "uint16"])  # the element holds -2000 in both
@pytest.mark.parametrize(
    ("photometric", "shades"), [("MONOCHROME1", [255, 0, 128]), ("MONOCHROME2", [0, 255, 128])]
)
def test_padding_is_black_and_not_counted(
    tmp_path: Path, dtype: str, photometric: str, shades: list[int]
) -> None:
    stored = np.array([[-2000, -2000, 0, 100, 50]]).astype(dtype)
    picture, statistics = converted(
        tmp_path, stored, PixelPaddingValue=-2000, PhotometricInterpretation=photometric
    )
    assert picture.tolist() == [[0, 0, *shades]]
    assert (statistics["min"], statistics["max"], statistics["mean"]) == (-1024, -924, -974)
    assert statistics["padding_pixels"] == 2


@pytest.mark.parametrize(
    "elements",
    [{}, {"WindowCenter": 40, "WindowWidth": 0}, {"WindowCenter": 40}, {"WindowWidth": 400}],
)
def test_without_a_usable_window_it_is_from_min_to_max(
    tmp_path: Path, elements: Mapping[str, float]
) -> None:
    stored = np.array([[100, 200, 1120]], dtype=np.int16)
    picture, statistics = converted(tmp_path, stored, **elements)
    assert picture.tolist() == [[0, 25, 255]]
    assert statistics["window"]["source"] == "min-max"


def test_of_several_windows_the_first_is_used(tmp_path: Path) -> None:
    _, statistics = converted(
        tmp_path, np.eye(3, dtype=np.int16), WindowCenter=[40, 300], WindowWidth=[400, 1500]
    )
    assert statistics["window"] == {"center": 40, "width": 400, "source": "slice"}


def test_missing_rescale_and_a_flat_slice(tmp_path: Path) -> None:
    stored = np.full((4, 4), 7, dtype=np.uint16)
    picture, statistics = converted(tmp_path, stored, RescaleSlope=None, RescaleIntercept=None)
    assert statistics["min"] == statistics["max"] == statistics["mean"] == 7
    assert statistics["std"] == 0
    assert not picture.any()


# --- the plugin as a program ---


def plugin(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run it as a lone file, where pman can't be imported."""
    program = (
        "import runpy, sys; sys.modules['pman'] = None; sys.argv[:1] = []; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-c", program, ctslice.__file__, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_what_is_no_slice_is_named_and_the_others_are_converted(tmp_path: Path) -> None:
    source, target = tmp_path / "in", tmp_path / "out"
    write_slice(source / "good.dcm", np.eye(3, dtype=np.int16))
    (source / "text.dcm").write_text("no DICOM at all")
    write_slice(source / "palette.dcm", np.eye(3, dtype=np.uint8)).write_bytes(
        Path(str(get_testdata_file("examples_palette.dcm", download=False))).read_bytes()
    )
    write_slice(source / "short.dcm", np.eye(3, dtype=np.int16), Rows=50)
    done = plugin(source, target)
    assert done.returncode == 1
    assert "ctslice: text.dcm is no DICOM file" in done.stderr
    assert "ctslice: palette.dcm is not one greyscale slice" in done.stderr
    assert "ctslice: short.dcm has no pixels that can be read: The " in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in target.iterdir()) == ["good.json", "good.png"]
    assert done.stdout.startswith("good.dcm: 3 x 3, ")


def test_nothing_to_do_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    done = plugin(tmp_path / "in", tmp_path / "out")
    assert done.returncode == 1
    assert "no input found" in done.stderr


@pytest.mark.parametrize("options", [["--window-center=40"], ["--window-width=nan"]])
def test_half_a_window_is_refused(tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "in").mkdir()
    done = plugin(*options, tmp_path / "in", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.startswith("ctslice: there is no window with the center ")


def test_chris_can_describe_the_plugin() -> None:
    flags = [option["flag"] for option in serialize(get_registered().parser)]
    assert flags == ["--window-center", "--window-width", "--pattern"]


# --- the demo ---


class Demo:
    """`pman demo` in a process of its own, with a folder for all that is temporary."""

    def __init__(self, tmp_path: Path) -> None:
        self.temporary = tmp_path / "temporary"
        self.temporary.mkdir()
        self.output = tmp_path / "pictures"
        self._folder = tmp_path

    @contextmanager
    def started(self, *options: str, **settings: str) -> Iterator[subprocess.Popen[str]]:
        with subprocess.Popen(
            [sys.executable, "-m", "pman", "demo", "--output", str(self.output), *options],
            cwd=self._folder,
            env={"PATH": os.environ["PATH"], "TMPDIR": str(self.temporary), **settings},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def run(self, *options: str, **settings: str) -> tuple[int, str, str]:
        with self.started(*options, **settings) as process:
            out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    def leftovers(self) -> list[str]:
        """Temporary files, and processes that were told of the temporary folder."""
        return [str(path) for path in self.temporary.rglob("*")] + [
            process.name
            for process in Path("/proc").glob("[0-9]*")
            if str(self.temporary).encode() in _environment(process)
        ]


def _environment(process: Path) -> bytes:
    try:
        return (process / "environ").read_bytes()
    except OSError:  # it has ended, or isn't ours to see
        return b""


@pytest.fixture
def demo(tmp_path: Path) -> Demo:
    return Demo(tmp_path)


def test_demo_on_this_machine(demo: Demo, tmp_path: Path) -> None:
    hostile = {
        "STOREBASE": "/nowhere",
        "TEMPLATE": "shifter",
        "API_TOKEN": "x",
        "REMOVE_JOBS": "no",
    }
    code, out, err = demo.run(**hostile)
    assert (code, err) == (0, "")
    assert demo.leftovers() == []
    assert "\x1b" not in out, "plain text where there is no terminal"
    parts = ['"jid": "demo-', "#!/bin/bash", "running", "finished", "CT_small.dcm: 128 x 128"]
    places = [out.index(part) for part in parts]
    assert places == sorted(places)
    assert str(demo.output / "CT_small.png") in out

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "CT_small.dcm").symlink_to(CT_SMALL)
    run_plugin(tmp_path / "in", tmp_path / "out", "--window-center=300", "--window-width=1500")
    picture, statistics = sorted(demo.output.iterdir(), reverse=True)
    assert (pixels(picture) == pixels(tmp_path / "out" / "CT_small.png")).all()
    assert statistics.read_text() == (tmp_path / "out" / "CT_small.json").read_text()

    assert demo.run()[0] == 0, "its own files are written again"


def test_demo_leaves_foreign_files_alone(demo: Demo) -> None:
    demo.output.mkdir()
    (demo.output / "thesis.txt").write_text("years")
    (demo.output / "CT_small.png").write_text("mine")
    code, out, err = demo.run()
    assert (code, out) == (1, "")
    assert err == (
        f"pman: {demo.output} holds files that are not the demo's: "
        "choose another folder with --output\n"
    )
    assert (demo.output / "CT_small.png").read_text() == "mine"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_demo_interrupted(demo: Demo, number: signal.Signals) -> None:
    with demo.started() as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "What becomes of it\n":
                break
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (
        1,
        "pman: interrupted; the job and the temporary folders are removed\n",
    )
    wait_for(lambda: demo.leftovers() == [], 10, "the end of the plugin's processes")
    assert not demo.output.exists()


def test_demo_whose_job_fails(demo: Demo, tmp_path: Path) -> None:
    worn = tmp_path / "ln"  # the job's script makes links
    worn.write_text("#!/bin/sh\necho worn out; exit 1\n")
    worn.chmod(0o755)
    code, out, err = demo.run(PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert code == 1
    assert err.startswith("pman: the job is finishedWithError: the input folder ")
    assert "worn out" in out
    assert demo.leftovers() == []
    assert not demo.output.exists()


def test_demo_without_its_packages() -> None:
    program = (
        "import sys; sys.modules['PIL'] = None; sys.argv = ['pman', 'demo']; "
        "from pman.__main__ import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "pman: the demo misses PIL: pip install 'pman[demo]'\n"


@pytest.mark.parametrize(
    ("options", "settings", "words"),
    [
        ([], {"STOREBASE": "{}", "SSH_HOST": "login.example.org"}, "give --image: "),
        (["--image=x"], {"STOREBASE": "/nowhere"}, "STOREBASE /nowhere is not on this machine"),
        (["--image=x"], {"SSH_HOST": "login.example.org"}, "STOREBASE is not set"),
        (
            ["--image=/x"],
            {"STOREBASE": "{}", "SITE_FILE": "/nowhere"},
            "/nowhere: it can't be read: No such file",
        ),
    ],
)
def test_demo_on_slurm_needs_to_know_where(
    demo: Demo, tmp_path: Path, options: list[str], settings: Mapping[str, str], words: str
) -> None:
    given = {name: value.format(tmp_path) for name, value in settings.items()}
    code, out, err = demo.run("--slurm", *options, **given)
    assert (code, out) == (1, "")
    assert err.startswith(f"pman: {words}")
    assert demo.leftovers() == []
