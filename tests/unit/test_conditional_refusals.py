"""What does not go together in games with inputs, terms and maps of logits is refused by name."""

import pytest
import torch

from conditional_games import SMALL, train
from conditional_games import TRANSLATION as PAIRS
from conditional_runs import RUN, SIDE, TRANSLATION, VOCODER, image, write_clips, write_pairs
from gatdist.common.errors import ConfigError
from gatdist.config import load_config
from gatdist.data.codecs.images import encode_png
from gatdist.data.format.shard_files import write_dataset
from gatdist.game.tasks import Record
from gatdist.models.registry import discriminators, generators
from gatdist.parallel.communicator import LocalCommunicator
from gatdist.storage import Store
from gatdist.training.plan import check
from support import refused

ONE_LOGIT = 'model.discriminator={name="residual", width=4}'
INSTANCE = [
    'model.generator={name="unet", width=4, norm="instance"}',
    'model.discriminator={name="patchgan", width=4, layers=1, norm="instance"}',
]
SGD = ["optim.generator.name=sgd", "optim.discriminator.name=sgd"]
ONE_STAGE = [*TRANSLATION, "game.update_rule=one_stage", ONE_LOGIT]
COMPETITIVE = [*TRANSLATION, *INSTANCE, *SGD, "game.update_rule=competitive", "game.loss=minimax"]
NO_TERMS, HALVED = "game.terms={}", "game.adversarial_weight=0.5"
PATH_LENGTH = "game.penalties={path_length={strength=1.0}}"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_pairs(folder / "pairs")
    write_clips(folder / "clips")
    write_clips(folder / "stereo", channels=2)
    labelled = [
        (f"{i:04d}", {"png": encode_png(image(i)), "cls": str(i % 2).encode()}) for i in range(16)
    ]
    write_dataset(
        Store(str(folder / "images")),
        [labelled],
        modality="image",
        sample_shape=(1, SIDE, SIDE),
        num_classes=2,
    )
    return folder


def checked(folder, name, *overrides):
    config = load_config("digits", [*RUN, f"data.url='{folder / name}'", *overrides])
    return check(config, str(folder / "run"))


RULES = {
    "one_stage, terms": (ONE_STAGE, "game.terms.l1"),
    "one_stage, weight": ([*ONE_STAGE, NO_TERMS, HALVED], "game.adversarial_weight"),
    "one_stage, maps": ([*ONE_STAGE, *INSTANCE, NO_TERMS], "game.update_rule"),
    "competitive, terms": (COMPETITIVE, "game.terms.l1"),
    "competitive, weight": ([*COMPETITIVE, NO_TERMS, HALVED], "game.adversarial_weight"),
    "recomputed statistics": (
        [*TRANSLATION, "game.ema_batch_norm=recomputed"],
        "game.ema_batch_norm",
    ),
    "no latents": ([*TRANSLATION, PATH_LENGTH], "game.penalties.path_length"),
}


@pytest.mark.parametrize("case", RULES)
def test_a_rule_or_penalty_is_refused_where_the_game_has_more_than_it_sees(case, data):
    overrides, subject = RULES[case]
    with refused(ConfigError, subject):
        checked(data, "pairs", *overrides)


def test_competitive_refuses_penalties_of_the_generator(data):
    networks = ['model.generator={name="residual", width=4}', ONE_LOGIT]
    rule = ["game.update_rule=competitive", "game.loss=minimax", *SGD]
    with refused(ConfigError, "game.penalties.path_length"):
        checked(data, "images", *networks, *rule, PATH_LENGTH)


def test_one_stage_works_with_inputs_and_one_logit_per_sample(data):
    assert checked(data, "pairs", *ONE_STAGE, NO_TERMS).rule.game.task.has_inputs


def test_the_adversarial_weight_counts_without_terms():
    alone = LocalCommunicator(torch.device("cpu"))
    found = []
    for weight in (0.5, 1.0, 1.5):
        changed = [*SMALL, *PAIRS, *SGD, NO_TERMS, f"game.adversarial_weight={weight}"]
        found.append(train(alone, load_config("digits", changed), steps=1))
    for name in [name for name in found[0] if name.startswith("generator/")]:
        least, more, most = (tensors[name] for tensors in found)
        torch.testing.assert_close(more - least, most - more, rtol=1e-6, atol=1e-12)
    assert not torch.equal(more, least)


