"""Parts of games to come are exact on any number of workers, and the usual code is not.

Each rule here computes a statistic of the global batch from reduced sums, as the engine offers
them. With ``per_worker``, it is computed as published code does under data parallelism.
"""

import pytest
import torch
from torch.nn.functional import softplus

from conditional_games import REUSED, SMALL, TRANSLATION, batch_of, state_of, train
from gatdist.config import load_config
from gatdist.game.updates.alternating import Alternating
from gatdist.game.updates.rule import (
    Phase,
    ReducedPhase,
    UpdateRule,
    register_update_rule,
    trainable,
    update_rules,
)
from gatdist.parallel.communicator import LocalCommunicator
from support import spawn

CPU = LocalCommunicator(torch.device("cpu"))
PLAIN = [*TRANSLATION[:-1], "game.terms={l1={weight=1.0}}"]


class Statistics(Alternating):
    """Alternating descent from sums that are reduced within a phase."""

    def __init__(self, *, game, config, per_worker: bool = False):
        super().__init__(game, config)
        self.bare = game.without_replication()
        self.per_worker = per_worker

    def mean(self, reduction, parts):
        """Sum weighted lists over all parts; with ``per_worker``, over those of this worker."""
        if not self.per_worker:
            return reduction.mean(parts)
        world = reduction.comm.world_size
        return [sum(each) for each in zip(*parts, strict=True)] if world else []

    def reduced(self, name, batch, player, backward, compute):
        return ReducedPhase(
            name,
            (player,),
            batch,
            backward,
            compute=lambda reduction, parts: (
                {player: compute(reduction, parts)},
                [{} for _ in parts],
            ),
        )


class AdaptiveWeight(Statistics):
    """Esser et al. 2021: w = |∇ L_rec| / (|∇ L_adv| + 1e-4) at the generator's last layer."""

    def phases(self, step):
        discriminator, generator = super().phases(step)
        yield discriminator
        yield self.reduced(
            "generator", generator.batch, "generator", generator.backward, self.weighted
        )

    def weighted(self, reduction, parts):
        theta = trainable(self.bare.generator)

        def both(part):
            fakes = self.bare.generate(part)
            fake = self.bare.discriminate(self.bare.shown(part, fakes), part, "generator")
            adversarial = part.mean(fake.logits.neg())
            reconstruction = part.mean((fakes["target"] - part.real).abs().flatten(1).mean(1))
            return [
                *torch.autograd.grad(reconstruction, theta, retain_graph=True),
                *torch.autograd.grad(adversarial, theta),
            ]

        found = list(map(both, parts))
        seen = self.mean(reduction, [[t.clone() for t in part] for part in found])
        last = seen[len(theta) - 1], seen[-1]
        weight = (last[0].norm() / (last[1].norm() + 1e-4)).clamp(0, 1e4)
        total = [
            [a + weight * b for a, b in zip(part[: len(theta)], part[len(theta) :], strict=True)]
            for part in found
        ]
        return reduction.mean(total)


class RelativisticAverage(Statistics):
    """Jolicoeur-Martineau 2019: each logit is compared with the mean of the other side."""

    def phases(self, step):
        discriminator, generator = super().phases(step)
        for phase, player in ((discriminator, "discriminator"), (generator, "generator")):
            yield self.reduced(player, phase.batch, player, phase.backward, self.compute(player))

    def compute(self, player):
        sign = 1 if player == "discriminator" else -1

        def sides(part):
            fakes = self.bare.generate(part)
            if player == "discriminator":
                fakes = {name: field.detach() for name, field in fakes.items()}
            return [
                self.bare.discriminate(self.bare.shown(part, fields), part, side).logits
                for fields, side in (({}, "real"), (fakes, "fake"))
            ]

        def loss(real, fake, means):
            of_real, of_fake = means
            return softplus(sign * (of_fake - real)) + softplus(sign * (fake - of_real))

        def compute(reduction, parts):
            with torch.no_grad():
                first = [sides(part) for part in parts]
            weighted = [[p.mean(x) for x in s] for p, s in zip(parts, first, strict=True)]
            means = [mean.clone().requires_grad_() for mean in self.mean(reduction, weighted)]
            # The loss depends on each logit also through the mean of its side.
            slopes = [
                list(torch.autograd.grad(p.mean(loss(*s, means)), means))
                for p, s in zip(parts, first, strict=True)
            ]
            by_mean = self.mean(reduction, slopes)
            means = [mean.detach() for mean in means]
            parameters = trainable(getattr(self.bare, player))

            def gradient(part):
                real, fake = sides(part)
                total = loss(real, fake, means) + by_mean[0] * real + by_mean[1] * fake
                return list(torch.autograd.grad(part.mean(total), parameters))

            return reduction.mean(map(gradient, parts))

        return compute


