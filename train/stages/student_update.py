"""The student's update: one step along the gradient of the objective, whatever terms it is made of."""

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
    """What every update of the student works with; pairs only where an objective asks for them."""

    fabric: Fabric
    optimizer_step: OptimizerStep
    critic: OptimizerStep
    teacher: torch.nn.Module
    shard: BatchShard
    ratio: DensityRatio
    pairs: Pairs | None
    bad_limit: int

    def __call__(
        self, index: int, objective: Objective, students: StudentBatch, rng: torch.Generator, log_details: bool
    ) -> Metrics:
        """One step; with `log_details`, terms, their gradients and the ratio are measured as well."""
        # Its gradient passes through the critic; the critic's own weights would only cost memory.
        self.critic.module.requires_grad_(False)
        draw = _Draw.of(objective, students, self.pairs, rng)
        ratios = self._ratios_beforehand(objective, students, draw)
        nonfinite, tally = NonFiniteTracker(), Tally(self.fabric)
        for part in self.shard.micro_batches:
            # Parts are places in the global batch, ratios those of this process.
            local = slice(part.start - self.shard.whole.start, part.stop - self.shard.whole.start)
            diffused, output = self._diffuse(part, objective, students, draw)
            ratio = self._ratio(output, diffused.sigma, objective) if ratios is None else ratios[local]
            terms = self._terms(part, objective, students, draw, diffused, output, ratio)
            nonfinite.add(_sums(diffused) | terms, diffused.sigma)
            if log_details:
                if not self.optimizer_step.scales_loss:
                    tally.add(_image_gradients(terms, diffused.clean))
                tally.add(_state_of(diffused, output, ratio, objective))
                tally.add({f"generator/{name}": values for name, values in terms.items()})
            self.optimizer_step.backward(torch.stack([values.sum() for values in terms.values()]).sum() / len(students.noise))
        norm = self.optimizer_step.step(index)
        raise_if_diverged(self.fabric, self.optimizer_step, self.bad_limit, nonfinite, index + 1)
        return tally.means() | {"generator/gradient_norm": norm} if log_details else {}

    def _diffuse(
        self, part: slice, objective: Objective, students: StudentBatch, draw: "_Draw"
    ) -> tuple[DiffusedBatch, CriticOutput]:
        """The student's images at their noise levels, as teacher and fake score see them."""
        config = objective.config
        clean, class_ids = students.with_grad(part), students.classes(part)
        sigma = draw.sigma[part].to(self.fabric.device)
        # x_s = G(z) + s eps, the path along which every term is differentiated.
        noised = clean + sigma * draw.noise[part].to(self.fabric.device)
        # The integral family's gradient does not run through the denoisers, so their graphs are never built.
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
        # The one thing there whose gradient does run through the critic.
        if config.adversarial_scale and not differentiated:
            output = output._replace(logits=self.critic.module(noised, sigma, class_ids, denoise=False).logits)
        assert output.denoised is not None
        return DiffusedBatch(sigma=sigma, clean=clean, noised=noised, teacher=teacher, fake=output.denoised), output

    def _ratios_beforehand(self, objective: Objective, students: StudentBatch, draw: "_Draw") -> Tensor | None:
        """Ratios of this process's whole share, where they cannot be had on the way: their mean needs every micro-batch."""
        if not objective.config.needs_ratio or len(self.shard.micro_batches) == 1:
            return None
        device, logits = self.fabric.device, []
        with torch.no_grad():
            for part in self.shard.micro_batches:
                sigma = draw.sigma[part].to(device)
                noised = students.detached(part) + sigma * draw.noise[part].to(device)
                logits.append(self.critic.module(noised, sigma, students.classes(part), denoise=False).logits)
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
        students: StudentBatch,
        draw: "_Draw",
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
            # The divergence sums over pixels; a loss of one number an image would fade beside it in large images.
            pixels = diffused.clean[0].numel()
            terms["adversarial"] = config.adversarial_scale * pixels * adversarial_loss(output.logits)
        if config.regression_scale:
            terms["regression"] = config.regression_scale * self._regression(part, students, draw)
        if config.reward_scale:
            assert objective.reward is not None
            terms["reward"] = -config.reward_scale * objective.reward(diffused.clean, students.classes(part))
        return terms

    def _regression(self, part: slice, students: StudentBatch, draw: "_Draw") -> Tensor:
        """Squared distance to the teacher's image of the same noise, summed over pixels: [b]."""
        assert self.pairs is not None
        assert draw.pair_index is not None
        device, chosen = self.fabric.device, draw.pair_index[part]
        class_ids = None if self.pairs.class_ids is None else self.pairs.class_ids[chosen].to(device)
        images = one_step(students.network, self.pairs.noise[chosen].to(device), class_ids, students.sigma_init)
        return (images - self.pairs.images[chosen].to(device)).square().flatten(1).sum(1)


@dataclass(frozen=True)
class _Draw:
    """Everything random in one update, for the whole global batch."""

    sigma: Tensor
    noise: Tensor
    pair_index: Tensor | None

    @classmethod
    def of(cls, objective: Objective, students: StudentBatch, pairs: Pairs | None, rng: torch.Generator) -> "_Draw":
        batch = len(students.noise)
        sigma = objective.levels.draw(batch, rng)
        noise = torch.randn(students.noise.shape, generator=rng)
        wanted = pairs is not None and objective.config.regression_scale
        index = torch.randint(len(pairs.noise), (batch,), generator=rng) if pairs is not None and wanted else None
        return cls(sigma, noise, index)


def _sums(diffused: DiffusedBatch) -> Metrics:
    """Finite where every pixel is, [b]: the networks that terms are made of are suspected before the terms."""
    return {"generator": diffused.clean.flatten(1).sum(1), "fake_score": diffused.fake.flatten(1).sum(1)}


def _image_gradients(terms: Terms, clean: Tensor) -> Metrics:
    """Per term that acts on the images, the norm of its gradient with respect to each: [b]."""
    norms = {}
    for name, values in terms.items():
        # With respect to the image, which every term reaches, and at the price of no pass through the student.
        (gradient,) = torch.autograd.grad(values.sum(), clean, retain_graph=True, allow_unused=True)
        if gradient is not None:
            norms[f"generator/{name}_gradient"] = gradient.flatten(1).norm(dim=1)
    return norms


def _state_of(diffused: DiffusedBatch, output: CriticOutput, ratio: Tensor, objective: Objective) -> Metrics:
    """How far fake score and teacher are apart, how varied the images are, what the ratios are like; single numbers, as [1]."""
    clean, teacher, fake = diffused.clean.detach(), diffused.teacher.detach(), diffused.fake.detach()
    state = {
        "generator/score_distance": (teacher - fake).square().mean().sqrt(),
        # Against the teacher's images of the same noised ones: below half of their spread the student collapses.
        "generator/diversity": clean.std(0).mean() / teacher.std(0).mean().clamp(min=1e-6),
    }
    if objective.config.needs_ratio:
        assert output.logits is not None
        ratio = ratio.float()
        state |= {name: ratio.quantile(at) for name, at in QUANTILES.items()}
        # (sum r)^2 / (n sum r^2), Kish's effective sample size: 1 where all weigh alike, 1/n where one image is all.
        state["ratio/effective_sample_size"] = ratio.sum() ** 2 / (ratio**2).sum() / len(ratio)
        state["ratio/clamped"] = (output.logits.detach().abs() >= objective.config.logit_clamp).float().mean()
    return {name: value.reshape(1) for name, value in state.items()}
