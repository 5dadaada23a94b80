"""The CUDA kernels: their source emulated on a CPU, and the library that nvcc makes of it."""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
import sys
import zipfile
from functools import partial

import pytest
import torch
from cases import ADVERSARIAL, assert_as_exact_as_eager, gradients, leaves_of, random_inputs
from helpers import ROOT, outside

from fdscale import UserError
from fdscale.bench.attention import official
from fdscale.kernels import attention, build, compiled, reference
from fdscale.kernels.attention import window_attention
from fdscale.models import swin_v2
from fdscale.models.layers import initialise

attend = partial(window_attention, by="cuda")
pytestmark = pytest.mark.slow


def results(function, leaves, dtype) -> list[torch.Tensor]:
    out = function(*leaves)
    return [out, *gradients(out, leaves, dtype)]


def error(x: torch.Tensor, exact: torch.Tensor) -> float:
    return ((x.double() - exact).norm() / exact.norm()).nan_to_num(math.inf).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ADVERSARIAL)
def test_the_error_is_at_most_one_and_a_half_times_that_of_eager_autocast(emulated, case, dtype):
    assert_as_exact_as_eager(attend, case, dtype, wide_sums=False)


# window, windows down and across, shift, heads, images: every window of SwinV2's published models and of larger images
WINDOWS = [
    *((6, 1, 1, 0, 3, 2), (7, 2, 3, 3, 2, 1), (8, 3, 2, 4, 2, 1), (12, 1, 1, 0, 2, 3), (12, 2, 2, 6, 1, 1)),
    *((14, 1, 1, 0, 1, 1), (16, 1, 2, 0, 2, 1), (16, 2, 1, 0, 1, 1), (20, 1, 1, 0, 1, 1), (24, 1, 1, 0, 1, 1)),
    *((32, 1, 1, 0, 1, 1), (40, 1, 1, 0, 1, 1)),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("window", "down", "across", "shift", "heads", "batch"), WINDOWS)
def test_every_window_equals_the_official_formula(emulated, window, down, across, shift, heads, batch, dtype):
    """As near to it as the official code under autocast, and no number of the inputs' gradients is left out."""
    if (window, dtype) == (40, torch.float16):
        pytest.skip("a minute for what bfloat16 shows")
    qkv, table, scale = random_inputs(batch, (down * window, across * window), heads, 32, window)
    data = (qkv.to(dtype), table.float(), scale.float())
    exact, eager, ours = leaves_of(*(x.double() for x in data)), leaves_of(*data), leaves_of(*data)
    expected = results(lambda *x: official(*x, window, shift), exact, dtype)
    with torch.autocast("cpu", dtype=dtype):
        theirs = results(lambda *x: official(*x, window, shift), eager, dtype)
    mine = results(lambda *x: attend(*x, (window, window), (shift, shift)), ours, dtype)
    for name, e, t, m in zip(("out", "qkv", "table"), expected, theirs, mine, strict=False):
        assert error(m, e) <= 1.5 * error(t, e), name
    # A sum of numbers of both signs over all windows: its error is compared where there are many (the test above).
    assert (mine[3].double() - expected[3]).abs().max() <= 0.05 * expected[3].abs().max() + 0.5


# map, window, shift: not square, padded, within one window, shifted along one axis
MAPS = [
    *(((8, 8), (4, 4), (0, 0)), ((8, 12), (4, 4), (2, 2)), ((6, 12), (2, 6), (1, 3)), ((4, 8), (4, 4), (0, 2))),
    *(((7, 10), (4, 4), (2, 2)), ((9, 5), (4, 3), (2, 1)), ((2, 3), (4, 5), (0, 0)), ((20, 26), (12, 12), (6, 6))),
    *(((16, 40), (16, 8), (0, 4)), ((10, 33), (5, 17), (2, 0)), ((24, 16), (12, 16), (0, 0))),
]


@pytest.mark.parametrize("mask", ["-100", "-inf"])
@pytest.mark.parametrize(("size", "window", "shift"), MAPS)
def test_every_map_equals_the_reference(emulated, size, window, shift, mask):
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, *size, 3 * 2 * 32, generator=generator).half()
    table = 16 * torch.rand(2, 2 * window[0] - 1, 2 * window[1] - 1, generator=generator)
    data = (qkv, table, torch.tensor([1.5, 9.0]))
    exact, ours = leaves_of(*(x.double() for x in data)), leaves_of(*data)
    expected = results(lambda *x: window_attention(*x, window, shift, mask=mask), exact, torch.float16)
    mine = results(lambda *x: attend(*x, window, shift, mask=mask), ours, torch.float16)
    for e, m in zip(expected[:3], mine[:3], strict=True):
        assert error(m, e) <= 6e-3
    assert mine[3][0].item() == pytest.approx(expected[3][0].item(), rel=0.02, abs=0.05)
    assert mine[3][1] == 0  # beyond the clamp


