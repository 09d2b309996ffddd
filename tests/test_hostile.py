"""Hostile input: damaged images and caches, and command lines of nonsense. What is refused is one line."""

import contextlib
import io
import json
import os
import pickle
import re
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import zlib
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import examples
from hypothesis import Phase, example, given
from hypothesis import strategies as st
from PIL import Image

import baselines
import lure

pytestmark = pytest.mark.filterwarnings("error")
FOLDER = ["--dataset=folder", "--data=data", "--cache=cache", "--out=out/x.json", "--image-size=8"]
FOLDER += ["--arch=small", "--mega-batches=1", "--epochs=1", "--lr=0"]


def encoded(image, kind="png", **options):
    image.save(file := io.BytesIO(), kind, **options)
    return file.getvalue()


def saved(content):
    torch.save(content, file := io.BytesIO())
    return file.getvalue()


def png(width, height, rows=b"", depth=8):
    """A grey PNG of this size by its header, whatever there is in it."""
    header = struct.pack(">IIBBBBB", width, height, depth, 0, 0, 0, 0)
    chunks = (b"IHDR" + header, b"IDAT" + zlib.compress(rows, 1), b"IEND")
    parts = (struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def folder(root):
    """Two classes of black images, 8 and 2 of each."""
    for i in range(20):
        path = root / ("train" if i < 16 else "test") / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(9, 7, bytes(70)))


