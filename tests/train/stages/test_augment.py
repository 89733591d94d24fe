"""Augmentation against closed forms: a Gaussian goes where the labels say, pixels move exactly, zero labels change no bit."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from uni_instruct.errors import RequestError
from uni_instruct.train.stages.augment import AUGMENT_LABELS, Augmentation, AugmentPipe

X_FLIP, Y_FLIP, SCALE, COS, SIN, ALONG, ACROSS, X_SHIFT, Y_SHIFT = range(AUGMENT_LABELS)

# Labels -> where EDM's own pipe (NVlabs/edm, training/augment.py) takes the centre of mass of the blob in `blob_of_edm`, in
# pixels right of and below the centre of the image. Its filter bends phases by up to a tenth of a pixel.
MOVED_BY_EDM = {
    "x-flip": ({X_FLIP: 1.0}, (-5.0, -3.0)),
    "y-flip": ({Y_FLIP: 1.0}, (5.0, 3.0)),
    "scale": ({SCALE: 1.0}, (5.751, -3.440)),
    "rotation": ({COS: -0.2352, SIN: 0.6442}, (1.912, -5.559)),
    "stretch": ({ALONG: 0.8105, ACROSS: 1.2622}, (5.231, -4.283)),
    "squeeze": ({ALONG: -0.8105, ACROSS: -1.2622}, (4.988, -1.845)),
    "translation": ({X_SHIFT: 0.6, Y_SHIFT: -0.4}, (8.0, -4.6)),
    "all": (
        {X_FLIP: 1, SCALE: -0.8, COS: -1.4161, SIN: 0.9093, ALONG: 0.9904, ACROSS: -0.6776, X_SHIFT: 0.5, Y_SHIFT: 0.4},
        (-7.136, 9.140),
    ),
}


@pytest.mark.parametrize(("labels", "centre"), MOVED_BY_EDM.values(), ids=MOVED_BY_EDM)
def test_centre_of_mass_moves_as_in_edm(labels: dict[int, float], centre: tuple[float, float]) -> None:
    x, y = centred(32, 40)
    moved = augmentation(labels)(gaussian(32, 40, torch.tensor([5.0, -3.0]).double(), 1.5**2 * torch.eye(2).double()))
    found = [((moved * axis).sum() / moved.sum()).item() for axis in (x, y)]
    assert found == pytest.approx(centre, abs=0.12)


def test_gaussian_becomes_the_gaussian_that_the_labels_say() -> None:
    """N(m, C) under x -> L x + t is N(L m + t, L C L^T), with L and t composed here from the parameters behind the labels."""
    height, width = 192, 240
    labels = AugmentPipe(probability=1).draw(32, torch.Generator().manual_seed(0)).labels
    labels[:, X_SHIFT:] /= 2  # keeps all of every blob inside
    mean, covariance = torch.tensor([14.0, -10.0]).double(), torch.tensor([[80.0, 24.0], [24.0, 48.0]]).double()
    found = Augmentation(labels)(gaussian(height, width, mean, covariance).expand(32, 1, -1, -1))
    for image, row in zip(found, labels.double().tolist(), strict=True):
        linear, shift = transform_of(row, height, width)
        truth = gaussian(height, width, linear @ mean + shift, linear @ covariance @ linear.T)[0]
        error = (image - truth)[truth > 0.02].abs().max()
        assert error < 0.01, row


def test_probability_zero_changes_no_bit() -> None:
    images = noise(16, 3, 9, 14)
    augmentation = AugmentPipe(probability=0, mirror=False).draw(16, torch.Generator().manual_seed(0))
    assert torch.equal(augmentation.labels, torch.zeros(16, AUGMENT_LABELS))
    assert torch.equal(augmentation(images), images)


def test_exactly_the_images_with_zero_labels_come_back() -> None:
    images = noise(200, 1, 8, 8)
    augmentation = AugmentPipe(probability=0.15).draw(200, torch.Generator().manual_seed(0))
    same = (augmentation(images) == images).flatten(1).all(1)
    assert 20 < same.sum() < 120
    assert torch.equal(same, (augmentation.labels == 0).all(1))


@pytest.mark.parametrize(("flips", "dims"), [((X_FLIP,), (3,)), ((Y_FLIP,), (2,)), ((X_FLIP, Y_FLIP), (2, 3))])
def test_flips_are_exact(flips: tuple[int, ...], dims: tuple[int, ...]) -> None:
    images = noise(1, 3, 9, 14)
    assert torch.equal(augmentation(dict.fromkeys(flips, 1.0))(images), images.flip(dims))


@pytest.mark.parametrize(("right", "down"), [(3, 0), (0, -2), (-5, 4), (8, 7)])
def test_translation_by_whole_pixels_moves_them_and_mirrors_at_the_edge(right: int, down: int) -> None:
    height, width = 12, 20
    images = noise(1, 3, height, width)
    found = augmentation({X_SHIFT: 8 * right / width, Y_SHIFT: 8 * down / height})(images)
    padded = F.pad(images, (9, 9, 9, 9), mode="reflect")
    truth = padded[:, :, 9 - down : 9 - down + height, 9 - right : 9 - right + width]
    assert (found - truth).abs().max() < 2e-5


def test_between_pixels_fine_detail_keeps_its_contrast() -> None:
    """A wave of four pixels moved by half a pixel: linear interpolation would leave 71 % of it, the bicubic filter 97 %."""
    wave = torch.cos(torch.arange(64) * math.pi / 2).expand(1, 1, 8, 64)
    truth = torch.cos((torch.arange(64) - 0.5) * math.pi / 2)
    found = augmentation({X_SHIFT: 8 * 0.5 / 64})(wave)
    assert (found - truth)[..., 4:-4].abs().max() < 0.05


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_quarter_turns_are_exact_and_counter_clockwise(quarters: int) -> None:
    images = noise(1, 3, 13, 13)
    cos, sin = ((0, 1), (-1, 0), (0, -1))[quarters - 1]
    found = augmentation({COS: cos - 1, SIN: sin})(images)
    assert (found - torch.rot90(images, quarters, dims=(2, 3))).abs().max() < 2e-5


def test_half_a_turn_is_two_flips() -> None:
    images = noise(1, 3, 9, 14)
    turned_and_flipped = augmentation({COS: -2, SIN: 0, X_FLIP: 1, Y_FLIP: 1})(images)
    assert (turned_and_flipped - images).abs().max() < 2e-5


def test_labels_have_edms_frequencies_and_ranges() -> None:
    n, p = 40_000, 0.12
    labels = AugmentPipe(probability=p).draw(n, torch.Generator().manual_seed(0)).labels
    kept = labels != 0
    within_4_errors(kept[:, X_FLIP], 1 / 2)
    within_4_errors(kept[:, Y_FLIP], p / 2)
    for column in (SCALE, SIN, ALONG, X_SHIFT):
        within_4_errors(kept[:, column], p)
    within_4_errors(kept[:, ACROSS], p / 2)  # the other half of the stretches are along an axis
    assert torch.equal(kept[:, COS], kept[:, SIN])
    assert torch.equal(kept[:, X_SHIFT], kept[:, Y_SHIFT])
    for first, second in ((SCALE, SIN), (SIN, ALONG), (ALONG, X_SHIFT)):
        within_4_errors(kept[:, first] & kept[:, second], p * p)

    labels = AugmentPipe(probability=1).draw(n, torch.Generator().manual_seed(1)).labels.double()
    scale, cos, sin, a, b, *shifts = labels[:, 2:].unbind(1)
    for value in (scale, *shifts):
        within_4_errors(value, 0)
        within_4_errors(value**2, 1)
        within_4_errors(value**4, 3)
    angle = torch.atan2(sin, cos + 1)
    assert ((cos + 1) ** 2 + sin**2).sub(1).abs().max() < 1e-5
    within_4_errors(angle, 0)
    within_4_errors(angle**2, math.pi**2 / 3)
    stretch, direction = stretch_of(a, b)
    within_4_errors(stretch, 0)
    within_4_errors(stretch**2, 1)
    within_4_errors(b == 0, 1 / 2)
    within_4_errors(direction[b != 0], 0)
    within_4_errors(direction[b != 0] ** 2, math.pi**2 / 12)


def test_mirror_off_switches_off_the_flips_alone() -> None:
    with_flips, without = (
        AugmentPipe(probability=0.5, mirror=mirror).draw(64, torch.Generator().manual_seed(0)).labels
        for mirror in (True, False)
    )
    assert with_flips[:, :2].any(0).all()
    assert not without[:, :2].any()
    assert torch.equal(with_flips[:, 2:], without[:, 2:])


def test_a_slice_of_the_draw_transforms_its_images_as_the_whole_does() -> None:
    images = noise(23, 3, 16, 12)
    whole = AugmentPipe(probability=0.5).draw(23, torch.Generator().manual_seed(0))
    for part in (slice(0, 8), slice(8, 9), slice(9, 23), slice(1, None, 4), slice(5, 5)):
        assert torch.equal(whole[part].labels, whole.labels[part])
        # Not to the bit: on processors without AVX-512 the last bits of a convolution depend on the batch.
        torch.testing.assert_close(whole[part](images[part]), whole(images)[part], rtol=1e-5, atol=1e-5)


def test_a_draw_depends_on_its_generator_alone() -> None:
    pipe = AugmentPipe(probability=0.5)
    first, again, other = (pipe.draw(16, torch.Generator().manual_seed(seed)).labels for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_gradient_is_the_adjoint() -> None:
    """The transform A is linear, so that <A x, y> = <x, A^T y>; where nothing was done, A^T y = y."""
    images, probe = noise(40, 2, 7, 9).double().requires_grad_(), noise(40, 2, 7, 9, seed=1).double()
    augmentation = AugmentPipe(probability=0.2).draw(40, torch.Generator().manual_seed(0))
    found = augmentation(images)
    (gradient,) = torch.autograd.grad((found * probe).sum(), images)
    torch.testing.assert_close((images * gradient).sum((1, 2, 3)), (found * probe).sum((1, 2, 3)))
    untouched = (augmentation.labels == 0).all(1)
    assert untouched.any()
    assert torch.equal(gradient[untouched], probe[untouched])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.bfloat16, 2**-6)])
def test_other_types_come_back_as_they_are_and_are_sampled_at_the_same_places(dtype: torch.dtype, tolerance: float) -> None:
    images = noise(16, 1, 64, 64).to(dtype)
    augmentation = AugmentPipe(probability=1).draw(16, torch.Generator().manual_seed(0))
    found = augmentation(images)
    assert found.dtype == dtype
    assert (found.double() - augmentation(images.float()).double()).abs().max() < tolerance


@pytest.mark.parametrize("shape", [(1, 8), (8, 1), (1, 1)])
def test_images_one_pixel_wide_stay_finite(shape: tuple[int, int]) -> None:
    images = torch.full((8, 1, *shape), 0.5)
    found = AugmentPipe(probability=1).draw(8, torch.Generator().manual_seed(0))(images)
    assert (found - 0.5).abs().max() < 1e-5


@pytest.mark.parametrize("probability", [-0.1, 1.5, math.nan])
def test_impossible_probabilities_are_refused(probability: float) -> None:
    with pytest.raises(RequestError, match=rf"probability is {probability}; give a number from 0 to 1"):
        AugmentPipe(probability=probability)


def augmentation(labels: dict[int, float]) -> Augmentation:
    """One image's transform by its non-zero labels."""
    row = torch.zeros(1, AUGMENT_LABELS)
    for column, value in labels.items():
        row[0, column] = value
    return Augmentation(row)


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Uniform in [-1, 1]."""
    return 2 * torch.rand(shape, generator=torch.Generator().manual_seed(seed)) - 1


def centred(height: int, width: int) -> tuple[Tensor, Tensor]:
    """x and y of every pixel from the centre of the image, right and down: float64 [H, W] each."""
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    return x - (width - 1) / 2, y - (height - 1) / 2


def gaussian(height: int, width: int, mean: Tensor, covariance: Tensor) -> Tensor:
    """exp(-(x - mean)^T covariance^-1 (x - mean) / 2): float64 [1, 1, H, W]."""
    offset = torch.stack(centred(height, width), dim=-1) - mean
    return torch.einsum("hwi,ij,hwj->hw", offset, covariance.inverse(), offset).div(-2).exp()[None, None]


def transform_of(labels: list[float], height: int, width: int) -> tuple[Tensor, Tensor]:
    """The linear part and the shift in pixels of EDM's transform, multiplied out from one matrix a parameter."""
    flips = torch.diag(torch.tensor([1 - 2 * labels[X_FLIP], 1 - 2 * labels[Y_FLIP]]).double())
    scale = 2 ** (0.2 * labels[SCALE])
    angle = math.atan2(labels[SIN], labels[COS] + 1)
    stretch, direction = stretch_of(*torch.tensor(labels[ALONG : ACROSS + 1]).double())
    stretches = torch.diag(2 ** (0.2 * stretch * torch.tensor([1.0, -1.0]).double()))
    anisotropy = turn(direction.item()) @ stretches @ turn(-direction.item())
    shift = torch.tensor([labels[X_SHIFT] * width / 8, labels[Y_SHIFT] * height / 8]).double()
    return anisotropy @ turn(angle) @ flips * scale, shift


def stretch_of(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """w and r of a = w cos r, b = w sin r with r in half a circle about 0."""
    direction = torch.atan(b / a)
    return a / direction.cos(), direction


def turn(angle: float) -> Tensor:
    """Counter-clockwise where y points down."""
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.tensor([[cos, sin], [-sin, cos]]).double()


def within_4_errors(values: Tensor, truth: float) -> None:
    values = values.double()
    error = values.std() / len(values) ** 0.5
    assert abs(values.mean() - truth) < 4 * error, f"{values.mean():.5f} +- {error:.5f}, not {truth:.5f}"