def test_it_repeats_to_the_bit_in_whatever_order_threads_run(emulated):
    qkv, table, scale = random_inputs(2, (24, 24), 2, 32, 12)
    data = (qkv.bfloat16(), table.float(), scale.float())
    found = []
    for seed in range(4):
        emulated.emulator_seed(seed)
        found.append(results(lambda *x: attend(*x, (12, 12), (6, 6)), leaves_of(*data), torch.bfloat16))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_torch_finds_no_fault_in_the_op(emulated):
    qkv, table, scale = random_inputs(1, (16, 16), 2, 32, 8)
    data, arguments = (qkv.bfloat16(), table.float(), scale.float()), ((8, 8), (4, 4), "-100", "cuda")
    op = torch.ops.fdscale.window_attention.default
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op, (*leaves_of(*data), *arguments), test_utils=utils)
    out, lse = op(*data, *arguments)
    backward = torch.ops.fdscale.window_attention_backward.default
    torch.library.opcheck(backward, (torch.ones_like(out), *data, out, lse, *arguments), test_utils=utils)


def test_maps_that_do_not_begin_at_16_bytes_and_gradients_that_are_not_contiguous(emulated):
    qkv, table, scale = random_inputs(1, (8, 8), 2, 32, 8)
    wide = torch.zeros(qkv.numel() + 1, dtype=torch.bfloat16)
    wide[1:] = qkv.flatten()
    leaves = leaves_of(table.float(), scale.float())
    maps = [wide[1:].view(qkv.shape).requires_grad_(), qkv.bfloat16().requires_grad_()]
    assert maps[0].data_ptr() % 16
    found = []
    for x in maps:
        out = attend(x, *leaves, (8, 8), (0, 0))
        found.append(torch.autograd.grad(out, [x, *leaves], torch.ones_like(out[..., :1]).expand_as(out)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_other_dtypes_and_heads_are_not_for_these_kernels():
    for channels, dtype, expected in ((32, "bfloat16", True), (32, "float32", False), (44, "float16", False)):
        qkv = torch.zeros(1, 4, 4, 3 * 2 * channels, dtype=getattr(torch, dtype))
        assert compiled.has_kernels(qkv, 2) is expected


def test_a_window_that_is_too_large_is_refused_by_name(emulated):
    qkv, scale = torch.zeros(1, 8, 2000, 96).bfloat16(), torch.zeros(1)
    with pytest.raises(UserError, match=r"window \(8, 2000\), 1 heads\): more shared memory than an A100 has"):
        attend(qkv, torch.zeros(1, 15, 3999), scale, (8, 2000), (0, 0))


def test_layouts_cover_a_window_with_few_empty_slots():
    for side in (6, 7, 8, 12, 14, 16, 20, 24, 32, 40):
        for masked in (False, True):
            layout = compiled.layout_of((side, side), masked)
            slots = compiled.slots_of((side, side), (side, side), (0, 0), layout, torch.device("cpu"))
            tokens = slots.tokens[0]
            assert sorted(tokens[tokens >= 0].tolist()) == list(range(side * side))
            assert layout.warps * layout.groups * 2 * layout.tall == layout.columns * layout.rows
            assert len(tokens) <= 1.8 * side * side
            # A patch's tokens are neighbours: 8 x 1 or 4 x 2.
            y, x = tokens.view(-1, 8) // side, tokens.view(-1, 8) % side
            whole = (tokens.view(-1, 8) >= 0).all(1)
            assert ((y.amax(1) - y.amin(1))[whole] == 8 // layout.patch - 1).all()
            assert ((x.amax(1) - x.amin(1))[whole] == layout.patch - 1).all()


@pytest.mark.parametrize("side", [8, 12, 16, 20, 24, 32, 40])
def test_the_biases_of_two_patches_depend_on_their_displacement_alone(side):
    """What the kernels rest upon: 8 x 8 tiles of the bias matrix are equal where the patches are equally far apart."""
    layout = compiled.layout_of((side, side), False)
    tokens = compiled.slots_of((side, side), (side, side), (0, 0), layout, torch.device("cpu")).tokens[0]
    cells = reference.displacements((side, side), torch.device("cpu"))
    patches = tokens.view(layout.columns, layout.rows, 8)[:, : side * layout.patch // 8]  # those with tokens
    seen: dict[tuple[int, int], torch.Tensor] = {}
    for x, y in itertools.product(range(layout.columns), range(patches.shape[1])):
        for other_x, other_y in itertools.product(range(layout.columns), range(patches.shape[1])):
            tile = cells[patches[x, y].long()[:, None], patches[other_x, other_y].long()]
            assert torch.equal(seen.setdefault((x - other_x, y - other_y), tile), tile)
    assert len(seen) == (2 * layout.columns - 1) * (2 * patches.shape[1] - 1)


def test_where_it_is_not_built_it_says_how(monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "LIBRARY", tmp_path / "none.so")
    compiled.library.cache_clear()
    with pytest.raises(UserError, match=r"memory\.kernels is cuda.*python -m fdscale\.kernels\.build.*choose auto"):
        attention.choose("cuda", torch.device("cuda"))
    (tmp_path / "none.so").write_text("not a library")
    compiled.library.cache_clear()
    with pytest.raises(UserError, match="its library cannot be loaded"):
        attention.choose("cuda", torch.device("cuda"))


def test_without_nvcc_the_build_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("NVCC", str(tmp_path / "nvcc"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="install NVIDIA's CUDA toolkit"):
        build.build(tmp_path / "out.so")


def test_setup_builds_the_library_into_the_wheel_and_it_loads(tmp_path, monkeypatch):
    """Without a GPU it says so. Without FDSCALE_BUILD_CUDA nothing is built, and the sources come along."""
    try:
        build.find_nvcc()
    except SystemExit as reason:
        pytest.skip(str(reason))
    source = tmp_path / "source"
    shutil.copytree(ROOT / "fdscale", source / "fdscale", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("slurm", "ds_configs"):
        shutil.copytree(ROOT / name, source / name)
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", str(source)]
    files = {}
    for asked in ("0", "1"):
        out = tmp_path / asked
        env = outside() | {"FDSCALE_BUILD_CUDA": asked}
        done = subprocess.run([*command, "-w", str(out)], capture_output=True, text=True, timeout=600, env=env)
        assert done.returncode == 0, done.stderr[-4000:]
        (wheel,) = out.iterdir()
        assert wheel.name.endswith("none-any.whl") is (asked == "0")
        zipfile.ZipFile(wheel).extractall(out / "files")
        files[asked] = {path.relative_to(out / "files").as_posix() for path in (out / "files").rglob("*.*")}
    library = "fdscale/kernels/libfdscale_cuda.so"
    assert {path for path in files["1"] - files["0"] if "dist-info" not in path} == {library}
    assert "fdscale/kernels/cuda/forward.cu" in files["0"]
    monkeypatch.setattr(compiled, "LIBRARY", tmp_path / "1" / "files" / library)
    compiled.library.cache_clear()
    assert compiled.cannot_run(torch.device("cpu")) == "it needs an NVIDIA GPU"
    if not torch.cuda.is_available():
        qkv, table, scale = random_inputs(1, (8, 8), 1, 32, 8)
        with pytest.raises(UserError, match=r"window attention by cuda failed .*(driver|device)"):
            compiled.forward(qkv.bfloat16(), table.float(), scale.float(), (8, 8), (0, 0), reference.MASKED)
    compiled.library.cache_clear()


def losses(function, monkeypatch, autocast: bool = True) -> torch.Tensor:
    """Of a small SwinV2 that learns to tell 8 random pictures apart, with a function for its attention."""
    monkeypatch.setattr(swin_v2, "window_attention", function)
    sizes = {"img_size": 32, "embed_dim": 32, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4}
    model = swin_v2.SwinV2(**sizes, drop_path_rate=0.0, pretrained_window_sizes=(0, 0), post_norm_init=1.0)
    torch.manual_seed(0)
    initialise(model, 0)
    head = torch.nn.Linear(64, 8)
    images, found = torch.rand(8, 3, 32, 32), []
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=2e-4)
    for _ in range(40):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = torch.nn.functional.cross_entropy(head(model(images).mean(1)).float(), torch.arange(8))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return torch.tensor(found)


def test_training_with_it_follows_float32_as_nearly_as_the_official_code_does(emulated, monkeypatch):
    exact = losses(window_attention, monkeypatch, autocast=False)
    eager = losses(lambda *x, **_: official(*x[:3], x[3][0], x[4][0]), monkeypatch)
    ours = losses(lambda *x, **_: attend(*x), monkeypatch)
    assert exact[-1] < exact[0] / 2
    assert (ours - exact).abs().mean() <= 1.5 * (eager - exact).abs().mean()