def contents(*without):
    """Every path of the working directory, with its kind, its time and what it holds."""
    found = {}
    for path in (Path(top, name) for top, folders, files in os.walk(".") for name in folders + files):
        kind, time = path.lstat().st_mode, path.lstat().st_mtime_ns
        if path.parts[0] not in without:
            held = path.read_bytes() if stat.S_ISREG(kind) else stat.S_ISLNK(kind) and os.readlink(path)
            found[path] = kind, not stat.S_ISDIR(kind) and time, held
    return found


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with the data set `data`; of which this is the folder of a class."""
    monkeypatch.chdir(tmp_path)
    folder(Path("data"))
    return Path("data/train/a")


def refused(capfd, name):
    """The call ends with 1 and one line that has the name, and changes nothing."""
    before = contents()
    assert lure.main(FOLDER) == 1
    out, err = capfd.readouterr()
    assert out == "" and err[-1:] == "\n" and err[:-1].isprintable() and name in err, err
    assert contents() == before


# ------------------------------------------------------------ Images
GREY, NOISE = Image.new("L", (9, 7), 77), Image.effect_noise((64, 64), 99)
SIXTEEN, PALETTE = Image.new("I;16", (9, 7), 30_000), Image.new("P", (9, 7), 1)
PALETTE.putpalette([0, 0, 0, 77, 77, 77])
FRAMES = dict(save_all=True, append_images=[Image.new("L", (9, 7), 200)])
UNUSUAL = {  # with the mean that has to arrive
    "one pixel": ("x.png", encoded(GREY.crop((0, 0, 1, 1))), 77),
    "RGBA": ("x.png", encoded(Image.new("RGBA", (9, 7), (200, 31, 0, 128))), 77),
    "grey": ("x.png", encoded(GREY), 77),
    "palette with transparency": ("x.png", encoded(PALETTE, transparency=b"\x05\x80"), 77),
    "16 bits": ("x.png", encoded(SIXTEEN), 30_000 / 257),
    "16 bits with transparency": ("x.png", encoded(SIXTEEN, transparency=30_000), 30_000 / 257),
    "16 bits as TIFF": ("x.tif", encoded(SIXTEEN, "tiff"), 30_000 / 257),
    "16 bits as PGM": ("x.pgm", b"P5 2 1 65535\n" + struct.pack(">HH", 30_000, 30_000), 30_000 / 257),
    "animated PNG": ("x.png", encoded(GREY, **FRAMES), 77),
    "animated WebP": ("x.webp", encoded(GREY, "webp", lossless=True, **FRAMES), 77),
    "CMYK": ("x.jpg", encoded(GREY.convert("CMYK"), "jpeg"), 77),
}


@pytest.mark.parametrize("name, content, mean", UNUSUAL.values(), ids=UNUSUAL)
def test_an_unusual_image_arrives(name, content, mean, place, capfd):
    (place / name).write_bytes(content)
    before = contents("cache", "out")
    assert lure.main(FOLDER) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) and len(err.splitlines()) == 1 and contents("cache", "out") == before
    images = lure.load_dataset("folder", "data", "cache", 8).images
    assert float(images.double().mean(dim=(1, 2, 3)).sum()) == pytest.approx(mean, abs=1)  # others are black


def file(content, name="x.png"):
    return lambda folder: (folder / name).write_bytes(content)


def links(*targets, name="x"):
    return lambda folder: [(folder / f"{name}{i or ''}").symlink_to(to) for i, to in enumerate(targets)]


def locked(folder):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    (folder / "x.png").touch(0)


JPEG, PNG = encoded(NOISE, "jpeg"), encoded(NOISE)
HUGE, LARGE = png(20_000, 20_000), png(12_000, 12_000, bytes(12_000 * 1501), depth=1)
HOSTILE = {
    "no bytes": file(b"", "x.jpg"),
    "text": file(b"no image, but text", "x.jpg"),
    "truncated JPEG": file(JPEG[: len(JPEG) // 2], "x.jpg"),
    "truncated PNG": file(PNG[: len(PNG) // 2]),
    "PNG of a damaged header": file(PNG[:29] + bytes(4) + PNG[33:]),
    "PNG of damaged pixels": file(PNG[:50] + bytes(9) + PNG[59:]),
    "PNG of no pixels": file(png(9, 7)),
    "a program for Ghostscript": file(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "x.jpg"),
    "400 million pixels": file(HUGE),
    "144 million pixels": file(LARGE),
    "link to itself": links("x.jpg", name="x.jpg"),
    "link to nothing": links("nowhere.jpg", name="x.jpg"),
    "loop": links("."),
    "two loops": links(".", "../a"),
    "loop over the parent": links("../.."),
    "new line in its name": file(b"", "x\ny.png"),
    "control characters in its name": file(b"", "x\x1b[2J\r\u2028y.png"),
    "name that is no text": file(b"", "x\udcff.png"),
    "not to be read": locked,
}


@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_image_is_one_line_and_changes_nothing(make, place, capfd):
    make(place)
    refused(capfd, "data/train/a/x")


@pytest.mark.parametrize("content", [HUGE, LARGE, None], ids=["huge", "large", "pipe"])
def test_huge_images_and_pipes_cost_neither_memory_nor_time(content, place):
    folder(Path("other"))
    for path in Path("other").glob("*/*/*.png"):
        path.unlink()
        path.write_bytes(content) if content else os.mkfifo(path)
    script = f"""if True:
        import resource, sys; sys.path.insert(0, {str(Path(lure.__file__).parent)!r}); import lure
        for data in ("data", "other"):
            status = lure.main([*{FOLDER}, "--data", data])
            print(status, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    (good, before), (bad, after) = (line.split() for line in done.stdout.splitlines() if line[0] != "{")
    assert (good, bad) == ("0", "1") and done.stderr.count("\n") == 2 and "other/train/a/" in done.stderr
    assert int(after) - int(before) < 200_000  # KiB; decoded, one of the large ones is 562 500


# ------------------------------------------------------------ Damaged caches
class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


CACHED = saved(torch.zeros(20, 3, 8, 8, dtype=torch.uint8))
CACHES = {
    "no bytes": b"",
    "truncated": CACHED[: len(CACHED) // 2],
    "text": b"no images, but text",
    "pickle with code": pickle.dumps(Code()),
    "code that torch saved": saved(Code()),
    "no tensor": saved([1, 2]),
    "fewer images": saved(torch.zeros(19, 3, 8, 8, dtype=torch.uint8)),
    "smaller images": saved(torch.zeros(20, 3, 4, 4, dtype=torch.uint8)),
    "no images": saved(torch.zeros(20, dtype=torch.uint8)),
    "no pixels": saved(torch.zeros(20, 3, 8, 8)),
}


@pytest.mark.parametrize("content", CACHES.values(), ids=CACHES)
def test_a_damaged_cache_is_one_line_and_stays(content, place, capfd):
    assert lure.main(FOLDER) == 0
    (stored,) = Path("cache").iterdir()
    stored.write_bytes(content)
    Path("out/x.json").unlink()
    capfd.readouterr()
    refused(capfd, str(stored))


# ------------------------------------------------------------ Command lines
TINY = ["--dataset=digits", "--arch=small", "--limit=60", "--limit-test=20", "--mega-batches=2", "--epochs=1"]
TINY += ["--data=kept/data", "--cache=cache", "--out=out/x.json"]
SMALL = {"dataset": ["digits", "folder"], "arch": ["small"], "epochs": ["1", "2"], "device": ["cpu", "cpu:0"]}
SMALL |= {"data": ["kept/data"], "cache": ["cache/new/ä"], "set": ["shrink=0.5", "alpha=0.1", "steps=2"]}
SMALL |= {"out": ["", "out/x", "out/new/ä", "out/--"], "checkpoint": ["", "out/y", "out/new/x.pt", "out/x"]}
BAD = ["", " ", "0", "nan", "inf", "-inf", "-1", "-1e-9", "1e9", "1e30", "1e300", str(10**30), "9" * 5000]
BAD += ["ä", "--", "-", "0x1", "1,5", "%s", "None", "kept", "/", "x\ny", "x\x1b[2J", "x" * 300, "\udcff"]
FILES = [
    "out",
    "out/x.json/",
    "out/x.json.state",
    "out/" + "x" * 300,
    "kept",
    "kept/list/x",
    "kept/pipe",
    "/proc/x",
]
FOREIGN = {"list": "[]", "numbers": '{"config": 1, "data": 2}', "deep": "[" * 100_000, "empty": ""}
SETTINGS = [
    f"{key}={value}" for key in ("noise", "floor", "alpha", "steps", "chunk", "keep", "") for value in BAD
]
WORST = {"cache": ["cache/" + "x" * 300, "kept/list", "kept/list/x", "/proc"], "set": SETTINGS}
WORST |= {"out": [*FILES, *(f"kept/{name}" for name in FOREIGN)], "checkpoint": FILES}


def options(values_of):
    """One option of the command line, as one word or two, with one of the values of its field."""

    def written(field):
        flag = "--" + field.name.replace("_", "-")
        return [words for v in values_of(field) for words in ([flag, v], [f"{flag}={v}"])] or [[flag]]

    return st.sampled_from(fields(baselines.Config)).flatmap(lambda field: st.sampled_from(written(field)))


def small(field):
    """Values that are valid, at least without other options, and that take no time."""
    numbers = {int: ["2", "3", "9"], float: ["0.1", "0.5"]}.get(type(field.default), [])
    return SMALL.get(field.name) or field.metadata["choices"] or numbers


def bad(field):
    """Values at the bounds, out of them, and nonsense."""
    low, *large = (f"{field.metadata['low']:.15g}", f"{field.metadata['high']:.15g}", str(10**9), str(10**12))
    takes_its_time = field.name in ("epochs", "image_size")
    return WORST.get(field.name) or [low, *([] if takes_its_time else large), *BAD]


def ended(argv):
    """How the call ends: its status, its output and its errors, but for the lines that tell of progress."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hangs"))
        signal.alarm(60)
        try:
            status = baselines.main(argv)
        except SystemExit as exit:
            status = exit.code
        finally:
            signal.alarm(0)
    err = err.getvalue().encode(errors="backslashreplace").decode()  # as of the real one
    return status, out.getvalue(), re.sub(r".* % of the test set\n", "", err)


def strict(text):
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@examples(60, phases=[Phase.explicit, Phase.generate])
@given(st.lists(options(small), max_size=4), st.lists(options(bad), max_size=1))
@example([["--method=sp"]], [["--set=noise=1e39"]])
@example([["--method=dash"]], [["--set=floor=1e300"]])
@example([["--method=fire"]], [[f"--set=steps={10**30}"]])
@example([["--method=fisher"]], [[f"--set=chunk={10**30}"]])
@example([["--dataset=folder"]], [["--cache=/proc"]])
@example([], [["--out=kept/numbers"]])
@example([], [["--out=kept/deep"]])
@example([], [["--out=out/x.json/"]])
@example([], [["--out=/proc/x"]])
@example([], [["--checkpoint=out/x.json"]])
@example([], [["--checkpoint=out/x.json.state"]])
@example([], [["--seed=--"]])
@example([], [["--keep-momentum", "x\x1b[2J"]])
def test_any_command_line_works_or_is_refused_in_one_line(good, bad):
    argv = [*TINY, *(word for words in good + bad for word in words)]
    apart = [part for word in argv for part in (word.split("=", 1) if word[:2] == "--" else [word])]
    given = dict(zip(apart, [*apart[1:], ""], strict=True))
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        folder(Path("kept/data"))
        Path("out").mkdir()
        Path("out/.x.swp").touch()  # an editor's
        for name, text in FOREIGN.items():
            Path("kept", name).write_text(text)
        os.mkfifo("kept/pipe")
        before = contents("out", "cache")
        status, out, err = ended(argv)
        assert contents("out", "cache") == before and [*Path().rglob(".*")] == [Path("out/.x.swp")]
        if status:
            assert status in (1, 2) and out == "" and len(err) > 1 and err[:-1].isprintable(), err
        else:
            assert err == "" and out.count("\n") == 1 and Path(given.get("--checkpoint", "")).exists()
            if given["--out"]:
                assert strict(Path(given["--out"]).read_text())["totals"] == strict(out)
                assert ended(argv) == (0, out, "")  # read, not run again
