"""Every update rule on two games with known behaviour, compared with published results.

The bilinear game min_θ max_ψ θψ, and Dirac-GAN (Mescheder et al. 2018): the real distribution is a
point at 0, all fakes are at θ, and the discriminator is D(x) = ψx.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.case import parser, save
from gatdist.bench.cases import GatdistCase
from gatdist.config import Config, parse_config
from gatdist.game import Loss, register_loss
from gatdist.models import register_discriminator, register_generator
from gatdist.monitor.figures import figure

RATE = 0.2
STEPS = 200

RULES: dict[str, dict[str, Any]] = {
    "simultaneous": {},
    "one_stage": {},
    "alternating": {},
    "extragradient": {},
    "optimistic": {},
    "consensus": {"rule_options": {"strength": 0.7}},
    "competitive": {},
    "conjugate": {},
}
# Growth of ‖w‖ per step on the bilinear game, a = η; and the formula.
BILINEAR: dict[str, tuple[Callable[[float], float], str]] = {
    "simultaneous": (lambda a: math.sqrt(1 + a**2), "√(1 + a²): diverges"),
    "one_stage": (lambda a: math.sqrt(1 + a**2), "√(1 + a²): diverges"),
    "alternating": (lambda a: 1.0, "bounded: θ² + ψ² + aθψ is kept"),
    "extragradient": (lambda a: math.sqrt(1 - a**2 + a**4), "√(1 − a² + a⁴)"),
    "optimistic": (
        lambda a: math.sqrt((1 + math.sqrt(1 - 4 * a**2)) / 2),
        "√((1 + √(1 − 4a²))/2), in the limit",
    ),
    "consensus": (lambda a: math.sqrt((1 - 0.7 * a) ** 2 + a**2), "√((1 − γa)² + a²), γ = 0.7"),
    "competitive": (lambda a: 1 / math.sqrt(1 + a**2), "1/√(1 + a²)"),
}


class Point(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([value]))


class PointGenerator(Point):
    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.value.expand(len(latents), 1)


class LinearDiscriminator(Point):
    def forward(self, samples: Tensor, labels: Tensor | None = None) -> Tensor:
        return (samples * self.value)[:, 0]


register_generator("point")(lambda *, latent_size, sample_shape, num_classes: PointGenerator(1.0))
register_discriminator("linear")(lambda *, sample_shape, num_classes: LinearDiscriminator(-1.0))
register_loss(
    "bilinear",
    Loss(
        discriminator=lambda real, fake: -fake,
        generator=lambda real, fake: fake,
        ratio=lambda real, fake: fake.new_full(fake.shape, -1.0),
        zero_sum=True,
    ),
)


def configuration(rule: str, loss: str, **game: Any) -> Config:
    player = {"name": "sgd", "learning_rate": RATE}
    return parse_config(
        {
            "run": {"total_samples": STEPS, "global_batch": 1},
            "data": {"url": "builtin:ring"},
            "model": {
                "latent_size": 1,
                "generator": {"name": "point"},
                "discriminator": {"name": "linear"},
            },
            "game": {"update_rule": rule, "loss": loss} | RULES[rule] | game,
            "optim": {"generator": player, "discriminator": player},
            "precision": {"dtype": "float64"},
        }
    )


def play(config: Config, steps: int = STEPS) -> Tensor:
    case = GatdistCase(config, torch.zeros(1, 1, dtype=torch.float64))

    def point() -> Tensor:
        networks = case.state.players.values()
        return torch.cat([p.detach() for n in networks for p in n.bare.parameters()])

    points = [point()]
    for _ in range(steps):
        case.step()
        points.append(point())
    return torch.stack(points)


def main() -> None:
    out = parser("games", __doc__).parse_args().out
    bilinear = {rule: play(configuration(rule, "bilinear")) for rule in RULES}
    dirac = {
        rule: play(configuration(rule, "minimax", penalties={"r1": {"strength": 0.3}}))
        for rule in RULES
    }
    plain = {rule: play(configuration(rule, "minimax")) for rule in RULES}
    rows = {}
    for rule, points in bilinear.items():
        radius = points.norm(dim=1)
        measured = (radius[-1] / radius[STEPS // 2]).item() ** (2 / STEPS)
        published, text = BILINEAR.get(rule, (None, "no closed form"))
        rows[rule] = {
            "bilinear_factor": measured,
            "bilinear_published": published(RATE) if published else None,
            "bilinear_source": text,
            "dirac_radius": plain[rule][-1].norm().item(),
            "dirac_r1_radius": dirac[rule][-1].norm().item(),
        }
        print(f"{rule:14}", {k: v for k, v in rows[rule].items() if k != "bilinear_source"})
    save(out, {"learning_rate": RATE, "steps": STEPS, "rules": rows})
    draw(bilinear, out / "bilinear.png", "The bilinear game θψ", published=True)
    draw(plain, out / "dirac.png", "Dirac-GAN, minimax loss, no penalty")
    draw(dirac, out / "dirac_r1.png", "Dirac-GAN, minimax loss, R1 with γ = 0.3")


def draw(trajectories: dict[str, Tensor], path: Path, title: str, published: bool = False) -> None:
    columns = len(trajectories)
    with figure(2.1 * columns, 4.6) as made:
        axes = made.subplots(2, columns, height_ratios=[2, 1])
        for (rule, points), (plane, radius) in zip(trajectories.items(), axes.T, strict=True):
            shown = points.clamp(-4, 4)
            steps = torch.arange(len(points))
            plane.plot(*shown.T, color="tab:blue", linewidth=0.8)
            plane.plot(*shown[0], "o", color="black", markersize=4)
            plane.plot(0, 0, "+", color="tab:red")
            plane.set(title=rule, xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), aspect="equal")
            found = points.norm(dim=1).clamp_min(1e-16)
            radius.semilogy(steps, found, color="tab:blue", label="measured")
            if published and rule in BILINEAR:
                factor, text = BILINEAR[rule]
                curve = found[0] * factor(RATE) ** steps
                radius.semilogy(steps, curve, "--", color="tab:orange", label="published")
                radius.set_xlabel(text, fontsize=7)
            radius.set(ylim=(1e-9, 1e3))
            for axis in (plane, radius):
                axis.tick_params(labelsize=6)
                axis.spines[["top", "right"]].set_visible(False)
        axes[0, 0].set(ylabel="ψ over θ")
        axes[1, 0].set(ylabel="distance from (0, 0)")
        if published:
            axes[1, 0].legend(frameon=False, fontsize=6)
        made.suptitle(f"{title} · η = {RATE}, {STEPS} steps from (1, −1)", fontsize=10)
        made.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
