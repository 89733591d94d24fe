"""The student's update: one step down the gradient of the objective, with all of its terms."""

from dataclasses import dataclass

import torch
from lightning_fabric import Fabric
from torch import Tensor

from uni_instruct.networks.critic import CriticOutput
from uni_instruct.networks.one_step import one_step
from uni_instruct.train.monitoring.metrics import Metrics, Tally
from uni_instruct.train.monitoring.nonfinite import NonFiniteTracker, raise_if_diverged
from uni_instruct.train.objective.guidance import guided, guided_critic
from uni_instruct.train.objective.objective import Objective
from uni_instruct.train.objective.pairs import Pairs
from uni_instruct.train.objective.ratio import DensityRatio
from uni_instruct.train.objective.terms import DiffusedBatch, Terms, adversarial_loss
from uni_instruct.train.optimization.distributed import BatchShard
from uni_instruct.train.optimization.optimizer import OptimizerStep
from uni_instruct.train.stages.student import StudentBatch

QUANTILES = {"ratio/q05": 0.05, "ratio/q50": 0.5, "ratio/q95": 0.95}


@dataclass(frozen=True, kw_only=True)
class StudentUpdate:
    """One update of the student, with what all updates share. pairs is None unless an objective has the regression term."""

    fabric: Fabric
    optimizer_step: OptimizerStep
    critic: OptimizerStep
    teacher: torch.nn.Module
    shard: BatchShard
    ratio: DensityRatio
    pairs: Pairs | None
    bad_limit: int

    def __call__(
        self, index: int, objective: Objective, student_batch: StudentBatch, rng: torch.Generator, log_details: bool
    ) -> Metrics:
        """Take one step. With log_details, returns the terms, their gradients and statistics of the ratio; else nothing.

        index: the training step, for the learning rate.
        """
        # The gradient passes through the critic to the student. Gradients of the critic's weights would only cost memory.
        self.critic.module.requires_grad_(False)
        draw = _RandomInputs.of(objective, student_batch, self.pairs, rng)
        ratios = self._ratios_beforehand(objective, student_batch, draw)
        nonfinite, tally = NonFiniteTracker(), Tally(self.fabric)
        for part in self.shard.micro_batches:
            # `part` indexes the global batch, `ratios` only this process's shard.
            local = slice(part.start - self.shard.whole.start, part.stop - self.shard.whole.start)
            diffused, output = self._diffuse(part, objective, student_batch, draw)
            ratio = self._ratio(output, diffused.sigma, objective) if ratios is None else ratios[local]
            terms = self._terms(part, objective, student_batch, draw, diffused, output, ratio)
            nonfinite.add(_sums(diffused) | terms, diffused.sigma)
            if log_details:
                if not self.optimizer_step.scales_loss:
                    tally.add(_image_gradients(terms, diffused.clean))
                tally.add(_batch_statistics(diffused, output, ratio, objective))
                tally.add({f"generator/{name}": values for name, values in terms.items()})
            self.optimizer_step.backward(
                torch.stack([values.sum() for values in terms.values()]).sum() / len(student_batch.noise)
            )
        norm = self.optimizer_step.step(index)
        raise_if_diverged(self.fabric, self.optimizer_step, self.bad_limit, nonfinite, index + 1)
        return tally.means() | {"generator/gradient_norm": norm} if log_details else {}

    def _diffuse(
        self, part: slice, objective: Objective, student_batch: StudentBatch, draw: "_RandomInputs"
    ) -> tuple[DiffusedBatch, CriticOutput]:
        """Diffuse the student's images and denoise them with teacher and fake score. Also returns the critic's output."""
        config = objective.config
        clean, class_ids = student_batch.with_grad(part), student_batch.classes(part)
        sigma = draw.sigma[part].to(self.fabric.device)
        # x_s = G(z) + s eps, the path along which every term is differentiated.
        noised = clean + sigma * draw.noise[part].to(self.fabric.device)
        # The integral family has no gradient through the denoisers, so no graph is built for them.
        differentiated = config.family == "expanded"
        with torch.set_grad_enabled(differentiated):
            output = guided_critic(
                self.critic.module,
                noised,
                sigma,
                class_ids,
                scale=config.fake_guidance,
                discriminate=config.needs_discriminator and (differentiated or not config.adversarial_scale),
            )
            teacher = guided(self.teacher, noised, sigma, class_ids, config.teacher_guidance)
        # In the integral family only the adversarial term needs a gradient through the critic.
        if config.adversarial_scale and not differentiated:
            output = output._replace(logits=self.critic.module(noised, sigma, class_ids, denoise=False).logits)
        assert output.denoised is not None
        return DiffusedBatch(sigma=sigma, clean=clean, noised=noised, teacher=teacher, fake=output.denoised), output

    def _ratios_beforehand(self, objective: Objective, student_batch: StudentBatch, draw: "_RandomInputs") -> Tensor | None:
        """Ratios [b] of this process's whole shard, from an extra forward pass; None if they are not needed or not in advance.

        With several micro-batches they are needed in advance, because scaling to mean 1 needs the ratios of all of them.
        """
        if not objective.config.needs_ratio or len(self.shard.micro_batches) == 1:
            return None
        device, logits = self.fabric.device, []
        with torch.no_grad():
            for part in self.shard.micro_batches:
                sigma = draw.sigma[part].to(device)
                noised = student_batch.detached(part) + sigma * draw.noise[part].to(device)
                logits.append(self.critic.module(noised, sigma, student_batch.classes(part), denoise=False).logits)
        return self.ratio(torch.cat(logits), draw.sigma[self.shard.whole].to(device), objective.config)

    def _ratio(self, output: CriticOutput, sigma: Tensor, objective: Objective) -> Tensor:
        if not objective.config.needs_ratio:
            return sigma.new_ones(len(sigma))
        assert output.logits is not None
        return self.ratio(output.logits, sigma, objective.config)

    def _terms(
        self,
        part: slice,
        objective: Objective,
        student_batch: StudentBatch,
        draw: "_RandomInputs",
        diffused: DiffusedBatch,
        output: CriticOutput,
        ratio: Tensor,
    ) -> Terms:
        """Every term of the objective with its scale: name -> [b]."""
        config, terms = objective.config, Terms()
        if config.divergence_scale:
            terms |= objective.divergence_terms(diffused, ratio)
        if config.adversarial_scale:
            assert output.logits is not None
            # The divergence's terms are sums over pixels. Without this factor, a loss that is one number per image would have
            # less weight in larger images.
            pixels = diffused.clean[0].numel()
            terms["adversarial"] = config.adversarial_scale * pixels * adversarial_loss(output.logits)
        if config.regression_scale:
            terms["regression"] = config.regression_scale * self._regression(part, student_batch, draw)
        if config.reward_scale:
            assert objective.reward is not None
            # Minus, because the loss is minimised and the reward is to rise.
            terms["reward"] = -config.reward_scale * objective.reward(diffused.clean, student_batch.classes(part))
        return terms

    def _regression(self, part: slice, student_batch: StudentBatch, draw: "_RandomInputs") -> Tensor:
        """|G(z) - teacher's image of z|^2, summed over pixels: [b]."""
        assert self.pairs is not None
        assert draw.pair_index is not None
        device, chosen = self.fabric.device, draw.pair_index[part]
        class_ids = None if self.pairs.class_ids is None else self.pairs.class_ids[chosen].to(device)
        images = one_step(student_batch.network, self.pairs.noise[chosen].to(device), class_ids, student_batch.sigma_init)
        return (images - self.pairs.images[chosen].to(device)).square().flatten(1).sum(1)


