"""The generator's gradient at the mixtures of docs/objective.md, and the parts it is made of: ratios, switches, adversary."""

from dataclasses import dataclass

import pytest
import torch
from lightning_fabric import Fabric
from torch import Tensor

from builders import toy
from uni_instruct.errors import RequestError
from uni_instruct.schedule import SIGMA_MAX, SIGMA_MIN, karras_sigma
from uni_instruct.train.objective.config import ObjectiveConfig
from uni_instruct.train.objective.divergences.table import DIVERGENCES
from uni_instruct.train.objective.objective import Objective
from uni_instruct.train.objective.ratio import DensityRatio, noise_bin
from uni_instruct.train.objective.terms import (
    DiffusedBatch,
    adversarial_loss,
    discriminator_loss,
    expanded_terms,
    integral_terms,
)

M, B = -0.3, 0.4
CHUNKS, CHUNK = 60, 10_000
# The student's noise is drawn this much wider and weighted back: its teacher has the wider tails, and chi-square squares them.
WIDER = 1.5


@dataclass(frozen=True)
class Printed:
    """A row of the table in docs/objective.md: the divergence, its gradient, and the gradient with SIM's weight held fixed."""

    divergence: float
    dm: float
    db: float
    wrong_db: float


PRINTED = {
    "reverse-kl": Printed(0.21445, 0.14076, -0.22686, -0.22695),
    "forward-kl": Printed(0.27647, 0.38298, -0.22871, -0.14075),
    "jeffreys": Printed(0.49092, 0.52374, -0.45557, -0.36770),
    "jensen-shannon": Printed(0.11534, 0.10414, -0.10570, -0.08571),
    "chi-square": Printed(0.91390, 2.09298, -0.92197, -0.48816),
    "squared-hellinger": Printed(0.23758, 0.23262, -0.21871, -0.17689),
}


@pytest.mark.parametrize("name", PRINTED)
def test_gradient_is_that_of_the_divergence(name: str, gradients: dict[tuple[str, bool], Tensor]) -> None:
    mean, error = mean_and_error(gradients[name, True])
    truth = double(PRINTED[name].dm, PRINTED[name].db)
    assert ((mean - truth).abs() < 3 * error + 2e-4).all(), f"{mean} +- {error}, printed {truth}"
    if DIVERGENCES[name].needs_ratio:
        assert abs(mean[1] - PRINTED[name].wrong_db) > 4 * error[1], "the test could not tell SIM's weight held fixed"


@pytest.mark.parametrize("name", PRINTED)
def test_gradient_with_the_weight_held_fixed_is_the_wrong_one(name: str, gradients: dict[tuple[str, bool], Tensor]) -> None:
    mean, error = mean_and_error(gradients[name, False])
    assert abs(mean[1] - PRINTED[name].wrong_db) < 3 * error[1] + 2e-4, f"{mean} +- {error}"


@pytest.mark.parametrize("name", PRINTED)
def test_printed_divergence_and_gradient_are_those_of_quadrature(name: str) -> None:
    m, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (M, B))
    value = toy.divergence_by_quadrature(DIVERGENCES[name], toy.theory_teacher(), toy.theory_student(m, b))
    gradient = torch.autograd.grad(value, (m, b))
    found = [value.item(), *(g.item() for g in gradient)]
    printed = PRINTED[name]
    assert found == pytest.approx([printed.divergence, printed.dm, printed.db], abs=2e-4)


@pytest.mark.parametrize("name", PRINTED)
def test_expansion_integral_is_the_divergence(name: str) -> None:
    """integral of s E[h(r) |d|^2] ds over noise levels, by quadrature in x and in log s."""
    student, teacher = toy.theory_student(*double(M, B)), toy.theory_teacher()
    log_sigma = torch.linspace(-8, 4.5, 200, dtype=torch.float64)
    x = torch.linspace(-1, 1, 3001, dtype=torch.float64)
    integrand = []
    for sigma in log_sigma.exp():
        grid, level = x * (12 + 9 * sigma), sigma.expand(len(x))
        log_p, log_q = student.log_density(grid, level), teacher.log_density(grid, level)
        d = teacher.score(grid, level) - student.score(grid, level)
        h = DIVERGENCES[name].h((log_q - log_p).clamp(-300, 300).exp())
        integrand.append(sigma**2 * torch.trapezoid(log_p.exp() * h * d**2, grid))
    integral = torch.trapezoid(torch.stack(integrand), log_sigma)
    assert integral.item() == pytest.approx(PRINTED[name].divergence, abs=3e-4)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_alpha_scales_the_fgm_term_alone(alpha: float) -> None:
    """SiD's form, d . ((D_q - x_0) - alpha (D_q - D_p)) with scores as denoised differences, is half of reverse KL's loss."""
    batch = random_batch()
    terms = expanded_terms(DIVERGENCES["reverse-kl"], batch, torch.ones(8, dtype=torch.float64), alpha=alpha)
    delta = batch.teacher - batch.fake
    sid = (delta * ((batch.teacher - batch.clean) - alpha * delta)).flatten(1).sum(1)
    torch.testing.assert_close(terms["di"] + terms["fgm"] + terms["sim"], 2 * sid)


