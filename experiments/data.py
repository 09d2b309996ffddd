"""Data sets beyond those of lure.py, image folders and restricted ImageNet, and parts of any of them.

Enters: the name and the folder of a data set. Leaves: a `lure.Dataset`, and decoded images in a cache.
"""

import hashlib
import json
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset
from torchvision.transforms.functional import pil_to_tensor, resize
from tqdm import tqdm

import lure
from experiments.command import DataError
from experiments.files import load, write
from lure import Dataset

FOLDERS = ("folder", "restricted-imagenet")
RESTRICTED_IMAGENET = {  # balanced; inclusive ranges of the index of the 1000 sorted class folders
    "bird": (10, 14), "turtle": (33, 37), "lizard": (42, 46), "spider": (72, 76), "crab": (118, 122),
    "dog": (200, 204), "cat": (281, 285), "big cat": (286, 290), "beetle": (302, 306),
    "butterfly": (322, 326), "monkey": (371, 374), "fish": (393, 397), "fruit": (948, 952),
    "fungus": (992, 996),
}  # fmt: skip


def load_dataset(
    name: str, data="data", cache=".cache", image_size=0, limit=0, limit_test=0, shots=0
) -> Dataset:
    """Load one of `LOADERS` from the folder `data`, where torchvision also downloads the CIFARs to.

    Images become squares of side `image_size`; 0: those of folders of side 32, the others as `lure` has them.
    `limit`, `limit_test`: a stratified sample of so many images; `shots`: of so many training images of each
    class; 0: all. The choice is the same every time. DataError if the data are not as they should be.
    """
    return part_of(load_whole(name, data, cache, image_size), name, image_size, limit, limit_test, shots)


def load_whole(name: str, data: str, cache: str, image_size: int) -> Dataset:
    """All images of a data set; those of folders in the size asked for, the others in their own."""
    return LOADERS[name](name, Path(data), Path(cache), image_size)


def load_by_lure(name: str, root: Path, cache: Path, image_size: int) -> Dataset:
    try:
        return lure.load_dataset(name, str(root))
    except OSError as error:
        raise DataError(error) from error


def part_of(whole: Dataset, name: str, image_size=0, limit=0, limit_test=0, shots=0) -> Dataset:
    """The images of a data set that are asked for, in the size that is asked for."""
    labels, classes = whole.labels, whole.classes
    fewest = int(labels.bincount(minlength=len(classes)).min())
    if fewest < shots:
        raise DataError(f"--shots {shots}: a class of {name} has only {fewest} training images")
    train, test = torch.arange(len(labels)), torch.arange(len(whole.test_labels))
    if limit or shots or name in FOLDERS:  # a folder's images come class by class
        train = stratified(labels, shots * len(classes) or limit or len(labels), equal=shots > 0)
    if limit_test or name in FOLDERS:
        test = stratified(whole.test_labels, limit_test or len(test))
    images, test_images = (x.contiguous() for x in (whole.images[train], whole.test_images[test]))
    if image_size and images.shape[1:3] != (image_size, image_size):
        images, test_images = resized(images, image_size), resized(test_images, image_size)
    return whole._replace(
        images=images, labels=labels[train], test_images=test_images, test_labels=whole.test_labels[test]
    )


def stratified(labels: Tensor, size: int, equal: bool = False) -> Tensor:
    """Indices of a fixed random sample, the classes in proportion to their sizes, or in `equal` numbers."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    rank = torch.empty(len(labels))
    for c in labels.unique():
        members = order[labels[order] == c]
        rank[members] = (torch.arange(len(members)) + 0.5) / (1 if equal else len(members))
    return rank.argsort(stable=True)[:size]


def resized_as(config, shape: tuple[int, ...], images: Tensor) -> Tensor:
    """Images, uint8 (N, H, W, C), in the shape of a run's, as `load_dataset` has them: folders by Pillow."""
    if images.shape[1:3] == shape:
        return images
    if config.dataset not in FOLDERS:
        return resized(images, shape[0])
    height, width = shape
    pictures = [Image.fromarray(image) for image in images.numpy()]
    small = [picture.resize((width, height), Image.Resampling.BILINEAR) for picture in pictures]
    return torch.stack([pil_to_tensor(picture) for picture in small]).permute(0, 2, 3, 1)


def resized(images: Tensor, side: int) -> Tensor:
    return resize(images.permute(0, 3, 1, 2), [side, side]).permute(0, 2, 3, 1).contiguous()


# ------------------------------------------------------------ Image folders
ENDINGS = (*IMG_EXTENSIONS, ".gif", ".jfif")
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")


