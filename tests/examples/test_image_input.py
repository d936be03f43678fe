"""Bad input to the example: one sentence that names the flag, the rule and what was given; never a traceback."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.image_classification.__main__ import main

pytestmark = pytest.mark.slow

REPO = Path(__file__).parents[2]
# eight images a class to split, one novel, one epoch of one router
TINY = (
    "--samples-per-class=8 --novel=1 --epochs=1 --seeds=1 --batch-size=8 --dim=4 --hidden=4 --image-size=8 --routers=baseline"
)
QUICK = TINY.split()


def photos(root: Path, **classes: int) -> Path:
    generator = np.random.default_rng(0)
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number:03}.png")
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("input")
    photos(root / "good", ant=10, bee=12)
    photos(root / "single", ant=10)
    photos(root / "few", ant=10, bee=7, cow=3)
    photos(root / "hollow", ant=10, bee=0)
    for name, broken in (("limit", 2), ("above", 3)):
        photos(root / name, ant=100, bee=100)
        for number in range(broken):
            (root / name / "bee" / f"{number:03}.png").write_bytes(b"no image")
    # brackets mean a style to the terminal's library
    (root / "limit" / "bee" / "001.png").rename(root / "limit" / "bee" / "scan [old].png")
    (root / "empty").mkdir()
    (root / "bare" / "ant").mkdir(parents=True)
    (root / "flat").mkdir()
    (root / "flat" / "loose.png").write_bytes((root / "good" / "ant" / "000.png").read_bytes())
    (root / "file").write_text("a file")
    return root


def each(names: str, values: str, says: str) -> list[tuple[str, str]]:
    """The same rule for several flags and values."""
    return [(f"--{name} {value}", says.format(name=name, value=value)) for name in names.split() for value in values.split()]


# flags; how the sentence goes on after "error: ", as a regular expression
RULES = [
    *each("layers experts dim hidden seeds epochs", "0 -3", "--{name} must be at least 1, got {value}$"),
    *each("batch-size novel oneshot-steps", "0 -3", "--{name} must be at least 1, got {value}$"),
    ("--batch-size 1", "--batch-size must be at least 2 .*, got 1$"),
    ("--anchor -1", "--anchor must be at least 0, got -1$"),
    *each("image-size samples-per-class", "0 7", "--{name} must be at least 8, got {value}$"),
    *each("image-size", "1025 1000000000", "--{name} must be at most 1024, got {value}$"),
    *each("lr oneshot-lr", "0.0 -0.1 inf nan", "--{name} must be a finite number above 0, got {value}$"),
    *each("alpha beta", "-0.1 inf nan", "--{name} must be a finite number of at least 0, got {value}$"),
    *each("temperature", "0.0 -1.0 inf nan", '--{name} must be a finite number above 0, or "auto", got {value}$'),
    ("--scope layer", "--scope must be one of all, experts, path, got layer$"),
    ("--oneshot-optimizer rmsprop", "--oneshot-optimizer must be one of adam, sgd, got rmsprop$"),
    ("--augment crop", "--augment must be one of none, shift, flip, got crop$"),
    ("--stem-norm layer", "--stem-norm must be one of batch, none, got layer$"),
    ("--prototypes near", "--prototypes must be one of random, data, got near$"),
    ("--metric manhattan", "--metric must be one of euclidean, sqeuclidean, cosine, dot, got manhattan$"),
    ("--routers baseline magic", "--routers must be any of baseline, clustering, spectral, .*, got magic$"),
    ("--routers spectral spectral", "--routers must be each named once, got spectral spectral$"),
    *each("sigma-target", "-1.0 inf nan", "sigma_target must be .* at least 0, got sigma_target={value} .*--{name}"),
    ("--relative --sigma-target 0", "sigma_target must be above 0 when relative=True.*--sigma-target"),
    *each("rank-target", "0.5 -1.0 nan", "rank_target must be at least 1.*got rank_target={value} .*--{name}"),
    ("--rank-target 2.5", "rank_target must be at most .* = 2, .* got rank_target=2.5 .*--rank-target"),
    ("--rank-target 3.5 --experts 8 --dim 3", "rank_target must be at most .* = 3, .* got rank_target=3.5 .*--dim"),
]  # fmt: skip
DATA = [
    ("--data {root}/nowhere", r"--data must be mnist, cifar10 or a folder, got .*nowhere, which is no folder$"),
    ("--data {root}/file", r"--data must be .* a folder, got .*file, which is no folder$"),
    ("--data {root}/empty", r".*empty must hold one subfolder of images for each class \(.*\), got no image in it$"),
    ("--data {root}/bare", r".*bare must hold .* got no image in it$"),
    ("--data {root}/flat", r".*flat must hold one subfolder .* got no image in it$"),
    ("--data {root}/single", r"the data must have at least two classes, got ant in .*single$"),
    ("--data {root}/good --classes bee", r"the data must have at least two classes, got bee in .*good$"),
    ("--data {root}/good --classes ant wasp fly", r"--classes must be among ant, bee, got wasp, fly$"),
    (
        "--data {root}/few --samples-per-class 9 --novel 1",
        r"every class needs at least 10 images \(9 to split and 1 novel\), got 7 in class 'bee'; .*--novel",
    ),
    ("--data {root}/few --classes ant cow", r"every class needs at least 9 images .*, got 3 in class 'cow'"),
    ("--data {root}/good --novel 3", r"every class needs at least 11 images \(8 to split and 3 novel\), got 10 in class 'ant'"),
    ("--data {root}/hollow", r"every class needs at least 9 images .*, got 0 in class 'bee'"),
    (
        "--data {root}/above",
        r"at most 1% of the images may be unreadable, got 3 of 200, the first bee.000\.png; mend them, save them as",
    ),
    ("--data {root}/good --device tpu9", r"--device must be one that PyTorch can use here, got tpu9: "),
    ("--data {root}/good --device cuda:99", r"--device must be one that PyTorch can use here, got cuda:99: "),
    # a device that holds no numbers; to run on the CPU instead, and not say so, would be wrong as well
    ("--data {root}/good --device meta", r"--device must be one that PyTorch can use here: auto, cpu or cuda, got meta"),
    (
        "--data {root}/good --dim 1000000000",
        r"the network must fit into memory, got [\d,]+ parameters, which take [\d,]+ GiB in training, where there are [\d,]+; "
        "lower --dim, --hidden, --experts or --layers$",
    ),
    ("--data {root}/good --experts 1000000000 --hidden 1000000", r"the network must fit into memory, got [\d,]+ parameters"),
    ("--data {root}/good --out {root}/file", r"cannot write .*file"),
    ("--data {root}/good --out {root}/file/below", r"cannot write .*file.below"),
]


def sentence(stderr: str) -> str:
    """The one line that is there, without its "error: "."""
    (line,) = [line for line in stderr.splitlines() if line.strip()]
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


@pytest.mark.parametrize(("flags", "says"), RULES, ids=[flags for flags, _ in RULES])
def test_settings_out_of_range(flags, says, tmp_path, capsys):
    out = tmp_path / "out"
    # a folder that is missing: were the rule not checked first, its error would come instead
    assert main(["--data", str(tmp_path / "missing"), "--out", str(out), *flags.split()]) == 1
    printed = capsys.readouterr()
    assert re.match(says, sentence(printed.err))
    assert printed.out == ""
    assert not out.exists()


@pytest.mark.parametrize(("flags", "says"), DATA, ids=[flags for flags, _ in DATA])
def test_data_device_and_folder_that_cannot_be_used(flags, says, root, tmp_path, capsys):
    arguments = [*QUICK, "--out", str(tmp_path / "out"), *flags.format(root=root).split()]
    assert main(arguments) == 1
    printed = capsys.readouterr()
    assert re.match(says, sentence(printed.err))
    assert printed.out == ""


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--epochs 1.5", "argument --epochs: invalid int value: '1.5'"),
        ("--lr fast", "argument --lr: invalid float value: 'fast'"),
        ("--temperature warm", "argument --temperature: invalid number or 'auto' value: 'warm'"),
        ("--sigma-target auto", "argument --sigma-target: invalid number or 'initial' value: 'auto'"),
        ("--rank-target full", "argument --rank-target: invalid float value: 'full'"),
        ("--routers", "argument --routers: expected at least one argument"),
        ("--preset table9", "argument --preset: invalid choice: 'table9'"),
        ("--optimiser sgd", "unrecognized arguments: --optimiser"),
    ],
)
def test_arguments_that_cannot_be_parsed(flags, says, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(flags.split())
    assert stopped.value.code == 2
    assert f"error: {says}" in capsys.readouterr().err


def test_exactly_one_unreadable_percent_is_allowed_and_told(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("examples.image_classification.figures.draw", lambda *_: [])
    assert main([*QUICK, "--data", str(root / "limit"), "--out", str(tmp_path)]) == 0
    told = capsys.readouterr().err.splitlines()
    assert any(line.startswith("skipped 2, read ") for line in told)
    lines = [line for line in told if "not readable" in line]
    assert [Path(line.split(": ")[1]).name for line in lines] == ["000.png", "scan [old].png"]


def test_compile_without_a_compiler(root, tmp_path, capsys, monkeypatch):
    def fail(function):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nand a long story")

    monkeypatch.setattr("torch.compile", fail)
    assert main([*QUICK, "--data", str(root / "good"), "--out", str(tmp_path / "out"), "--compile"]) == 1
    told = sentence(capsys.readouterr().err)
    assert re.match(
        r"--compile needs a compiler that torch can use .*got none: Failed to find C compiler.*leave --compile out$", told
    )
    assert not (tmp_path / "out").exists()


def test_presets_need_more_images_than_the_embedded_ones(capsys, tmp_path):
    assert main(["--preset", "table2", "--out", str(tmp_path / "out")]) == 1
    assert re.match(
        r"every class needs at least 1625 images .*, got 500 in class '3'; add images, or lower",
        sentence(capsys.readouterr().err),
    )


def test_a_mistyped_folder_does_not_use_up_the_output_folder(root, tmp_path, capsys, monkeypatch):
    # the corrected command must not be told that a run is there already
    monkeypatch.setattr("examples.image_classification.figures.draw", lambda *_: [])
    assert main([*QUICK, "--data", str(root / "god"), "--out", str(tmp_path)]) == 1
    assert main([*QUICK, "--data", str(root / "good"), "--out", str(tmp_path)]) == 0


def test_overwrite_with_a_mistyped_folder_deletes_nothing(root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("examples.image_classification.figures.draw", lambda *_: [])
    assert main([*QUICK, "--data", str(root / "good"), "--out", str(tmp_path)]) == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(before) >= 5
    assert main([*QUICK, "--data", str(root / "god"), "--out", str(tmp_path), "--overwrite"]) == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_the_command_itself_ends_with_status_1_and_one_line(root, tmp_path):
    command = [sys.executable, "-m", "examples.image_classification", "--data", str(root / "nowhere"), "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    assert sentence(done.stderr).endswith("nowhere, which is no folder")