@pytest.mark.parametrize("off", [(), ("di",), ("fgm",), ("sim",), ("di", "sim")])
def test_switches_leave_out_their_terms_alone(off: tuple[str, ...]) -> None:
    batch, ratio = random_batch(), torch.linspace(0.2, 3, 8, dtype=torch.float64)
    config = ObjectiveConfig(divergence="chi-square", weighting="uniform", divergence_scale=3.0, **dict.fromkeys(off, False))
    terms = Objective.of(config).divergence_terms(batch, ratio)
    every = expanded_terms(DIVERGENCES["chi-square"], batch, ratio)
    assert list(terms) == [name for name in ("di", "fgm", "sim") if name not in off]
    for name, values in terms.items():
        torch.testing.assert_close(values, 3 * every[name])


def test_an_objective_without_any_term_is_refused() -> None:
    with pytest.raises(RequestError, match="di, fgm and sim are all false; set one of them to true"):
        ObjectiveConfig(di=False, fgm=False, sim=False)


def test_sid_weight_divides_by_the_distance_to_the_teacher() -> None:
    batch, ratio = random_batch(), torch.ones(8, dtype=torch.float64)
    terms = Objective.of(ObjectiveConfig(family="integral", weighting="sid")).divergence_terms(batch, ratio)
    distance = (batch.clean - batch.teacher).abs().mean(dim=(1, 2, 3))
    plain = integral_terms(DIVERGENCES["reverse-kl"], batch, ratio)["integral"]
    found, expected = (torch.autograd.grad(v.sum(), batch.noised)[0] for v in (terms["integral"], plain / distance.detach()))
    torch.testing.assert_close(found, expected)
    terms = Objective.of(ObjectiveConfig(family="integral", weighting="sid")).divergence_terms(batch, ratio)
    assert torch.autograd.grad(terms["integral"].sum(), batch.clean, allow_unused=True) == (None,)


