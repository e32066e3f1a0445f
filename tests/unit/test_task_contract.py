"""Users' tasks and terms are checked before a run; errors name what is wrong with them."""

import pytest
import torch
from torch import nn

from gatdist import Task, Term, register_generator, register_task, register_term
from gatdist.common.errors import ConfigError, PluginError
from gatdist.config import load_config
from gatdist.game.tasks import Draws, Vocoder
from gatdist.training.plan import check
from support import refused

SMALL = [
    "run.global_batch=4",
    "evaluate.metrics=[]",
    "game.penalties={}",
    'model.discriminator={name="residual", width=4}',
]
OWN = ['game.task={name="own"}', 'model.generator={name="copying"}']


class Copying(nn.Module):
    def __init__(self, *, input_shapes, sample_shape, num_classes):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, noisy, labels):
        return self.made(self.scale * noisy)

    def made(self, image):
        return image


class Denoising(Task):
    """A right task, which the cases spoil."""

    target = "image"

    def prepare(self, fields, drawn):
        image = fields["image"]
        noise = drawn.normal("noise", tuple(image.shape[1:]))
        return {"image": image, "noisy": image + 0.1 * noise.to(image.dtype)}

    def inputs(self, fields):
        return (fields["noisy"],)


def checked(tmp_path, *more):
    return check(load_config("digits", [*SMALL, *OWN, *more]), str(tmp_path / "run"))


def with_task(**functions):
    register_task("own")(type("Own", (Denoising,), functions))
    register_generator("copying")(Copying)


def test_a_right_task_passes(tmp_path):
    with_task()
    assert checked(tmp_path).warnings == ()


