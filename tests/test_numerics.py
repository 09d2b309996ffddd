"""What runs compute stays what it was, on every processor.

What comes from integers is compared exactly: data, stream, the order of samples, augmentation, masks. What is
drawn or computed as floating-point numbers is compared in float64, in which processors differ by some 1e-13
(x86 with and without AVX, one thread and two); in float32 even `normal_` and `uniform_` differ.

    python tests/test_numerics.py FOLDER > tests/bits.json    # what the code in FOLDER computes
"""

import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image

if __name__ == "__main__":
    sys.path.insert(0, str(Path(sys.argv[1]).resolve()))

import baselines
import lure

pytestmark = pytest.mark.numerics

ALL = "--arch small --mega-batches 3 --epochs 1 --lr 0.003 --precision float32 --device cpu"
DIGITS = f"{ALL} --dataset digits --image-size 16 --limit 120 --limit-test 60"
OWN = f"{ALL} --dataset folder --data pictures --cache cache"
SPECIAL = "--lr 0.01 --momentum 0.5 --keep-momentum --weight-decay 0.5 --batch-size 16"
RUNS = {
    "warm-start": f"{DIGITS} --epochs 5 --mega-batches 2 --batch-size 16",
    "lure": f"{DIGITS} --method lure --pi next",
    "lure of a folder": f"{OWN} --method lure --pi seen --keep 0.6 --image-size 8",
    "released": f"{DIGITS} --method released",
    "sp": f"{DIGITS} --method sp --replay buffer --buffer-size 9 --label-noise 0.3 {SPECIAL}",
    "llf": f"{DIGITS} --method llf",
    "rifle": f"{DIGITS} --method rifle",
    "ke": f"{DIGITS} --method ke",
    "fisher": f"{DIGITS} --method fisher",
    "magnitude": f"{DIGITS} --method magnitude",
    "random": f"{DIGITS} --method random --replay none --seed 2",
    "dash": f"{OWN} --method dash --select best-val --epochs 2 --batch-size 16 --image-size 16",
    "fire": f"{OWN} --method fire --shots 7 --val-fraction 0.2 --epochs 2 --gamma 0.5 --set steps=5"
    " --batch-size 8",
    "scratch": f"{DIGITS} --method scratch --val-fraction 0.3",
}


def pictures(root: Path):
    """Two classes of 20 and 5 noisy PNGs of 12×10 pixels, the same wherever they are made."""
    for split, count in (("train", 20), ("test", 5)):
        for i, kind in ((i, kind) for i in range(count) for kind in (0, 1)):
            noise = hashlib.shake_256(f"{split} {kind} {i}".encode()).digest(12 * 10 * 3)
            path = root / split / "ab"[kind] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.frombytes("RGB", (12, 10), bytes(value // 2 + 60 * kind for value in noise)).save(path)


@contextlib.contextmanager
def in_float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def measured(words: list[str]) -> dict:
    """What a run measures in float64 and ends with, and hashes of what it does with integers."""
    order = hashlib.sha256()
    views = hashlib.sha256()
    augmented = lure.augmented

    def noting(pixels, index, *rest):
        made = augmented(pixels, index, *rest)
        order.update(index.numpy().tobytes())
        views.update((made * 255).round().to(torch.uint8).contiguous().numpy().tobytes())
        return made

    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch, in_float64():
        patch.chdir(place)
        patch.setattr(lure, "augmented", noting)
        pictures(Path("pictures"))
        with contextlib.redirect_stdout(io.StringIO()):
            assert baselines.main([*words, "--out", "x.json", "--checkpoint", "x.pt"]) == 0
        record = json.loads(Path("x.json").read_text())
        weights = torch.load("x.pt", weights_only=True)["weights"]
    rows = record["mega_batches"]
    for row in rows:
        del row["seconds"]
    return {
        "data": record["data"]["sha256"],
        "order": order.hexdigest(),
        "views": views.hexdigest(),
        "rows": rows,
        "weights": torch.cat([tensor.double().flatten() for tensor in weights.values()]).norm().item(),
    }


def integers() -> dict:
    """Hashes of streams and of masks."""

    def digest(*tensors):
        return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()

    found = {}
    for replay in ("full", "buffer", "none"):
        generator = torch.Generator().manual_seed(3)
        stream = lure.mega_batches(1003, 4, replay, 50, 0.1, generator)
        vals = stream[-1:] if replay == "full" else stream  # under full replay it is of all so far
        parts = [part for batch in stream for part in (batch.train, batch.new)]
        found[f"stream, {replay}"] = digest(*parts, *(batch.val for batch in vals))
    scores = {f"w{i}": torch.arange(7 * i).reshape(i, 7) * 37 % 11 / 8 for i in (3, 1, 4)}
    for keep in (0.01, 0.5, 0.8):
        found[f"mask, {keep}"] = digest(*lure.top_k_mask(scores, keep).values())
    return found


KEPT = json.loads((Path(__file__).parent / "bits.json").read_text()) if __name__ != "__main__" else {}


def flat(value, name="") -> dict:
    """The numbers and words of nested dictionaries and lists, by their path."""
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list):
        parts = enumerate(value)
    else:
        return {name: value}
    return {path: leaf for key, part in parts for path, leaf in flat(part, f"{name}/{key}").items()}


def split(leaves: dict) -> tuple[dict, dict]:
    """What was computed as floating-point numbers, and the rest."""
    numbers = {path: leaf for path, leaf in leaves.items() if isinstance(leaf, float)}
    return numbers, {path: leaf for path, leaf in leaves.items() if path not in numbers}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_measures_what_it_always_did(name):
    kept, exact = split(flat(KEPT[name]))
    found, found_exact = split(flat(measured(RUNS[name].split())))
    assert found_exact == exact
    assert found == pytest.approx(kept, rel=1e-9, abs=1e-10)


def test_what_comes_from_integers_is_what_it_always_was():
    assert integers() == KEPT["integers"]


def test_images_of_another_size_are_within_a_grey_level_of_exact_interpolation():
    # As float32 has it, so that processors may differ where a value lies between two levels.
    from experiments.data import resized

    images = torch.randint(256, (5, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    exact = torch.nn.functional.interpolate(
        images.permute(0, 3, 1, 2).double(), size=(12, 12), mode="bilinear", antialias=True
    )
    found = resized(images, 12).permute(0, 3, 1, 2)
    assert found.dtype == torch.uint8 and (found.double() - exact).abs().max() <= 1


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    result = {name: measured(words.split()) for name, words in RUNS.items()}
    print(json.dumps({"integers": integers()} | result, indent=0))