@dataclass(frozen=True)
class _RandomInputs:
    """Everything random in one update, for the whole global batch."""

    sigma: Tensor
    noise: Tensor
    pair_index: Tensor | None

    @classmethod
    def of(
        cls, objective: Objective, student_batch: StudentBatch, pairs: Pairs | None, rng: torch.Generator
    ) -> "_RandomInputs":
        batch = len(student_batch.noise)
        sigma = objective.levels.draw(batch, rng)
        noise = torch.randn(student_batch.noise.shape, generator=rng)
        wanted = pairs is not None and objective.config.regression_scale
        index = torch.randint(len(pairs.noise), (batch,), generator=rng) if pairs is not None and wanted else None
        return cls(sigma, noise, index)


def _sums(diffused: DiffusedBatch) -> Metrics:
    """The sums of the student's and the fake score's pixels, [b]: not finite if a pixel is not.

    They are tracked before the terms, so that a fault is reported for the network that caused it, not for a term.
    """
    return {"generator": diffused.clean.flatten(1).sum(1), "fake_score": diffused.fake.flatten(1).sum(1)}


def _image_gradients(terms: Terms, clean: Tensor) -> Metrics:
    """Per term, the norm of its gradient with respect to each image, |d term / d G(z)|: [b]. Without the regression term."""
    norms = {}
    for name, values in terms.items():
        # With respect to the images, because this needs no backward pass through the student. The regression has other images.
        (gradient,) = torch.autograd.grad(values.sum(), clean, retain_graph=True, allow_unused=True)
        if gradient is not None:
            norms[f"generator/{name}_gradient"] = gradient.flatten(1).norm(dim=1)
    return norms


def _batch_statistics(diffused: DiffusedBatch, output: CriticOutput, ratio: Tensor, objective: Objective) -> Metrics:
    """Scalars as [1]: the distance of fake score and teacher, the diversity of the images, and statistics of the ratios."""
    clean, teacher, fake = diffused.clean.detach(), diffused.teacher.detach(), diffused.fake.detach()
    state = {
        # Root mean square of D_q - D_p over the images and noise levels of the batch.
        "generator/score_distance": (teacher - fake).square().mean().sqrt(),
        # Standard deviation over the batch, relative to that of the teacher's denoised images. Below 0.5 the student collapses.
        "generator/diversity": clean.std(0).mean() / teacher.std(0).mean().clamp(min=1e-6),
    }
    if objective.config.needs_ratio:
        assert output.logits is not None
        ratio = ratio.float()
        state |= {name: ratio.quantile(at) for name, at in QUANTILES.items()}
        # (sum r)^2 / (n sum r^2), Kish's effective sample size over n: 1 for equal ratios, 1/n if one image has all weight.
        state["ratio/effective_sample_size"] = ratio.sum() ** 2 / (ratio**2).sum() / len(ratio)
        state["ratio/clamped"] = (output.logits.detach().abs() >= objective.config.logit_clamp).float().mean()
    return {name: value.reshape(1) for name, value in state.items()}
