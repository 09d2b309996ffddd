"""Data sets from files: image folders, a fake ImageNet, fake CIFARs, and real images where they are."""

import hashlib
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate
import lure

REAL = Path(os.environ.get("LURE_TEST_DATA") or "-")
needs_real_data = pytest.mark.skipif(
    not REAL.is_dir(), reason="LURE_TEST_DATA does not name a folder with cifar10-jpeg.tar.xz"
)


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
            picture(
                tmp_path / "f" / split / "bright" / f"{i:03}.{suffix}", (250 - i, 250 - i, 250 - i), mode=mode
            )
            picture(tmp_path / "f" / split / "dark" / f"{i:03}.{suffix}", (i, i, i), mode=mode)
    (tmp_path / "f" / "train" / "dark" / "notes.txt").write_text("not an image, and not read")
    return tmp_path / "f"


def load(folder, tmp_path, **more):
    return lure.load_dataset("folder", str(folder), str(tmp_path / "cache"), **{"image_size": 8} | more)


def test_folder_of_any_images(folder, tmp_path):
    data = load(folder, tmp_path)
    assert data.classes == ["bright", "dark"] and data.images.dtype == torch.uint8
    assert data.images.shape == (40, 3, 8, 8) and data.test_images.shape == (10, 3, 8, 8)
    assert torch.equal(data.images.float().mean(dim=(1, 2, 3)) < 128, data.labels == 1)
    assert torch.equal(data.test_images.float().mean(dim=(1, 2, 3)) < 128, data.test_labels == 1)


def test_folder_is_decoded_once_and_again_when_it_changes(folder, tmp_path, monkeypatch):
    decoded = []
    real = lure.decode_image
    monkeypatch.setattr(lure, "decode_image", lambda path, size: decoded.append(path) or real(path, size))
    first, again = load(folder, tmp_path), load(folder, tmp_path)
    assert len(decoded) == 50 and all(torch.equal(a, b) for a, b in zip(first[:4], again[:4], strict=True))
    load(folder, tmp_path, image_size=4)
    assert len(decoded) == 100
    picture(folder / "test" / "dark" / "001.bmp", (99, 99, 99))
    os.utime(folder / "test" / "dark" / "001.bmp", ns=(1, 1))
    changed = load(folder, tmp_path)
    assert len(decoded) == 150 and 99 in changed.test_images[changed.test_labels == 1][:, 0, 0, 0]
    assert not [p for p in (tmp_path / "cache").iterdir() if p.suffix != ".pt"]


def test_limits_and_shots_of_a_folder(folder, tmp_path):
    data = load(folder, tmp_path, limit=10, limit_test=4)
    assert data.labels.bincount().tolist() == [5, 5] and data.test_labels.bincount().tolist() == [2, 2]
    assert load(folder, tmp_path, shots=3).labels.bincount().tolist() == [3, 3]
    with pytest.raises(lure.DataError, match="only 20"):
        load(folder, tmp_path, shots=21)