NETWORKS = {
    "latents for a network of fields": (
        ["images", 'model.generator={name="unet", width=4}'],
        "model.generator.name",
    ),
    "fields for a network of latents": (
        ["pairs", *TRANSLATION, 'model.generator={name="residual", width=4}'],
        "model.generator.name",
    ),
    "fields for a vocoder of latents": (
        ["clips", *VOCODER, 'model.generator={name="wavegan"}'],
        "model.generator.name",
    ),
    "images for a vocoder": (
        ["pairs", *TRANSLATION, 'model.generator={name="hifigan"}'],
        "model.generator.name",
    ),
    "spectrograms for images": (
        ["clips", *VOCODER, 'model.generator={name="unet", width=4}'],
        "model",
    ),
    "too narrow": (["clips", *VOCODER, "model.generator.width=2"], "model.generator.width"),
    "groups": (
        ["clips", *VOCODER, "model.discriminator.scales=1", "model.discriminator.scale_width=8"],
        "model.discriminator.scale_width",
    ),
    "no part": (
        ["clips", *VOCODER, "model.discriminator.periods=[]"],
        "model.discriminator.periods",
    ),
    "long period": (
        ["clips", *VOCODER, "model.discriminator.periods=[256]"],
        "model.discriminator.periods",
    ),
    "many layers": (
        ["pairs", *TRANSLATION, "model.discriminator.layers=3"],
        "model.discriminator.layers",
    ),
    "many scales": (
        ["pairs", *TRANSLATION, "model.discriminator.scales=3"],
        "model.discriminator.scales",
    ),
    "no width": (["pairs", *TRANSLATION, "model.generator.width=0"], "model.generator.width"),
    "one pixel": (["pairs", *TRANSLATION, "game.task.crop=1"], "model.generator.name"),
    "normalized twice": (
        ["clips", *VOCODER, 'model.spectral_norm=["generator"]'],
        "model.spectral_norm",
    ),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_networks_that_do_not_fit_are_refused(case, data):
    (name, *overrides), subject = NETWORKS[case]
    with refused(ConfigError, subject):
        checked(data, name, *overrides)


@pytest.mark.parametrize("overrides", [["period", 255], ["scales", 2]])
def test_the_smallest_networks_that_fit_work(overrides, data):
    key, value = overrides
    if key == "period":
        checked(data, "clips", *VOCODER, f"model.discriminator.periods=[{value}]")
    else:
        checked(data, "pairs", *TRANSLATION, f"model.discriminator.scales={value}")


@pytest.mark.parametrize("name", ["unet", "patchgan", "hifigan"])
def test_labels_are_refused_by_networks_without_labels(name):
    shape = (1, 64) if name == "hifigan" else (1, 16, 16)
    inputs = ((4, 4),) if name == "hifigan" else (shape,)
    for registry, more in ((generators, {"input_shapes": inputs}), (discriminators, {})):
        if name in registry.names():
            with refused(ConfigError, "model.conditional"):
                registry[name](sample_shape=shape, num_classes=2, **more)


def test_a_message_names_only_some_of_many_fields():
    fields = Record({f"field{i}": torch.zeros(1) for i in range(10_000)})
    with refused(ConfigError, "game.task") as caught:
        fields["input"]
    assert len(str(caught.value)) < 500


TASKS = {
    "task of audio": (["images", 'game.task={name="vocoder"}'], "game.task"),
    "term of audio": (
        ["pairs", *TRANSLATION, "game.terms={log_mel={weight=1.0}}"],
        "game.terms.log_mel",
    ),
    "odd window": (["clips", *VOCODER, "game.task.window=65"], "game.task.window"),
    "short window": (["clips", *VOCODER, "game.task.window=8"], "game.task.window"),
    "above half the rate": (["clips", *VOCODER, "game.task.highest=4001.0"], "game.task.highest"),
    "empty bands": (["clips", *VOCODER, "game.task.bands=33"], "game.task.bands"),
    "empty bands of a term": (
        ["clips", *VOCODER, "game.terms.log_mel.bands=37"],
        "game.terms.log_mel.bands",
    ),
    "gain of one number": (["clips", *VOCODER, "game.task.gain=[3.0]"], "game.task.gain"),
    "gain in the wrong order": (
        ["clips", *VOCODER, "game.task.gain=[3.0, -9.0]"],
        "game.task.gain",
    ),
    "gain that is infinite": (
        ["clips", *VOCODER, "game.task.gain=[-inf, 0.0]"],
        "game.task.gain.0",
    ),
    "window beyond the crop": (["clips", *VOCODER, "game.task.window=4096"], "game.task"),
    "stereo": (["stereo", *VOCODER], "game.task"),
    "another size": (
        ["images", *TRANSLATION, "data.unpaired.input={{url='{images}', resolution=8}}"],
        "game.task",
    ),
    "another kind": (
        ["images", *TRANSLATION, "data.unpaired.input.url='{clips}'"],
        "game.task",
    ),
    "term of an input": (
        ["pairs", *TRANSLATION, 'game.terms.l1.field="input"'],
        "game.terms.l1",
    ),
    "term of images": (
        ["pairs", *TRANSLATION, "game.terms={log_mel={weight=1.0, sample_rate=8000}}"],
        "game.terms.log_mel",
    ),
    "name of a term": (
        ["pairs", *TRANSLATION, 'game.terms={"../x"={weight=1.0, term="l1"}}'],
        "game.terms.../x",
    ),
    "no loss": (
        ["pairs", *TRANSLATION, "game.terms={}", "game.adversarial_weight=0.0"],
        "game.adversarial_weight",
    ),
}


@pytest.mark.parametrize("case", TASKS)
def test_options_of_tasks_and_terms_that_do_not_fit_are_refused(case, data):
    (name, *overrides), subject = TASKS[case]
    places = {each: data / each for each in ("images", "clips")}
    with refused(ConfigError, subject):
        checked(
            data,
            name,
            *(each.format(**places) if "url" in each else each for each in overrides),
        )