def load_folders(name: str, root: Path, cache: Path, image_size: int) -> Dataset:
    """Read root/<split>/<class>/<image>, decoded once and cached by what the files hold.

    What begins with a dot is skipped; files of other endings are told on stderr.
    """
    samples, classes = [], []
    others: Counter[str] = Counter()
    for split in ("train", "test") if name == "folder" else ("train", "val"):
        try:
            folders = [folder for folder in find_classes(str(root / split))[0] if folder[0] != "."]
            label_of = {folder: label for label, folder in enumerate(folders)}
            if name == "restricted-imagenet":
                if len(folders) != 1000:
                    raise OSError(f"{root / split} has {len(folders)} class folders, not ImageNet's 1000")
                ranges = enumerate(RESTRICTED_IMAGENET.values())
                label_of = {f: label for label, (a, b) in ranges for f in folders[a : b + 1]}
                folders = list(RESTRICTED_IMAGENET)
            refuse_loops(root / split / folder for folder in label_of)
            is_image = partial(is_an_image, root / split, others)
            samples.append(make_dataset(str(root / split), label_of, is_valid_file=is_image))
        except (OSError, ValueError) as error:
            reason = str(error)
            if isinstance(error, OSError) and error.filename:
                reason = f"{error.filename}: {error.strerror}"
            source = "" if name == "folder" else ", ILSVRC 2012 from image-net.org"
            raise DataError(f"{reason}; expected {root}/{split}/<class>/<image>{source}") from error
        classes.append(folders)
    if odd := sorted(set(classes[0]) ^ set(classes[1])):
        raise DataError(f"{root}: expected every class in both splits, {odd[0]!r} is in one only")
    paths, labels = zip(*samples[0], *samples[1], strict=True)
    decoded = decoded_once(paths, root, cache, image_size or 32).permute(0, 2, 3, 1)
    if others:
        told = ", ".join(f"{number} {ending or 'without one'}" for ending, number in sorted(others.items()))
        print(f"{root}: left out, of other endings than those of images: {told}", file=sys.stderr)
    sizes = [len(s) for s in samples]
    (train, test), (train_labels, test_labels) = decoded.split(sizes), torch.tensor(labels).split(sizes)
    return Dataset(train, train_labels, test, test_labels, classes[0])


def is_an_image(root: Path, others: Counter[str], path: str) -> bool:
    """By its ending, which `others` counts if it is none of an image; what begins with a dot is neither."""
    if any(part[0] == "." for part in Path(path).relative_to(root).parts):
        return False
    ending = Path(path).suffix.lower()
    if ending in ENDINGS:
        return True
    others[ending] += 1
    return False


def refuse_loops(folders: Iterable[Path]) -> None:
    """DataError for a folder that a link leads to again: its images would be read twice, or for ever."""
    reached = set()
    for path, *_ in (step for folder in folders for step in os.walk(folder, followlinks=True)):
        if (real := os.path.realpath(path)) in reached:
            raise DataError(f"{path}: expected a folder of its own, found {real} again")
        reached.add(real)


def decoded_once(paths: Sequence[str], root: Path, cache: Path, size: int) -> Tensor:
    """The images, uint8 (N, 3, size, size), from the cache or decoded into it."""
    digest = hashlib.sha256(json.dumps([3, size, *identity(paths, root)]).encode())  # 3: of `decode_image`
    stored = cache / f"{root.resolve().name}-{size}-{digest.hexdigest()[:16]}.pt"
    if not stored.exists():
        with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:  # more would be slower
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # a huge image
            images = pool.map(partial(decode_image, size=size), paths)
            progress = tqdm(images, f"decode {root}", len(paths), disable=None)
            pixels, highest = zip(*progress, strict=True)
        refuse_dark(paths, highest)
        write(stored, partial(torch.save, torch.stack(pixels)))
    try:
        decoded = load(stored, mmap=True)
        if decoded.dtype != torch.uint8 or decoded.shape != (len(paths), 3, size, size):
            raise ValueError
    except Exception as error:
        raise DataError(f"{stored}: expected decoded images; remove it ({type(error).__name__})") from error
    return decoded


LARGEST = 2**30  # bytes of all images up to which the cache goes by what they hold


def identity(paths: Sequence[str], root: Path) -> list:
    """What tells these images from all others: what they hold, or if that is much, which files they are."""
    below = [os.path.relpath(path, root) for path in paths]
    stats = [os.stat(path) for path in paths]
    if sum(stat.st_size for stat in stats) > LARGEST:
        files = [(stat.st_size, stat.st_ino, stat.st_ctime_ns) for stat in stats]
        return [str(root.resolve()), below, files]
    return [*zip(below, map(digest_of, paths), strict=True)]


def digest_of(path: str) -> str:
    if not os.path.isfile(path):  # a pipe would be waited for
        raise DataError(f"{path}: expected an image, it is no file")
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError as error:
        raise DataError(f"{path}: expected an image, cannot read it ({error})") from error


def decode_image(path: str, size: int) -> tuple[Tensor, int]:
    """The pixels, uint8 (3, size, size), the right way up, and the highest value of 16 bits, else 0."""
    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            raise ValueError("it is no file")
        with Image.open(path, formats=FORMATS) as file:
            image = ImageOps.exif_transpose(file)
            highest = 0
            if image.mode[0] == "I" and (image.mode != "I" or file.format in ("PNG", "PPM")):
                # Of 16 bits; `convert` would cut off what is above 255.
                wide = image.convert("I")
                highest = int(np.asarray(wide).max())
                image = wide.point(lambda value: value / 257)
            elif image.mode in ("I", "F"):
                raise ValueError("it has 32 bits a channel, expected 8 or 16")
            small = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    except Exception as error:  # a foreign file can make a decoder raise anything
        raise DataError(f"{path}: expected an image, cannot decode it ({error})") from error
    return pil_to_tensor(small), highest


def refuse_dark(paths: Sequence[str], highest: Sequence[int]) -> None:
    """DataError for images of 16 bits of which none has a value above 4095: they are of 8 or 12 bits."""
    wide = [path for path, value in zip(paths, highest, strict=True) if value]
    if wide and max(highest) <= 4095:
        raise DataError(
            f"{wide[0]}: expected values up to 65535 in images of 16 bits, found none above {max(highest)} "
            f"in {len(wide)} of them; rescale them"
        )


LOADERS: dict[str, Callable[[str, Path, Path, int], Dataset]] = {  # name, folder, cache, side of the images
    "digits": load_by_lure,
    "cifar10": load_by_lure,
    "cifar100": load_by_lure,
    "folder": load_folders,
    "restricted-imagenet": load_folders,
}
