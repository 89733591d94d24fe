"""The training loss against the truth: its Monte-Carlo gradient on closed-form mixtures is the gradient of the divergence."""

from dataclasses import dataclass

import pytest
import torch
import toy
from torch import Tensor

from uni_instruct.divergence import DIVERGENCES, Divergence
from uni_instruct.train.objective import DiffusedBatch, density_ratio, discriminator_loss, exact_weight, expanded_loss

M, B = -0.3, 0.4
SIGMA_RANGE = (1e-3, 60.0)


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


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=lambda d: d.name)
def test_gradient_is_that_of_the_divergence(divergence: Divergence) -> None:
    mean, error = monte_carlo_gradient(divergence, chunks=40, n=50_000)
    printed = PRINTED[divergence.name]
    truth = torch.tensor([printed.dm, printed.db], dtype=torch.float64)
    assert ((mean - truth).abs() < 3 * error + 2e-4).all(), f"{mean} +- {error}, printed {truth}"
    if divergence.needs_ratio:
        assert abs(mean[1] - printed.wrong_db) > 4 * error[1], "the test could not tell SIM's weight held fixed"


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=lambda d: d.name)
def test_printed_divergence_and_gradient_are_those_of_quadrature(divergence: Divergence) -> None:
    m, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (M, B))
    value = toy.divergence_by_quadrature(divergence, toy.theory_teacher(), toy.theory_student(m, b))
    value.backward()
    printed = PRINTED[divergence.name]
    found = [value.item(), m.grad.item(), b.grad.item()]
    assert found == pytest.approx([printed.divergence, printed.dm, printed.db], abs=2e-4)


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=lambda d: d.name)
def test_expansion_integral_is_the_divergence(divergence: Divergence) -> None:
    """integral of s E[h(r) |d|^2] ds over noise levels, by quadrature in x and in log s."""
    m, b = (torch.tensor(v, dtype=torch.float64) for v in (M, B))
    student, teacher = toy.theory_student(m, b), toy.theory_teacher()
    log_sigma = torch.linspace(-8, 4.5, 400, dtype=torch.float64)
    x = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    integrand = []
    for sigma in log_sigma.exp():
        grid, level = x * (12 + 9 * sigma), sigma.expand(len(x))
        log_p, log_q = student.log_density(grid, level), teacher.log_density(grid, level)
        d = teacher.score(grid, level) - student.score(grid, level)
        h = divergence.h((log_q - log_p).clamp(-300, 300).exp())
        integrand.append(sigma**2 * torch.trapezoid(log_p.exp() * h * d**2, grid))
    integral = torch.trapezoid(torch.stack(integrand), log_sigma)
    assert integral.item() == pytest.approx(PRINTED[divergence.name].divergence, abs=3e-4)


def test_alpha_scales_the_fgm_term_alone() -> None:
    """SiD's form, d . ((D_q - x_0) - alpha (D_q - D_p)) with scores as denoised differences, is half of reverse KL's loss."""
    generator = torch.Generator().manual_seed(0)
    clean, noised, teacher, fake = torch.randn(4, 8, 1, 2, 2, generator=generator, dtype=torch.float64)
    batch = DiffusedBatch(sigma=torch.full((8, 1, 1, 1), 0.7), clean=clean, noised=noised, teacher=teacher, fake=fake)
    for alpha in (0.5, 1.0, 1.2):
        loss = expanded_loss(DIVERGENCES["reverse-kl"], batch, torch.ones(8, dtype=torch.float64), alpha)
        delta = teacher - fake
        sid = (delta * ((teacher - clean) - alpha * delta)).flatten(1).sum(1)
        torch.testing.assert_close(loss, 2 * sid)


def test_discriminator_logit_at_its_optimum_is_the_log_ratio() -> None:
    p, q = torch.tensor([0.2, 0.5, 0.3]), torch.tensor([0.6, 0.1, 0.3])
    logits = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        real, fake = (
            discriminator_loss(logits, torch.full((3,), -60.0)),
            discriminator_loss(torch.full((3,), 60.0), logits),
        )
        loss = (q * real + p * fake).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(logits.detach().exp(), q / p, rtol=1e-3, atol=1e-3)


def test_ratios_are_clamped_and_average_one() -> None:
    ratio = density_ratio(torch.tensor([-100.0, 0.0, 1.0, 100.0]), clamp=2.0)
    assert ratio.mean().item() == pytest.approx(1)
    assert (ratio[3] / ratio[0]).log().item() == pytest.approx(4, rel=1e-5)
    assert not ratio.requires_grad


def monte_carlo_gradient(divergence: Divergence, chunks: int, n: int) -> tuple[Tensor, Tensor]:
    """Mean and standard error of d/d(m, b) of the training loss with exact weight, from independent chunks of n samples."""
    teacher = toy.theory_teacher()
    frozen = toy.theory_student(torch.tensor(M, dtype=torch.float64), torch.tensor(B, dtype=torch.float64))
    gradients = []
    for chunk in range(chunks):
        generator = torch.Generator().manual_seed(chunk)
        m, b = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (M, B))
        clean = toy.theory_student(m, b).sample(n, generator)
        sigma, density = log_uniform(n, generator)
        noised = clean + sigma * torch.randn(n, generator=generator, dtype=torch.float64)
        ratio = (teacher.log_density(noised, sigma) - frozen.log_density(noised, sigma)).detach().exp()
        batch = DiffusedBatch(
            sigma=as_images(sigma),
            clean=as_images(clean),
            noised=as_images(noised),
            teacher=as_images(teacher.denoised(noised, sigma)),
            fake=as_images(frozen.denoised(noised, sigma)),
        )
        loss = (expanded_loss(divergence, batch, ratio) * exact_weight(as_images(sigma), density)).mean()
        gradients.append(torch.stack(torch.autograd.grad(loss, (m, b))))
    stacked = torch.stack(gradients)
    return stacked.mean(0), stacked.std(0) / chunks**0.5


def log_uniform(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noise levels uniform in log sigma, and their density: float64 [n] each."""
    low, high = (torch.tensor(v, dtype=torch.float64).log() for v in SIGMA_RANGE)
    sigma = (low + (high - low) * torch.rand(n, generator=generator, dtype=torch.float64)).exp()
    return sigma, 1 / (sigma * (high - low))


def as_images(x: Tensor) -> Tensor:
    """[n] -> [n, 1, 1, 1]."""
    return x[:, None, None, None]