def test_a_broken_folder_is_one_line_and_leaves_nothing(folder, tmp_path, capsys):
    out = tmp_path / "out.json"
    options = [
        "--dataset",
        "folder",
        "--arch",
        "small",
        "--cache",
        str(tmp_path / "cache"),
        "--out",
        str(out),
    ]
    options += ["--mega-batches", "2", "--epochs", "1", "--image-size", "8"]

    def refused(root, *words):
        assert lure.main([*options, "--data", str(root)]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert all(word in error for word in words), error
        assert not out.exists() and not (tmp_path / "cache").exists()

    refused(tmp_path / "missing", "missing/train", "<class>/<image>")
    (folder / "train" / "dark" / "bad.png").write_bytes(b"\x89PNG no more than that")
    refused(folder, "train/dark/bad.png", "cannot decode")
    (folder / "train" / "dark" / "bad.png").unlink()
    (folder / "train" / "empty").mkdir()
    refused(folder, "empty", "<class>/<image>")
    picture(folder / "train" / "empty" / "1.png")
    refused(folder, "'empty'", "both splits")
    picture(folder / "test" / "empty" / "1.png")
    assert lure.main([*options, "--data", str(folder)]) == 0 and out.exists()


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    """The 1000 class folders of ImageNet, each with one image a split whose red channel tells its index."""
    root = tmp_path_factory.mktemp("imagenet")
    for split in ("train", "val"):
        for i in range(1000):
            picture(root / split / f"n{10_000_000 + 7 * i}" / "a.png", (i // 4, i % 4, 0), (2, 2))
    return root


def test_restricted_imagenet_groups_69_classes_into_14(imagenet, tmp_path):
    data = lure.load_dataset("restricted-imagenet", str(imagenet), str(tmp_path), image_size=2)
    assert len(data.classes) == 14 and data.images.shape == (69, 3, 2, 2) and len(data.test_labels) == 69
    assert data.labels.bincount().tolist() == [5] * 10 + [4] + [5] * 3
    index = data.images[:, 0, 0, 0].int() * 4 + data.images[:, 1, 0, 0].int()
    found = {c: sorted(index[data.labels == i].tolist()) for i, c in enumerate(data.classes)}
    assert found["bird"] == [10, 11, 12, 13, 14] and found["monkey"] == [371, 372, 373, 374]
    assert found["dog"] == [200, 201, 202, 203, 204] and found["fungus"] == [992, 993, 994, 995, 996]


def test_an_imagenet_that_is_not_whole_is_refused(folder, tmp_path):
    picture(folder / "val" / "dark" / "1.png")
    with pytest.raises(lure.DataError, match="2 class folders, not ImageNet's 1000"):
        lure.load_dataset("restricted-imagenet", str(folder), str(tmp_path), image_size=8)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_read_by_torchvision(name, tmp_path, monkeypatch):
    """A CIFAR of 20 images in the original format, with its checksums in place of the real ones."""
    source = getattr(lure.torchvision.datasets, name.upper())
    root, rows = tmp_path / source.base_folder, np.random.default_rng(0).integers(256, size=(20, 3072))
    root.mkdir()

    def stored(filename, content):
        (root / filename).write_bytes(pickle.dumps(content))
        return [filename, hashlib.md5((root / filename).read_bytes()).hexdigest()]

    key = "labels" if name == "cifar10" else "fine_labels"
    classes = [f"class {i}" for i in range(10 if name == "cifar10" else 100)]
    batch = {"data": rows.astype(np.uint8), key: [i % 10 for i in range(20)]}
    monkeypatch.setattr(source, "train_list", [stored("train", batch)])
    monkeypatch.setattr(source, "test_list", [stored("test", batch)])
    filename, digest = stored("meta", {source.meta["key"]: classes})
    monkeypatch.setattr(source, "meta", source.meta | {"filename": filename, "md5": digest})
    data = lure.load_dataset(name, str(tmp_path))
    assert data.classes == classes and data.images.shape == data.test_images.shape == (20, 3, 32, 32)
    first = int((data.images.flatten(1) == torch.from_numpy(rows[7])).all(dim=1).nonzero())
    assert data.labels[first] == 7


def test_cifar_that_cannot_be_downloaded_is_one_line(tmp_path, monkeypatch):
    def offline(*args, **options):
        raise OSError("no route to host")

    monkeypatch.setattr(lure.torchvision.datasets.cifar, "download_and_extract_archive", offline)
    with pytest.raises(lure.DataError, match=r"expected cifar-10-python\.tar\.gz.*no route"):
        lure.load_dataset("cifar10", str(tmp_path))


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    root = tmp_path_factory.mktemp("real")
    for archive, folder in (("cifar10-jpeg", "cifar10-jpeg"), ("cifar10c-sample", "")):
        with tarfile.open(REAL / f"{archive}.tar.xz") as tar:
            tar.extractall(root / folder, filter="data")
    return root


@needs_real_data
def test_the_real_images_train_and_are_measured(real, tmp_path):
    """All of CIFAR-10 as JPEGs, a short run on a part of it, then every metric with the real corruptions."""
    everything = lure.load_dataset("folder", str(real / "cifar10-jpeg"), str(tmp_path / "cache"))
    assert everything.images.shape == (50_000, 3, 32, 32) and len(everything.test_labels) == 10_000
    assert everything.labels.bincount().tolist() == [5000] * 10 and everything.classes[0] == "airplane"
    options = [
        "--dataset",
        "folder",
        "--data",
        str(real / "cifar10-jpeg"),
        "--cache",
        str(tmp_path / "cache"),
    ]
    options += [
        "--arch",
        "small",
        "--limit",
        "1000",
        "--limit-test",
        "200",
        "--mega-batches",
        "2",
        "--epochs",
        "3",
    ]
    assert (
        lure.main([*options, "--out", f"{tmp_path}/lure-1.json", "--checkpoint", f"{tmp_path}/lure-1.pt"])
        == 0
    )
    totals = json.loads((tmp_path / "lure-1.json").read_text())["totals"]
    assert totals["test_accuracy"] > 15  # chance is 10
    few = ["--epsilons", "4", "--sigmas", "0.01", "--cache", str(tmp_path / "cache")]
    corruptions = ["--corruptions", str(real / "cifar10c-sample")]
    for more in ([], ["--attack"], corruptions):
        assert evaluate.main([str(tmp_path / "lure-1.pt"), *few, *more]) == 0
    corrupted = json.loads((tmp_path / "lure-1.corruptions.json").read_text())["corruptions"]
    assert len(corrupted) == 19 + 1 and 5 < corrupted["mean"] < 100
    found = json.loads((tmp_path / "lure-1.metrics.json").read_text())
    attacked = json.loads((tmp_path / "lure-1.attack.json").read_text())["pgd"]
    assert attacked["4/255"] < found["accuracy"]