def test_discriminator_logit_at_its_optimum_is_the_log_ratio() -> None:
    p, q = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.6, 0.1, 0.3])
    logits = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        silent = torch.full((3,), 60.0)
        loss = (q * discriminator_loss(logits, -silent) + p * discriminator_loss(silent, logits)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(logits.detach().exp(), q / p, rtol=1e-3, atol=1e-3)


def test_adversarial_loss_pulls_hardest_at_what_the_discriminator_sees_through() -> None:
    """-log of the probability of being real; its slope is -1 for a certain fake and 0 for a certain real."""
    logits = torch.tensor([-50.0, 0.0, 2.0, 50.0], requires_grad=True)
    loss = adversarial_loss(logits)
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(logits))
    (slope,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(slope, logits.detach().sigmoid() - 1)


def test_ratios_are_clamped_and_average_one() -> None:
    logits = torch.tensor([-100.0, 0.0, 1.0, 100.0], requires_grad=True)
    ratio = density_ratio()(logits, toy.as_images(torch.ones(4)), ObjectiveConfig(logit_clamp=2.0))
    assert ratio.mean().item() == pytest.approx(1)
    assert (ratio[3] / ratio[0]).log().item() == pytest.approx(4, rel=1e-5)
    assert (ratio[2] / ratio[1]).log().item() == pytest.approx(1, rel=1e-5)
    assert not ratio.requires_grad


def test_ratios_are_left_alone_with_none() -> None:
    logits = torch.tensor([-3.0, 0.5, 1.0])
    ratio = density_ratio()(logits, toy.as_images(torch.ones(3)), ObjectiveConfig(ratio_mean="none"))
    torch.testing.assert_close(ratio, logits.exp())


def test_running_means_take_out_what_a_noise_bin_is_off_by() -> None:
    """A discriminator that is off by a constant in each noise bin gives, in the long run, the ratios of one that is not."""
    rng = torch.Generator().manual_seed(0)
    config, ratios = ObjectiveConfig(ratio_mean="running", ratio_bins=4), density_ratio(bins=4)
    offset = torch.tensor([1.5, -1.0, 0.0, 0.5])
    for _ in range(60):
        sigma = karras_sigma(torch.rand(256, 1, 1, 1, generator=rng))
        signal = 0.3 * torch.randn(256, generator=rng)
        found = ratios(signal + offset[noise_bin(sigma, 4)], sigma, config)
    torch.testing.assert_close(found, signal.exp() / signal.exp().mean(), rtol=0.1, atol=0)
    assert ratios.state_dict()["running"] == pytest.approx((offset + 0.045).exp(), rel=0.05)


def test_running_means_are_part_of_the_state() -> None:
    config, used = ObjectiveConfig(ratio_mean="running"), density_ratio()
    logits, sigma = torch.linspace(-2, 2, 64), toy.as_images(karras_sigma(torch.linspace(0, 1, 64)))
    used(logits, sigma, config)
    restored = density_ratio()
    assert not torch.equal(restored(logits, sigma, config), used(logits, sigma, config))
    restored.load_state_dict(used.state_dict())
    assert torch.equal(restored(logits, sigma, config), used(logits, sigma, config))


def test_noise_bins_are_equal_parts_of_the_schedule() -> None:
    sigma = karras_sigma(torch.tensor([0.01, 0.24, 0.26, 0.49, 0.51, 0.99]))
    assert noise_bin(toy.as_images(sigma), 4).tolist() == [0, 0, 1, 1, 2, 3]
    outside = torch.tensor([SIGMA_MIN / 10, SIGMA_MAX * 10])
    assert noise_bin(toy.as_images(outside), 4).tolist() == [0, 3]


@pytest.fixture(scope="module")
def gradients() -> dict[tuple[str, bool], Tensor]:
    """d/d(m, b) of the training code's terms: (divergence, exact_sim) -> means of independent chunks [CHUNKS, 2]."""
    chunks = [chunk_gradients(seed) for seed in range(CHUNKS)]
    return {key: torch.stack([chunk[key] for chunk in chunks]) for key in chunks[0]}


def chunk_gradients(seed: int) -> dict[tuple[str, bool], Tensor]:
    rng = torch.Generator().manual_seed(seed)
    m, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (M, B))
    teacher, frozen = toy.theory_teacher(), toy.theory_student(*double(M, B))
    configs = {
        (name, exact): ObjectiveConfig(divergence=name, exact_sim=exact, weighting="exact", tmax=1000)
        for name in PRINTED
        for exact in (True, False)
    }
    student = toy.theory_student(m, b)
    component = torch.multinomial(student.weights, CHUNK, replacement=True, generator=rng)
    narrow = torch.randn(CHUNK, generator=rng, dtype=torch.float64)
    importance = WIDER * ((1 - WIDER**2) * narrow**2 / 2).exp()
    clean = student.means[component] + student.variances[component].sqrt() * WIDER * narrow
    levels = next(iter(configs.values())).levels
    sigma = levels.draw(CHUNK, rng).double().flatten()
    noised = clean + sigma * torch.randn(CHUNK, generator=rng, dtype=torch.float64)
    ratio = (teacher.log_density(noised, sigma) - frozen.log_density(noised, sigma)).detach().exp()
    batch = DiffusedBatch(
        sigma=toy.as_images(sigma),
        clean=toy.as_images(clean),
        noised=toy.as_images(noised),
        teacher=toy.as_images(teacher.denoised(noised, sigma)),
        fake=toy.as_images(frozen.denoised(noised, sigma)),
    )
    found = {}
    for key, config in configs.items():
        loss = (importance * torch.stack(list(Objective.of(config).divergence_terms(batch, ratio).values())).sum(0)).mean()
        found[key] = torch.stack(torch.autograd.grad(loss, (m, b), retain_graph=True))
    return found


def mean_and_error(chunks: Tensor) -> tuple[Tensor, Tensor]:
    return chunks.mean(0), chunks.std(0) / len(chunks) ** 0.5


def random_batch() -> DiffusedBatch:
    rng = torch.Generator().manual_seed(0)
    clean, noised, teacher, fake = torch.randn(4, 8, 1, 2, 2, generator=rng, dtype=torch.float64).requires_grad_()
    sigma = torch.full((8, 1, 1, 1), 0.7, dtype=torch.float64)
    return DiffusedBatch(sigma=sigma, clean=clean, noised=noised, teacher=teacher, fake=fake)


def density_ratio(bins: int = 16) -> DensityRatio:
    return DensityRatio(Fabric(accelerator="cpu", devices=1), bins)


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
