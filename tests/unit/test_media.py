"""Inputs from files and values, results as files: what is read and written, and what is said where it cannot be."""

from __future__ import annotations

import json
import sys
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fewstep import cli, media
from fewstep.bundle.contract import InputSpec, OutputSpec
from fewstep.errors import ContractError
from tests.support.bundles import built, plain

IMAGE = InputSpec("image", "image", (1, 3, 4, 6))
LABEL = InputSpec("label", "class", (1,), 10)
PROMPT = InputSpec("prompt", "text")
SPECS = (PROMPT, IMAGE, LABEL)
RNG = np.random.default_rng(0)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture, red on the left and blue on the right."""
    pixels = np.zeros((8, 12, 3), np.uint8)
    pixels[:, :6, 0] = pixels[:, 6:, 2] = 255
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_inputs_are_read_and_resized(photo: Path) -> None:
    given = media.read_inputs(SPECS, [f"image={photo}", "label=7"])
    assert given["label"].tolist() == [7]
    assert (given["image"].dtype, given["image"].shape) == (np.float32, (1, 3, 4, 6))
    # One level: the filter rings a little at the edge between the colours.
    np.testing.assert_allclose(given["image"][0, :, 0, 0], [1, 0, 0], atol=1.1 / 255)
    np.testing.assert_allclose(given["image"][0, :, 3, 5], [0, 0, 1], atol=1.1 / 255)


def test_one_channel_takes_grey(photo: Path) -> None:
    grey = media.read_picture(photo, InputSpec("mask", "image", (1, 1, 8, 12)))
    assert grey.shape == (1, 1, 8, 12)
    assert grey[0, 0, 0, 0] == pytest.approx(76 / 255)  # ITU-R 601: 0.299 of red


def test_sixteen_bits_keep_their_range(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 32896, np.uint16)).save(tmp_path / "deep.png")
    grey = media.read_picture(tmp_path / "deep.png", InputSpec("depth", "image", (1, 1, 4, 4)))
    assert grey[0, 0] == pytest.approx(128 / 255)


def test_orientation_of_a_photo_is_followed(tmp_path: Path) -> None:
    upright = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    upright.save(tmp_path / "turned.png", exif=exif)
    values = media.read_picture(tmp_path / "turned.png", InputSpec("x", "image", (1, 1, 4, 6)))
    assert values[0, 0, 0, 0] == pytest.approx(23 / 255)


@pytest.mark.parametrize(
    ("given", "text", "hint"),
    [
        (["image"], "input 'image' has no value", "write NAME=FILE for a picture"),
        (["label=1", "label=2"], "input label is given twice", "give each input once"),
        (["imag=x.png"], "unknown input 'imag', this generator takes image (a picture", "did you mean 'image'?"),
        (["prompt=a cat"], "unknown input 'prompt', this generator takes", "leave it out"),
        (
            ["label=1"],
            "input image is missing, this generator takes image (a picture [1, 3, 4, 6]",
            "--input image=FILE",
        ),
        (["image=none.png", "label=1"], "image: none.png does not exist", "give --input image=FILE"),
        (["image={text}", "label=1"], "is not a picture that can be read", "give a PNG, JPEG or WebP file"),
        (["image={folder}", "label=1"], "is not a picture that can be read", "give a PNG, JPEG or WebP file"),
        (["image={photo}", "label=dog"], "label is 'dog', expected the number of a class", "the largest is 9"),
        (["image={photo}", "label=10"], "label is 10, expected 0 to 9", "classes are counted from 0"),
        (["image={photo}", "label=-1"], "label is -1, expected 0 to 9", "classes are counted from 0"),
        (["image={photo}"], "input label is missing", "--input label=NUMBER"),
    ],
    ids=lambda value: str(value),
)
def test_inputs_that_are_refused(tmp_path: Path, photo: Path, given: list[str], text: str, hint: str) -> None:
    (tmp_path / "notes.txt").write_text("no picture")
    places = {"text": tmp_path / "notes.txt", "folder": tmp_path, "photo": photo}
    with pytest.raises(ContractError) as caught:
        media.read_inputs(SPECS, [value.format(**places) for value in given])
    assert text in caught.value.message
    assert hint in str(caught.value.hint)


def test_channels_that_no_file_has(photo: Path) -> None:
    with pytest.raises(ContractError, match="image takes 4 channels, expected 1 or 3"):
        media.read_picture(photo, InputSpec("image", "image", (1, 4, 8, 8)))


def test_picture(tmp_path: Path) -> None:
    values_HWC = RNG.random((4, 6, 3), dtype=np.float32)
    media.write_output(tmp_path / "new" / "x.png", values_HWC, OutputSpec())
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "new" / "x.png")), np.rint(values_HWC * 255))
    media.write_output(tmp_path / "grey.PNG", values_HWC[..., :1], OutputSpec())
    assert np.asarray(Image.open(tmp_path / "grey.PNG")).shape == (4, 6, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["grey.PNG", "new"]


@pytest.mark.parametrize("channels", [1, 2])
def test_sound(tmp_path: Path, channels: int) -> None:
    values_CS = np.clip(RNG.standard_normal((channels, 100)), -2, 2).astype(np.float32)
    media.write_output(tmp_path / "x.wav", values_CS, OutputSpec("audio", rate=16000))
    with wave.open(str(tmp_path / "x.wav")) as file:
        assert (file.getnchannels(), file.getframerate(), file.getsampwidth()) == (channels, 16000, 2)
        samples = np.frombuffer(file.readframes(200), "<i2").reshape(-1, channels).T
    np.testing.assert_array_equal(samples, np.rint(np.clip(values_CS, -1, 1) * 32767))
    media.write_output(tmp_path / "y.wav", values_CS, OutputSpec("audio", rate=16000), rate=8000)
    with wave.open(str(tmp_path / "y.wav")) as file:
        assert file.getframerate() == 8000


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (1, 0, 2, 3)], ids=["frames first", "channels first"])
@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_video(tmp_path: Path, order: tuple[int, ...], suffix: str) -> None:
    values_FCHW = np.rint(RNG.random((5, 3, 4, 6))).astype(np.float32)
    media.write_output(tmp_path / f"x{suffix}", values_FCHW.transpose(order), OutputSpec("video"))
    with Image.open(tmp_path / f"x{suffix}") as movie:
        assert getattr(movie, "n_frames", 1) == 5
        for k in range(5):
            movie.seek(k)
            frame = np.asarray(movie.convert("RGB"))
            np.testing.assert_array_equal(frame, values_FCHW[k].transpose(1, 2, 0) * 255)


def test_depth(tmp_path: Path) -> None:
    values = RNG.random((1, 4, 6), dtype=np.float32)
    media.write_output(tmp_path / "x.png", values, OutputSpec("depth"))
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.mode == "I;16"
        np.testing.assert_array_equal(np.asarray(picture), np.rint(values[0] * 65535))


@pytest.mark.parametrize("kind", ["picture", "audio", "video", "depth"])
def test_numbers_of_anything(tmp_path: Path, kind: str) -> None:
    values = RNG.standard_normal((2, 3, 4)).astype(np.float32)
    media.write_output(tmp_path / "x.npy", values, OutputSpec(kind))
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), values)


@pytest.mark.parametrize(
    ("name", "output", "rate", "text", "hint"),
    [
        ("x.jpg", OutputSpec(), None, "x.jpg: picture cannot be written as '.jpg', expected .png or .npy", "-o x.png"),
        ("x", OutputSpec("video"), None, "video cannot be written as 'a file without suffix'", "-o x.png"),
        ("x.png", OutputSpec("audio"), None, "audio cannot be written as '.png', expected .wav or .npy", "-o x.wav"),
        ("x.wav", OutputSpec("audio"), None, "does not say how many samples its sound has in a second", "give --rate"),
        ("x.png", OutputSpec("depth"), 8000, "a rate is given for depth, expected it for sound", "leave --rate out"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_files_that_are_refused(
    tmp_path: Path, name: str, output: OutputSpec, rate: int | None, text: str, hint: str
) -> None:
    with pytest.raises(ContractError) as caught:
        media.write_output(tmp_path / name, np.zeros((1, 4, 6), np.float32), output, rate)
    assert text in caught.value.message
    assert hint in str(caught.value.hint)
    assert list(tmp_path.iterdir()) == []


def test_values_that_a_file_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ContractError, match=r"depth is 0 to 7, expected 0 to 1"):
        media.write_output(tmp_path / "x.png", np.array([[[0.0, 7.0]]]), OutputSpec("depth"))
    with pytest.raises(ContractError, match=r"x\.wav: the result is not finite"):
        media.write_output(tmp_path / "x.wav", np.array([np.nan]), OutputSpec("audio", rate=8000))
    assert list(tmp_path.iterdir()) == []


# --- the command


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs ``fewstep generate`` in this process and returns its status, stdout and stderr."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fewstep", "generate", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        captured = capfd.readouterr()
        return int(exit_.value.code or 0), captured.out, " ".join(captured.err.split())

    return call


def test_command_with_inputs_and_no_prompt(generate: Run, photo: Path, tmp_path: Path) -> None:
    bundle, out = plain(), tmp_path / "out.png"
    options = ("--input", f"image={photo}", "--input", "class_label=3", "--seed", 2, "-o")
    status, stdout, stderr = generate(bundle.path, *options, out, "--json")
    assert status == 0, stderr
    assert json.loads(stdout) == {"picture": str(out), "prompts": [""], "seed": 2, "steps": 2}
    status, *_ = generate(bundle.path, *options, tmp_path / "out.npy")
    assert status == 0
    given = media.read_inputs(bundle.manifest.contract.inputs, [f"image={photo}", "class_label=3"])
    sample = bundle.generate(seed=2, inputs=given)
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), sample.output)
    np.testing.assert_array_equal(np.asarray(Image.open(out)), np.rint(sample.output * 255))


def test_grid_of_examples(generate: Run, tmp_path: Path) -> None:
    status, _, stderr = generate(plain().path, "--grid", "-o", tmp_path / "grid.png")
    assert status == 0, stderr
    assert np.asarray(Image.open(tmp_path / "grid.png")).std() > 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--input", "class_label=3"], "input image is missing, this generator takes image (a picture [1, 3, 8, 12]"),
        (["a cat"], "this bundle takes no PROMPT; `fewstep inspect` lists its inputs"),
        (["--input", "label=3"], "unknown input 'label'"),
    ],
    ids=["missing", "prompt", "unknown"],
)
def test_command_refuses(generate: Run, tmp_path: Path, arguments: list[str], text: str) -> None:
    status, stdout, stderr = generate(plain().path, *arguments, "-o", tmp_path / "x.png")
    assert (status, stdout) == (2, "")
    assert text in stderr
    assert list(tmp_path.iterdir()) == []


def test_wrong_suffix_is_told_before_drawing(generate: Run, tmp_path: Path) -> None:
    status, _, stderr = generate(built("lcm").bundle.path, "a cat", "-o", tmp_path / "x.wav")
    assert status == 2
    assert "x.wav: picture cannot be written as '.wav', expected .png or .npy hint: -o x.png" in stderr
    status, _, stderr = generate(built("lcm").bundle.path, "a cat", "--input", "image=x.png", "-o", tmp_path / "x.png")
    assert "unknown input 'image', this generator takes nothing beside a prompt" in stderr


def test_python_says_the_same() -> None:
    with pytest.raises(ContractError, match="input image is missing") as caught:
        plain().generate(inputs={"class_label": np.array([1])})
    assert "from Python inputs={'image': array}" in str(caught.value)
    wrong = {"image": np.zeros((1, 3, 8, 8)), "class_label": np.array([1])}
    with pytest.raises(ContractError, match=r"image is \[1, 3, 8, 8\], expected \[1, 3, 8, 12\] in \[0, 1\]"):
        plain().generate(inputs=wrong)
