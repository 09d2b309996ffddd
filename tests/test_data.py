"""Data sets from files: folders, a fake ImageNet, parts of any data set, hostile images, damaged caches."""

import io
import json
import os
import pickle
import re
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zlib
from pathlib import Path

import pytest
import torch
from conftest import ROOT, examples, seeded
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import baselines
import evaluate
import lure
from experiments import data as data_module
from experiments.data import DataError, load_dataset, stratified
from experiments.files import write

pytestmark = pytest.mark.filterwarnings("error")
REAL = Path(os.environ.get("LURE_TEST_DATA") or "-")


def picture(path, color=(10, 200, 30), size=(9, 7), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes, told apart by colour, 20 training and 5 test images of each, of several kinds."""
    kinds = (("png", "RGB"), ("bmp", "RGB"), ("png", "RGBA"), ("PNG", "L"), ("png", "P"))
    for split, count in (("train", 20), ("test", 5)):
        for i in range(count):
            suffix, mode = kinds[i % 5]
            for name, value in (("bright", 250 - i), ("dark", i)):
                picture(tmp_path / "f" / split / name / f"{i:03}.{suffix}", (value,) * 3, mode=mode)
    (tmp_path / "f" / "train" / "dark" / "notes.txt").write_text("not an image, and not read")
    return tmp_path / "f"


def load(folder, tmp_path, **more):
    return load_dataset("folder", str(folder), str(tmp_path / "cache"), **{"image_size": 8} | more)


# ------------------------------------------------------------ Folders
def test_a_folder_is_of_any_images(folder, tmp_path):
    data = load(folder, tmp_path)
    assert data.classes == ["bright", "dark"] and data.images.dtype == torch.uint8
    assert data.images.shape == (40, 8, 8, 3) and data.test_images.shape == (10, 8, 8, 3)
    assert data.images.is_contiguous() and data.test_images.is_contiguous()
    assert torch.equal(data.images.float().mean(dim=(1, 2, 3)) < 128, data.labels == 1)
    assert torch.equal(data.test_images.float().mean(dim=(1, 2, 3)) < 128, data.test_labels == 1)
    assert load(folder, tmp_path, image_size=0).images.shape == (40, 32, 32, 3)
    assert (data.padding, data.flip) == (4, True)


def test_an_image_keeps_its_rows_columns_and_channels(tmp_path):
    for split in ("train", "test"):
        picture(path := tmp_path / "f" / split / "a" / "1.png", (0, 0, 0), size=(4, 4))
        image = Image.open(path)
        image.putpixel((3, 1), (7, 8, 9))  # column 3, row 1
        image.save(path)
    image = load(tmp_path / "f", tmp_path, image_size=4).images[0]
    assert image[1, 3].tolist() == [7, 8, 9] and int(image.sum()) == 24


def test_a_folder_is_decoded_once_and_again_when_it_changes(folder, tmp_path, monkeypatch):
    decoded, real = [], data_module.decode_image
    monkeypatch.setattr(data_module, "decode_image", lambda path, size: decoded.append(1) or real(path, size))
    first, again = load(folder, tmp_path), load(folder, tmp_path)
    assert len(decoded) == 50 and all(torch.equal(a, b) for a, b in zip(first[:4], again[:4], strict=True))
    load(folder, tmp_path, image_size=4)
    assert len(decoded) == 100
    picture(folder / "test" / "dark" / "001.bmp", (99, 99, 99))
    os.utime(folder / "test" / "dark" / "001.bmp", ns=(1, 1))
    changed = load(folder, tmp_path)
    assert len(decoded) == 150 and 99 in changed.test_images[changed.test_labels == 1][:, 0, 0, 0]
    time.sleep(0.01)
    os.utime(folder / "test" / "dark" / "001.bmp")  # the same content
    load(folder, tmp_path)
    assert len(decoded) == 150
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".pt"]


@given(st.integers(0, 2**32 - 1), st.sampled_from(["content", "order", "name"]))
@examples(10)
def test_a_cache_never_stands_for_other_images_of_the_same_names_sizes_and_times(seed, change):
    """Two folders of one name, or one of which an image is replaced by one of the same size and time."""
    with tempfile.TemporaryDirectory() as place:
        one, two = (Path(place, name, "photos") for name in ("one", "two"))
        shades = torch.randint(256, (8,), generator=seeded(seed)).tolist()
        for root in (one, two):
            for i, shade in enumerate(shades):
                picture(root / ("train" if i < 4 else "test") / "ab"[i % 2] / f"{i}.bmp", (shade,) * 3)
        files = sorted(two.glob("*/*/*.bmp"))
        if change == "content":
            picture(files[seed % 8], ((shades[seed % 8] + 1) % 256,) * 3)
        elif change == "order":
            contents = [file.read_bytes() for file in files]
            for file, content in zip(files, contents[1:] + contents[:1], strict=True):
                file.write_bytes(content)
        else:
            files[0].rename(files[0].with_name("9.bmp"))
        for file in (*one.glob("*/*/*.bmp"), *two.glob("*/*/*.bmp")):
            os.utime(file, ns=(1, 1))
        for root in (one, two, one):
            cached = load_dataset("folder", root, f"{place}/cache", 8)
            afresh = load_dataset("folder", root, f"{place}/{root.parent.name}-{time.monotonic_ns()}", 8)
            assert all(torch.equal(a, b) for a, b in zip(cached[:4], afresh[:4], strict=True))


def test_above_a_gigabyte_the_cache_goes_by_which_files_they_are(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "LARGEST", 100)
    decoded, real = [], data_module.decode_image
    monkeypatch.setattr(data_module, "decode_image", lambda path, size: decoded.append(1) or real(path, size))
    load(folder, tmp_path)
    load(folder, tmp_path)
    assert len(decoded) == 50
    path = folder / "test" / "dark" / "001.bmp"
    times = path.stat()
    copy = path.with_name("copy")
    picture(copy.with_suffix(".bmp"), (99, 99, 99))
    copy.with_suffix(".bmp").replace(path)  # as cp -p: of the same size and time, another file
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    load(folder, tmp_path)
    assert len(decoded) == 100


def test_files_of_other_endings_are_told_and_what_begins_with_a_dot_is_not_read(folder, tmp_path, capsys):
    before = load(folder, tmp_path)
    assert capsys.readouterr().err == f"{folder}: left out, of other endings than those of images: 1 .txt\n"
    for name in (".ipynb_checkpoints/a-checkpoint.png", "._001.png", ".hidden/deeper/x.png"):
        picture(folder / "train" / "dark" / name)
    picture(folder / "train" / ".ipynb_checkpoints" / "x.png")  # no class
    for name in ("a.heic", "b.HEIC", "c.avif", "d"):
        (folder / "train" / "dark" / name).write_text("not read")
    after = load(folder, tmp_path)
    assert after.classes == before.classes and torch.equal(after.images, before.images)
    told = "1 without one, 1 .avif, 2 .heic, 1 .txt"
    assert capsys.readouterr().err.endswith(f" images: {told}\n")
    picture(folder / "train" / "dark" / "e.gif", mode="P")
    picture(folder / "train" / "dark" / "f.jpg")
    (folder / "train" / "dark" / "f.jpg").rename(folder / "train" / "dark" / "f.jfif")
    assert len(load(folder, tmp_path).images) == len(before.images) + 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_stands_upright(orientation, tmp_path):
    upright = Image.new("L", (4, 4))
    for x, y, value in ((0, 0, 250), (3, 0, 150), (0, 3, 50)):
        upright.paste(value, (x, y, x + 1, y + 1))
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that EXIF's undoes
    stored = upright.transpose(turns[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[274] = orientation
    for split in ("train", "test"):
        path = tmp_path / "f" / split / "a" / "1.png"
        path.parent.mkdir(parents=True)
        stored.save(path, exif=exif)
    image = load(tmp_path / "f", tmp_path, image_size=4).images[0, :, :, 0]
    assert (image[0, 0], image[0, 3], image[3, 0]) == (250, 150, 50) and int(image.sum()) == 450


@pytest.mark.parametrize(
    "name, image, words",
    [
        ("x.tif", Image.new("I", (9, 7), 200), "32 bits a channel, expected 8 or 16"),
        ("x.tif", Image.new("F", (9, 7), 0.5), "32 bits a channel, expected 8 or 16"),
        ("x.png", Image.new("I;16", (9, 7), 255), "found none above 255 in 1 of them"),
        ("x.png", Image.new("I;16", (9, 7), 4095), "found none above 4095 in 1 of them"),
    ],
)
def test_an_image_whose_values_would_be_taken_for_others_is_refused(name, image, words, folder, tmp_path):
    path = folder / "train" / "dark" / name
    image.save(path)
    with pytest.raises(DataError, match=re.escape(str(path))) as refusal:
        load(folder, tmp_path)
    assert words in str(refusal.value) and not (tmp_path / "cache").exists()
    if "4095" in words:
        Image.new("I;16", (9, 7), 4096).save(folder / "train" / "bright" / "y.png")
        assert len(load(folder, tmp_path).images) == 42


def test_a_broken_folder_is_one_line_and_leaves_nothing(folder, tmp_path, capsys):
    out, cache = tmp_path / "out.json", tmp_path / "cache"
    options = ["--dataset", "folder", "--arch", "small", "--cache", str(cache), "--out", str(out)]
    options += ["--mega-batches", "2", "--epochs", "1", "--image-size", "8"]

    def refused(root, *words):
        assert baselines.main([*options, "--data", str(root)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and all(word in error for word in words), error
        assert not out.exists() and not cache.exists()

    refused(tmp_path / "missing", "missing/train", "<class>/<image>")
    (folder / "train" / "dark" / "bad.png").write_bytes(b"\x89PNG no more than that")
    refused(folder, "train/dark/bad.png", "cannot decode")
    (folder / "train" / "dark" / "bad.png").unlink()
    (folder / "train" / "empty").mkdir()
    refused(folder, "empty", "<class>/<image>")
    picture(folder / "train" / "empty" / "1.png")
    refused(folder, "'empty'", "both splits")
    picture(folder / "test" / "empty" / "1.png")
    assert baselines.main([*options, "--data", str(folder)]) == 0 and out.exists()


def test_restricted_imagenet_groups_69_of_1000_classes_into_14(tmp_path):
    """Each class has one image a split, whose first two channels tell the class."""
    for split in ("train", "val"):
        for i in range(1000):
            picture(tmp_path / split / f"n{10_000_000 + 7 * i}" / "a.png", (i // 4, i % 4, 0), (2, 2))
    data = load_dataset("restricted-imagenet", tmp_path, tmp_path / "cache", image_size=2)
    assert len(data.classes) == 14 and data.images.shape == (69, 2, 2, 3) and len(data.test_labels) == 69
    assert data.labels.bincount().tolist() == [5] * 10 + [4] + [5] * 3
    index = data.images[:, 0, 0, 0].int() * 4 + data.images[:, 0, 0, 1].int()
    found = {c: sorted(index[data.labels == i].tolist()) for i, c in enumerate(data.classes)}
    assert found["bird"] == [10, 11, 12, 13, 14] and found["monkey"] == [371, 372, 373, 374]
    assert found["dog"] == [200, 201, 202, 203, 204] and found["fungus"] == [992, 993, 994, 995, 996]


def test_an_imagenet_that_is_not_whole_is_refused(folder, tmp_path):
    picture(folder / "val" / "dark" / "1.png")
    with pytest.raises(DataError, match="2 class folders, not ImageNet's 1000"):
        load_dataset("restricted-imagenet", str(folder), str(tmp_path), image_size=8)


# ------------------------------------------------------------ Parts of any data set
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.data())
def test_a_stratified_sample_is_in_proportion_and_always_the_same(sizes, data):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=seeded(len(labels)))]
    size = data.draw(st.integers(1, len(labels)))
    sample = stratified(labels, size)
    assert len(set(sample.tolist())) == len(sample) == size
    assert torch.equal(sample, stratified(labels, size))
    for c, of_class in enumerate(sizes):
        share = of_class / len(labels)
        slack = (1 + len(sizes) * share) / 2  # one where the classes are of one size
        assert abs(int((labels[sample] == c).sum()) - size * share) <= slack + 1e-6


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 20), st.integers(0, 4))
def test_a_stratified_sample_of_equal_classes_is_within_one(classes, of_class, size, extra):
    labels = torch.arange(classes).repeat(of_class + extra)
    size = min(size, len(labels))
    counts = labels[stratified(labels, size)].bincount(minlength=classes)
    assert (counts - size / classes).abs().max() < 1


@given(st.lists(st.integers(3, 9), min_size=1, max_size=5), st.integers(1, 3))
def test_an_equal_sample_has_as_many_of_every_class(sizes, each):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    sample = stratified(labels, each * len(sizes), equal=True)
    assert labels[sample].bincount().tolist() == [each] * len(sizes)
    assert len(set(sample.tolist())) == len(sample)


def test_images_of_any_data_set_are_resized_and_nothing_else_changes():
    whole = load_dataset("digits")
    large, asked = load_dataset("digits", image_size=32), load_dataset("digits", image_size=16)
    assert large.images.shape == (len(whole.images), 32, 32, 1) and large.images.dtype == torch.uint8
    assert large.images.is_contiguous() and large.test_images.shape[1:] == (32, 32, 1)
    assert torch.equal(large.labels, whole.labels) and large[4:] == asked[4:] == whole[4:]
    shrunk = torch.nn.functional.avg_pool2d(large.images.permute(0, 3, 1, 2).float(), 2)
    assert (
        shrunk - whole.images.permute(0, 3, 1, 2)
    ).abs().mean() < 10  # of 255: the same, a little smoother
    assert all(torch.equal(a, b) for a, b in zip(asked[:4], whole[:4], strict=True))


def test_limits_choose_among_the_images_of_the_split():
    whole, part = load_dataset("digits"), load_dataset("digits", limit=100, limit_test=50)
    assert len(part.images) == len(part.labels) == 100
    assert len(part.test_images) == len(part.test_labels) == 50
    assert (part.labels.bincount() - 10).abs().max() <= 1

    def pairs(images, labels):
        return {(x.numpy().tobytes(), int(y)) for x, y in zip(images, labels, strict=True)}

    assert pairs(*part[:2]) <= pairs(*whole[:2]) and pairs(*part[2:4]) <= pairs(*whole[2:4])


def test_shots_are_so_many_of_every_class_whatever_the_limit():
    assert load_dataset("digits", shots=7, limit=9).labels.bincount().tolist() == [7] * 10
    with pytest.raises(DataError, match="--shots 150: a class of digits has only 1"):
        load_dataset("digits", shots=150)


def test_limits_and_shots_of_a_folder(folder, tmp_path):
    data = load(folder, tmp_path, limit=10, limit_test=4)
    assert data.labels.bincount().tolist() == [5, 5] and data.test_labels.bincount().tolist() == [2, 2]
    assert load(folder, tmp_path, shots=3).labels.bincount().tolist() == [3, 3]
    with pytest.raises(DataError, match="only 20"):
        load(folder, tmp_path, shots=21)


def test_what_cannot_be_downloaded_is_an_error_of_the_data(monkeypatch):
    def offline(*args):
        raise OSError("no route to host")

    monkeypatch.setattr(lure, "load_dataset", offline)
    with pytest.raises(DataError, match="no route to host"):
        load_dataset("cifar10")


# ------------------------------------------------------------ Hostile images
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


def black(root):
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
    black(Path("data"))
    return Path("data/train/a")


def refused(capfd, name):
    """The call ends with 1 and one line that has the name, and changes nothing."""
    before = contents()
    assert baselines.main(FOLDER) == 1
    out, err = capfd.readouterr()
    assert out == "" and err[-1:] == "\n" and err[:-1].isprintable() and name in err, err
    assert contents() == before


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
    assert baselines.main(FOLDER) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) and len(err.splitlines()) == 1 and contents("cache", "out") == before
    images = load_dataset("folder", "data", "cache", 8).images
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
    black(Path("other"))
    for path in Path("other").glob("*/*/*.png"):
        path.unlink()
        path.write_bytes(content) if content else os.mkfifo(path)
    script = f"""if True:
        import resource, sys; sys.path.insert(0, {str(ROOT)!r}); import baselines
        for data in ("data", "other"):
            status = baselines.main([*{FOLDER}, "--data", data])
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
    assert baselines.main(FOLDER) == 0
    (stored,) = Path("cache").iterdir()
    stored.write_bytes(content)
    Path("out/x.json").unlink()
    capfd.readouterr()
    refused(capfd, str(stored))


# ------------------------------------------------------------ Files
def test_a_failed_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(file):
        file.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match=r"file: cannot be written \(disk full\)"):
        write(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_what_is_written_is_flushed_to_disk_before_it_is_renamed(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, Path.replace
    size = lambda file: os.fstat(file.fileno()).st_size  # noqa: E731
    monkeypatch.setattr(os, "fsync", lambda file: events.append(size(file)) or fsync(file))
    monkeypatch.setattr(Path, "replace", lambda *paths: events.append("renamed") or replace(*paths))
    write(path := tmp_path / "new" / "file", lambda file: file.write(b"all of it"))
    assert events == [len("all of it"), "renamed"] and path.read_text() == "all of it"


# ------------------------------------------------------------ Real images
@pytest.fixture(scope="module")
def real(tmp_path_factory):
    root = tmp_path_factory.mktemp("real")
    for archive, folder in (("cifar10-jpeg", "cifar10-jpeg"), ("cifar10c-sample", "")):
        with tarfile.open(REAL / f"{archive}.tar.xz") as tar:
            tar.extractall(root / folder, filter="data")
    return root


@pytest.mark.skipif(
    not (REAL / "cifar10-jpeg.tar.xz").is_file(),
    reason="LURE_TEST_DATA names no folder with cifar10-jpeg.tar.xz",
)
def test_the_real_images_train_and_are_measured(real, tmp_path):
    """All of CIFAR-10 as JPEGs, a short run on a part of it, then every metric with the real corruptions."""
    root, cache = str(real / "cifar10-jpeg"), str(tmp_path / "cache")
    everything = load_dataset("folder", root, cache)
    assert everything.images.shape == (50_000, 32, 32, 3) and len(everything.test_labels) == 10_000
    assert everything.labels.bincount().tolist() == [5000] * 10 and everything.classes[0] == "airplane"
    options = ["--method", "lure", "--dataset", "folder", "--data", root, "--cache", cache, "--arch", "small"]
    options += ["--limit", "1000", "--limit-test", "200", "--mega-batches", "2", "--epochs", "3"]
    files = ["--out", f"{tmp_path}/lure-1.json", "--checkpoint", f"{tmp_path}/lure-1.pt"]
    assert baselines.main([*options, *files]) == 0
    totals = json.loads((tmp_path / "lure-1.json").read_text())["totals"]
    few = ["--epsilons", "4", "--sigmas", "0.01", "--cache", cache]
    for more in ([], ["--attack"], ["--corruptions", str(real / "cifar10c-sample")]):
        assert evaluate.main([f"{tmp_path}/lure-1.pt", *few, *more]) == 0
    corrupted = json.loads((tmp_path / "lure-1.corruptions.json").read_text())["corruptions"]
    assert len(corrupted) == 19 + 1 and 0 <= corrupted["mean"] <= 100
    found = json.loads((tmp_path / "lure-1.metrics.json").read_text())
    attacked = json.loads((tmp_path / "lure-1.attack.json").read_text())["pgd"]
    assert found["accuracy"] == pytest.approx(totals["test_accuracy"]) and 0 <= attacked["4/255"] <= 100