SPOILED = {
    "no target": {"prepare": lambda self, fields, drawn: {"noisy": fields["image"]}},
    "no dictionary": {"prepare": lambda self, fields, drawn: [fields["image"]]},
    "no tensor": {"prepare": lambda self, fields, drawn: {"image": fields["image"], "noisy": 3.0}},
    "integers": {
        "prepare": lambda self, fields, drawn: {
            "image": fields["image"],
            "noisy": fields["image"].long(),
        }
    },
    "one for all": {
        "prepare": lambda self, fields, drawn: {
            "image": fields["image"],
            "noisy": fields["image"][:1],
        }
    },
    "hidden randomness": {
        "inputs": lambda self, fields: (fields["noisy"] + torch.randn(()),),
    },
    "numbers without use": {
        "inputs": lambda self, fields: (torch.randn(1), fields["noisy"])[1:],
    },
    "mean over the batch": {
        "inputs": lambda self, fields: (fields["noisy"] - fields["noisy"].mean(),),
    },
    "no input": {"inputs": lambda self, fields: ()},
    "no tuple": {"inputs": lambda self, fields: fields["noisy"]},
    "raises": {"shown": lambda self, fields: 1 / 0},
    "detached": {"shown": lambda self, fields: fields["image"].detach()},
    "without the target": {"shown": lambda self, fields: fields["noisy"]},
    "infinite": {"shown": lambda self, fields: fields["image"] / 0},
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_broken_task_is_refused(case, tmp_path):
    with_task(**SPOILED[case])
    with refused(PluginError, "game.task"):
        checked(tmp_path)


def test_a_field_that_the_data_lacks_is_named(tmp_path):
    with_task(prepare=lambda self, fields, drawn: {"image": fields["depth"]})
    with refused(ConfigError, "game.task") as caught:
        checked(tmp_path)
    assert "'depth'" in str(caught.value)
    assert __file__ in str(caught.value)


def test_other_key_errors_are_not_taken_for_fields(tmp_path):
    with_task(prepare=lambda self, fields, drawn: {}["lost"])
    with refused(PluginError, "game.task"):
        checked(tmp_path)


def test_a_class_that_is_no_task_is_refused(tmp_path):
    register_task("own")(dict)
    register_generator("copying")(Copying)
    with refused(PluginError, "game.task"):
        checked(tmp_path)


MADE = {
    "another shape": lambda self, image: image[:, :, 1:],
    "no target": lambda self, image: {"photo": image},
    "a field of one sample": lambda self, image: {"image": image, "code": image[:1]},
    "detached field": lambda self, image: {"image": image, "code": image.detach()},
}


@pytest.mark.parametrize("case", MADE)
def test_generated_fields_are_checked(case, tmp_path):
    register_task("own")(Denoising)
    register_generator("copying")(type("Own", (Copying,), {"made": MADE[case]}))
    with refused(PluginError, "model.generator.name"):
        checked(tmp_path)


def test_further_generated_fields_are_accepted(tmp_path):
    register_task("own")(Denoising)
    made = {"made": lambda self, image: {"image": image, "code": image.mean((1, 2, 3))}}
    register_generator("copying")(type("Own", (Copying,), made))
    assert checked(tmp_path).warnings == ()


def distance(context):
    return (context.fake["image"] - context.real["image"]).abs().flatten(1).mean(1)


VALUES = {
    "mean": lambda self, context: distance(context).mean(),
    "number": lambda self, context: 0.5,
    "pixels": lambda self, context: context.fake["image"],
    "real samples only": lambda self, context: context.real["image"].flatten(1).mean(1),
    "detached": lambda self, context: distance(context).detach(),
    "centered": lambda self, context: distance(context) - distance(context).mean(),
    "infinite": lambda self, context: distance(context) / 0,
    "raises": lambda self, context: context.fake["image"].no_such_attribute,
}


@pytest.mark.parametrize("case", VALUES)
def test_a_broken_term_is_refused(case, tmp_path):
    with_task()
    register_term("own")(type("Own", (Term,), {"__call__": VALUES[case]}))
    with refused(PluginError, "game.terms.own"):
        checked(tmp_path, "game.terms.own={weight=1.0}")


def test_a_field_that_a_term_lacks_is_the_terms_error(tmp_path):
    with_task()
    term = {"__call__": lambda self, context: context.fake["depth"]}
    register_term("own")(type("Own", (Term,), term))
    with refused(ConfigError, "game.terms.own") as caught:
        checked(tmp_path, "game.terms.own={weight=1.0}")
    assert "'depth'" in str(caught.value)
    assert __file__ in str(caught.value)


def test_a_term_that_reads_scores_of_real_samples_must_say_so(tmp_path):
    with_task()

    class Own(Term):
        def __call__(self, context):
            return context.real_scores.logits - context.fake_scores.logits

    register_term("own")(Own)
    settings = "game.loss=nonsaturating", "game.terms.own={weight=1.0}"
    with refused(PluginError, "game.terms.own"):
        checked(tmp_path, *settings)
    Own.needs_features = True
    assert checked(tmp_path, *settings).warnings == ()


def test_a_right_term_passes_and_may_have_another_name(tmp_path):
    with_task()
    register_term("own")(type("Own", (Term,), {"__call__": lambda self, c: distance(c)}))
    assert checked(tmp_path, 'game.terms.other={term="own", weight=1.0}').warnings == ()


@pytest.mark.parametrize(
    ("term", "subject"),
    [
        ("weight=1.0, start_samples=10000000000", "game.terms.l1.start_samples"),
        ("weight=0.0", "game.terms.l1.weight"),
        (
            "weight={start=0.0, end=1.0, samples=10, delay=10000000000}",
            "game.terms.l1.weight",
        ),
        ("weight=1.0, field='depth'", "game.terms.l1.field"),
        ("weight=1.0, side=3", "game.terms.l1.side"),
        ("weight=-1.0", "game.terms.l1.weight"),
    ],
)
def test_a_term_that_never_counts_or_does_not_fit_is_refused(term, subject, tmp_path):
    with_task()
    with refused(ConfigError, subject):
        checked(tmp_path, f"game.terms.l1={{{term}}}")


def test_a_weight_that_rises_and_falls_counts(tmp_path):
    with_task()
    weight = "weight={start=1.0, end=0.0, samples=0, delay=100, warmup=50}"
    assert checked(tmp_path, f"game.terms.l1={{{weight}}}").warnings == ()


def test_gain_is_uniform_in_decibels_and_for_training_only():
    wave = torch.ones(4000, 1, 64)
    task = Vocoder(sample_rate=8000, crop=32, bands=4, window=32, hop=16, gain=[-9, 3])
    positions = torch.arange(4000)
    crops = task.prepare({"wave": wave}, Draws(0, "", positions))["wave"]
    decibels = 20 * crops[:, 0].log10()
    assert torch.equal(decibels[:, 0], decibels[:, 31])
    levels = decibels[:, 0].sort().values
    torch.testing.assert_close(levels, torch.linspace(-9, 3, 4000), rtol=0, atol=0.4)
    shown = task.prepare({"wave": wave}, Draws(0, "", positions, is_training=False))["wave"]
    assert torch.equal(shown, wave)
