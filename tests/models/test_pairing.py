"""Pairing of tokens, against tokens whose values say where they come from, and against torch's own interpolation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fdscale import UserError
from fdscale.models.pairing import pair

KINDS = {"cls": 100.0, "dist": 200.0, "reg": 300.0}


def tokens(prefix, grid):
    """(1, L, 1): prefix tokens carry the number of their kind plus their rank in it, the grid its row-major place."""
    ranks = [prefix[:place].count(kind) for place, kind in enumerate(prefix)]
    values = [KINDS[kind] + rank for kind, rank in zip(prefix, ranks, strict=True)]
    return torch.tensor([*values, *range(grid[0] * grid[1])], dtype=torch.float32).view(1, -1, 1)


@pytest.mark.parametrize(
    ("student", "teacher", "kept"),
    [
        ((), (), []),
        ((), ("cls", "reg", "reg"), []),
        (("cls",), (), []),
        (("cls",), ("cls",), [100.0]),
        (("cls",), ("cls", "reg", "reg", "reg", "reg"), [100.0]),
        (("cls",), ("cls", "dist"), [100.0]),
        (("reg", "cls"), ("cls", "reg", "reg"), [300.0, 100.0]),
        (("cls", "reg", "reg", "reg"), ("cls", "reg", "reg"), [100.0, 300.0, 301.0]),
    ],
)
def test_prefix_tokens_are_paired_by_kind_and_the_rest_dropped(student, teacher, kept):
    pairing = pair(student, (2, 3), teacher, (2, 3))
    expected = [*kept, *range(6)]
    assert pairing.align_student(tokens(student, (2, 3))).flatten().tolist() == expected
    assert pairing.align_teacher(tokens(teacher, (2, 3))).flatten().tolist() == expected


def test_grids_that_differ_are_an_error_that_names_both_and_the_key():
    with pytest.raises(UserError, match=r"7 x 7.*14 x 14.*teacher\.resample: bilinear \| bicubic \| area"):
        pair((), (7, 7), ("cls",), (14, 14))
    with pytest.raises(UserError, match=r"2 x 8.*4 x 4"):  # the same number of tokens is not the same grid
        pair((), (2, 8), (), (4, 4))


def test_unknown_resampling_is_an_error_even_where_it_would_not_be_used():
    with pytest.raises(UserError, match=r"nearest.*bilinear, bicubic, area"):
        pair((), (7, 7), (), (7, 7), resample="nearest")


def test_area_is_the_mean_of_the_covered_cells():
    features = torch.randn(2, 1 + 4 * 6, 5)
    aligned = pair(("cls",), (2, 3), ("cls",), (4, 6), resample="area").align_teacher(features)
    cells = features[:, 1:].reshape(2, 2, 2, 3, 2, 5).mean(dim=(2, 4)).reshape(2, 6, 5)
    torch.testing.assert_close(aligned, torch.cat([features[:, :1], cells], dim=1))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("new", "old"), [((3, 5), (6, 4)), ((6, 6), (3, 3))])
def test_interpolation_is_torchs_antialiased_one_of_the_map(mode, new, old):
    features = torch.randn(2, old[0] * old[1], 5)
    aligned = pair((), new, ("cls",), old, resample=mode).align_teacher(
        torch.cat([torch.zeros(2, 1, 5), features], dim=1)
    )
    maps = features.reshape(2, *old, 5).permute(0, 3, 1, 2)
    expected = F.interpolate(maps, size=new, mode=mode, antialias=True).permute(0, 2, 3, 1).reshape(2, -1, 5)
    torch.testing.assert_close(aligned, expected)


def test_equal_grids_are_not_touched_by_resampling():
    features = torch.randn(1, 6, 4)
    assert torch.equal(pair((), (2, 3), (), (2, 3), resample="bicubic").align_teacher(features), features)


def test_gradients_reach_every_paired_student_token():
    student = torch.randn(1, 3 + 4, 2, requires_grad=True)
    pair(("cls", "reg", "reg"), (2, 2), ("cls",), (2, 2)).align_student(student).sum().backward()
    assert student.grad[0, :, 0].tolist() == [1, 0, 0, 1, 1, 1, 1]


def test_a_token_count_that_was_not_paired_is_refused():
    with pytest.raises(AssertionError, match="student"):
        pair((), (2, 2), (), (2, 2)).align_student(torch.zeros(1, 5, 3))