class ImagePool(UpdateRule):
    """Shrivastava et al. 2017: the discriminator sees earlier fakes half of the time.

    Each place in the global batch has a pool of its own, so that no worker needs another's.
    """

    SIZE = 2  # fakes of each place

    def __init__(self, *, game, config, per_worker: bool = False):
        super().__init__(game, config)
        self.pools = {}
        self.per_worker = per_worker

    def phases(self, step):
        yield Phase("discriminator", ("discriminator",), step.batch, self.discriminator)
        yield Phase("generator", ("generator",), step.batch, self.generator)

    def discriminator(self, batch):
        game = self.game
        real = game.backward_real(batch)
        fakes = {"target": self.pooled(game.fakes(batch)["target"], batch)}
        fake = game.discriminate(game.shown(batch, fakes), batch, "fake")
        loss, observations = game.discriminator_loss(batch, real, fake, penalized=fake)
        loss.backward()
        return observations

    def generator(self, batch):
        return Alternating._generator(self, {}, batch)

    def pooled(self, images, batch):
        shown = []
        for i, position in enumerate(batch.positions.tolist()):
            key = "mine" if self.per_worker else position % self.game.step_samples
            pool = self.pools.setdefault(key, [])
            draw = torch.Generator().manual_seed(position)
            place = int(torch.randint(2 * self.SIZE, (), generator=draw))
            shown.append(images[i])
            if len(pool) < self.SIZE:
                pool.append(images[i])
            elif place < self.SIZE:
                shown[-1], pool[place] = pool[place], images[i]
        return torch.stack(shown)


RULES = {
    "adaptive_weight": AdaptiveWeight,
    "relativistic_average": RelativisticAverage,
    "image_pool": ImagePool,
}


def weights(comm, rule, *more):
    for name, kind in RULES.items():
        if name not in update_rules.names():
            register_update_rule(name)(kind)
    config = load_config("digits", [*SMALL, *PLAIN, f"game.update_rule={rule}", *more])
    tensors = train(comm, config, steps=4)
    return {key: t for key, t in tensors.items() if key.startswith(("generator/", "discrimin"))}


def all_weights(comm, *more):
    return {rule: weights(comm, rule, *more) for rule in RULES}


def distance(mine, theirs):
    return max((mine[key] - theirs[key]).abs().max().item() for key in theirs)


@pytest.fixture(scope="module")
def alone():
    return all_weights(CPU)


@pytest.mark.parametrize("workers", [2, 3, 5])
def test_statistics_of_the_global_batch_do_not_depend_on_the_number_of_workers(workers, alone):
    for found in spawn(workers, all_weights):
        assert max(distance(found[rule], alone[rule]) for rule in RULES) < 1e-11


def test_statistics_of_each_worker_do(alone):
    per_worker = "game.rule_options={per_worker=true}"
    same = all_weights(CPU, per_worker)
    for rule in ("adaptive_weight", "relativistic_average"):
        assert distance(same[rule], alone[rule]) == 0
    found, _ = spawn(2, all_weights, per_worker)
    for rule in RULES:
        assert distance(found[rule], same[rule]) > 1e-6


def test_micro_batches_and_virtual_workers_change_nothing(alone):
    for rule, expected in alone.items():
        small = ["optim.generator.micro_batch=4", "optim.discriminator.micro_batch=3"]
        assert distance(weights(CPU, rule, *small), expected) < 1e-11
        canonical = ["run.reduction=canonical", "run.virtual_workers=4"]
        assert distance(weights(CPU, rule, *canonical), expected) < 1e-11


def test_canonical_results_are_bit_identical():
    canonical = ["run.reduction=canonical", "run.virtual_workers=4"]
    expected = all_weights(CPU, *canonical)
    for workers in (2, 3):
        found, *_ = spawn(workers, all_weights, *canonical)
        for rule in RULES:
            assert distance(found[rule], expected[rule]) == 0


def test_the_relativistic_average_has_the_gradient_of_its_definition():
    """One process, the whole batch on one graph."""
    config = load_config("digits", [*SMALL, *PLAIN, *REUSED[:1]])
    state = state_of(CPU, config)
    rule = RelativisticAverage(game=state.rule(config).game, config=config.game)
    batch = rule.game.prepare(batch_of(config, 0))
    found = rule.compute("generator")(state.reduction, [batch])
    game, theta = rule.bare, trainable(rule.bare.generator)
    real = game.discriminate(game.shown(batch), batch, "real").logits.detach()
    fake = game.discriminate(game.shown(batch, game.generate(batch)), batch, "fake").logits
    loss = softplus(real - fake.mean()).mean() + softplus(real.mean() - fake).mean()
    for mine, expected in zip(found, torch.autograd.grad(loss, theta), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-10, atol=1e-14)
