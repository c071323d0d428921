"""Configs: presets and settings from a text, what a config means, and what is refused."""

import json
import math

import numpy as np
import pytest
from ml_collections import ConfigDict, config_dict

from bigbatch.config import (
    base_config,
    check,
    from_argument,
    make_limits,
    make_phases,
    make_recipe,
    saved_config,
    set_from_text,
)
from bigbatch.mistake import Mistake
from tests.support import configs

PRESETS = {"first": {"seed": 1}, "second": {"seed": 2, "recipe.learning_rate": 0.5}}
OPTIONS = {"optimizer": {"adam": {"optimizer.name": "adam", "recipe.learning_rate": 0.001}}}


def config_of(argument):
    return from_argument(base_config(), argument, PRESETS, OPTIONS)


def test_the_argument_is_a_preset_and_settings_in_order():
    assert config_of("").seed == config_of("first").seed == 1
    second = config_of("second,recipe.batch_size=256, dtype=bfloat16")
    assert (second.seed, second.recipe.learning_rate) == (2, 0.5)
    assert (second.recipe.batch_size, second.dtype) == (256, "bfloat16")
    assert config_of("seed=7").seed == 7  # of the first preset
    assert config_of("second,seed=3,seed=4").seed == 4
    # An option is a family of settings, and a later setting goes over it.
    assert config_of("second,optimizer=adam").recipe.learning_rate == 0.001
    assert config_of("optimizer=adam,recipe.learning_rate=1").recipe.learning_rate == 1.0


@pytest.mark.parametrize(("key", "text", "value"), (
    ("seed", "3", 3),
    ("recipe.learning_rate", "1", 1.0),
    ("recipe.learning_rate", "1e-3", 0.001),
    ("recipe.momentum", "0", 0.0),
    ("recipe.falls", "((60,5),(120,5))", ((60, 5), (120, 5))),
    ("recipe.falls", "((60,5),)", ((60, 5),)),
    ("recipe.falls", "[(60, 5), (120, 5)]", ((60, 5), (120, 5))),
    ("recipe.falls", "()", ()),
    ("data.mean", "(1.5,2,3)", (1.5, 2, 3)),
    ("data.augment.flip", "true", True),
    ("data.augment.flip", "False", False),
    ("data.dir", "", ""),
    ("data.dir", "gs://bucket/a,b=c", "gs://bucket/a,b=c"),
    ("limits.max_batch_size", "5120", 5120),
    ("limits.granularity", "None", None),
    ("noise.by_groups", "None", None),
    ("scale_up.momentum", "0.98", 0.98),
    ("scale_up.momentum", "0", 0.0),
))
def test_a_text_becomes_a_value_of_the_keys_type(key, text, value):
    config = base_config()
    set_from_text(config, key, text)
    *groups, name = key.split(".")
    for group in groups:
        config = config[group]
    assert config[name] == value
    assert type(config[name]) is type(value)


@pytest.mark.parametrize(("key", "text", "parts"), (
    ("seed", "x", ("config.seed takes a whole number", "it is 0", "'x'")),
    ("seed", "1.5", ("config.seed takes a whole number", "'1.5'")),
    ("seed", "true", ("whole number", "'true'")),
    ("seed", "", ("whole number", "''")),
    ("seed", "None", ("config.seed takes a whole number (", "'None'")),
    ("recipe.epochs", "nan", ("recipe.epochs takes a number", "'nan'")),
    ("recipe.epochs", "True", ("takes a number", "'True'")),
    ("recipe.epochs", "1e999 examples", ("takes a number", "'1e999 examples'")),
    ("recipe.learning_rate", str(10**400), ("recipe.learning_rate takes a number (it is 0.1)",)),
    ("recipe.epochs", "(1, 2)", ("takes a number",)),
    ("tensorboard", "1", ("true or false", "'1'")),
    ("recipe.falls", "60", ("a tuple in brackets", "'60'")),
    ("recipe.falls", "((60,5)", ("a tuple in brackets", "'((60,5)'")),
    ("limits.max_batch_size", "all", ("a whole number or None", "'all'")),
    ("limits.max_batch_size", "0.5", ("a whole number or None",)),
))
def test_a_text_of_another_type_is_refused(key, text, parts):
    config = base_config()
    with pytest.raises(ValueError) as refused:
        set_from_text(config, key, text)
    for part in parts:
        assert part in str(refused.value)
    assert config.to_json() == base_config().to_json(), "the refused value was set"


def test_a_limit_can_be_set_and_unset_again():
    config = base_config()
    for text, value in (("128", 128), ("None", None), ("256", 256)):
        set_from_text(config, "limits.max_batch_size", text)
        assert config.limits.max_batch_size == value
    digits = configs.load("digits", "increase,limits.max_batch_size=None")
    assert digits.limits.max_batch_size is None
    config.data.options.separator = 50_256  # as a config file sets a key of the user's own
    for text, value in (("None", None), ("3", 3)):
        set_from_text(config, "data.options.separator", text)
        assert config.data.options.separator == value


@pytest.mark.parametrize(("argument", "parts"), (
    ("frist", ("preset 'frist' is unknown", "first, second")),
    ("first,optimizer=adm", ("optimizer 'adm' is unknown", "adam")),
    ("first,sede=3", ("config.sede is unknown", "did you mean seed?", "recipe, scale_up, seed")),
    # The same name in another group is meant, not a near miss in this one (eval_batch_size).
    ("first,batch_size=3", ("did you mean recipe.batch_size?",)),
    ("first,learning_rate=3", ("did you mean recipe.learning_rate or scale_up.learning_rate?",)),
    ("first,recipe.batchsize=3", ("config.recipe has batch_size", "mean recipe.batch_size?")),
    ("first,recpie.epochs=3", ("config.recpie.epochs", "did you mean recipe.epochs?")),
    ("first,qqqq=3", ("config.qqqq is unknown; config has",)),
    ("first,recipe=3", ("config.recipe is a group", "recipe.batch_size", "recipe.falls")),
    ("first,data.augment=3", ("is a group", "data.augment.crop", "data.augment.pad")),
    ("first,seed.x=3", ("config.seed.x is unknown", "config.seed is a value, not a group")),
    ("first,data.root=/x", ("config.data.root is unknown; config.data has augment",
                            "A key for a loader of your own is config.data.options.root.")),
    ("first,data.stdd=(1,)", ("did you mean data.std?",)),
    ("first,data.options=3", ("is a group", "data.options.NAME")),
    ("first,optimizer.b1=3", ("A key for an optimizer of your own is config.optimizer.options.b1.",
                              )),
    ("first,data.options.a.b=3", ("config.data.options.a.b is unknown",)),
    ("first,data.options.no-name=3", ("config.data.options.no-name is unknown",)),
    ("first,model=3", ("config.model is a group", "it has none, as its config file gives")),
    ("first,model.depth=3", ("config.model.depth is unknown; config.model has no keys, as",)),
    ("first,optimizer=AdamW", ("optimizer 'AdamW' is unknown", "adam with config.optimizer.deco")),
    ("first,seed", ("'seed' is no setting", "key=value")),
    ("first,=3", ("config. is unknown",)),
))
def test_what_is_unknown_is_named_with_what_is_allowed(argument, parts):
    with pytest.raises(ValueError) as refused:
        config_of(argument)
    for part in parts:
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("text", "value"), (
    ("3", 3), ("0.5", 0.5), ("true", True), ("False", False), ("(1, 2)", (1, 2)), ("/a/b", "/a/b"),
    ("", ""), ("a b", "a b"), ("1e-3", 0.001), ("'3'", "3"),
))
def test_the_options_of_a_loader_are_whatever_is_set(text, value):
    config = config_of("second")
    set_from_text(config, "data.options.mine", text)
    assert config.data.options.mine == value and type(config.data.options.mine) is type(value)
    check(config)


def test_an_option_keeps_the_type_it_was_given_and_is_saved_with_the_run():
    config = base_config()
    config.data.options.root = "/here"
    config.data.options.share = 0.5
    config = from_argument(config, "first,data.options.share=1", {
        "first": {"data.options.folds": 5, "data.options.root": "/there"}})
    assert config.data.options.to_dict() == {"root": "/there", "share": 1.0, "folds": 5}
    with pytest.raises(Mistake, match="config.data.options.folds takes a whole number or None"):
        set_from_text(config, "data.options.folds", "many")
    saved = {"version": "x", "config": json.loads(config.to_json())}
    assert saved_config(saved).to_json() == config.to_json()
    del saved["config"]["data"]["options"]  # of an older run
    assert saved_config(saved).data.options.to_dict() == {}


def test_a_preset_of_a_family_may_not_name_an_unknown_key():
    with pytest.raises(ValueError, match="config.recipe.rate is unknown"):
        from_argument(base_config(), "", {"first": {"recipe.rate": 1.0}})


def test_a_familys_misspelt_key_is_an_error_and_not_one_more_key():
    with pytest.raises(AttributeError, match="lable_smoothing"):
        base_config().lable_smoothing = 0.1
    with pytest.raises(KeyError, match="learning_rat"):
        base_config().recipe.update({"learning_rat": 0.1})
    config = base_config()
    config.model.update({"depth": 10})  # the model's keys are its own
    assert from_argument(config, "model.depth=16", PRESETS).model.depth == 16
    with pytest.raises(ValueError, match="model.dpeth is unknown .did you mean model.depth?"):
        from_argument(config, "model.dpeth=16", PRESETS)


def test_a_key_without_a_type_asks_its_config_for_one():
    config = base_config()
    config.model = ConfigDict({"plain": None, "typed": config_dict.placeholder(int), "list": [1]})
    set_from_text(config, "model.typed", "3")
    set_from_text(config, "model.list", "[1, 2]")
    assert (config.model.typed, list(config.model.list)) == (3, [1, 2])
    with pytest.raises(ValueError, match="model.plain takes nothing until.*placeholder"):
        set_from_text(config, "model.plain", "3")
    with pytest.raises(ValueError, match="model.list takes a list in square brackets"):
        set_from_text(config, "model.list", "3")


def test_the_ghost_size_of_config_and_model_are_one_key():
    config = configs.load("cifar10", "increase,ghost_size=64")
    assert config.model.ghost_size == make_limits(config).ghost_size == 64


def test_a_recipe_is_the_configs_values_scaled_up():
    config = configs.load("cifar10", "figure5_increased_momentum,recipe.falls=[(60, 5)]")
    recipe = make_recipe(config)
    assert (recipe.learning_rate, recipe.batch_size, recipe.momentum) == (0.5, 3200, 0.98)
    assert (recipe.examples, recipe.epochs, recipe.falls) == (50_000, 204.8, ((60.0, 5.0),))
    # Only the rate; only the momentum; neither: 128 x 4, 128 x 0.1/0.05, 128.
    for argument, batch in (("scale_up.learning_rate=4", 512), ("scale_up.momentum=0.95", 256),
                            ("scale_up.momentum=0.9", 128)):
        config = configs.load("cifar10", f"increase,{argument}")
        assert make_recipe(config).batch_size == batch
    # Granularity holds for the scaled batch.
    with pytest.raises(ValueError, match="no multiple of 384"):
        make_recipe(configs.load("cifar10", "increase,limits.granularity=384,"
                                            "scale_up.learning_rate=2"))


def test_phases_obey_the_configs_limits_and_falls_by_batch():
    def batches(argument):
        return [phase.batch_size for phase in make_phases(configs.load("cifar10", argument))]

    assert batches("hybrid,hybrid_falls=2") == [128, 640, 3200, 3200]
    assert batches("increase,limits.max_batch_size=1280") == [128, 640, 1280, 1280]
    assert batches("increase,limits.granularity=384,recipe.batch_size=384") == [
        384, 1920, 9600, 48_000]


@pytest.mark.parametrize("falls", ("(60, 5)", "((60,),)", "((60, 5, 1),)", "('ab', 'cd')",
                                   "(('60', '5'),)", "((True, 5),)"))
def test_falls_that_are_no_pairs_are_refused(falls):
    with pytest.raises(ValueError, match="recipe.falls is .*pairs of .epoch, factor."):
        make_recipe(configs.load("cifar10", f"decay,recipe.falls={falls}"))


@pytest.mark.parametrize(("setting", "parts"), (
    ("dtype=float16", ("config.dtype is 'float16'", "float32, bfloat16, float64")),
    ("strategy=grow", ("config.strategy is 'grow'", "constant, decay, hybrid, increase")),
    ("optimizer.name=adamw", ("'adamw'", "AdamW is adam with config.optimizer.decoupled=True.")),
    ("optimizer.name=sgdm", ("'sgdm'", "nesterov, sgd, adam, or a dotted path")),
    ("optimizer.weight_decay_on=none", ("'none'", "all, no_norms, no_norms_or_biases")),
    ("seed=-1", ("config.seed is -1", "0 or more")),
    ("seed=4294967296", ("config.seed is 4294967296", "2**32")),
    ("ghost_size=0", ("config.ghost_size is 0", "1 or more")),
    ("microbatches=-1", ("config.microbatches is -1",)),
    ("max_per_device_batch=0", ("config.max_per_device_batch is 0",)),
    ("eval_batch_size=0", ("config.eval_batch_size is 0",)),
    ("keep_checkpoints=0", ("config.keep_checkpoints is 0",)),
    ("data.num_classes=0", ("config.data.num_classes is 0", "1 or more")),
    ("data.train_examples=0", ("config.data.train_examples is 0",)),
    ("data.train_examples=2147483648", ("train_examples is 2147483648", "below 2**31")),
    ("optimizer.weight_decay=-1", ("config.optimizer.weight_decay is -1.0", "0 or more")),
    ("optimizer.weight_decay=1e400", ("config.optimizer.weight_decay is inf", "finite")),
    ("optimizer.epsilon=0", ("config.optimizer.epsilon is 0.0", "over 0")),
    ("optimizer.clip_norm=-1", ("config.optimizer.clip_norm is -1.0", "0 or more")),
    ("ema=1", ("config.ema is 1.0", "[0, 1); 0 keeps no average")),
    ("optimizer.options.b1=0.9", ("options is {'b1': 0.9}", "only an optimizer named by a dotted")),
    ("optimizer.beta2=1", ("config.optimizer.beta2 is 1.0", "[0, 1)")),
    ("label_smoothing=1", ("config.label_smoothing is 1.0", "[0, 1)")),
    ("noise.every_epochs=0.5,noise.by_groups=false",
     ("config.noise.every_epochs is 0.5", "config.noise.by_groups is False")),
    # Not as the length of measured.every_epochs, which is 50 updates of it.
    ("recipe.batch_size=0", ("config.recipe.batch_size is 0; it must be 1 or more",)),
    (f"recipe.batch_size={10**400}", ("config.recipe.batch_size is 1000", "below 2**31")),
    ("log_every_epochs=0", ("config.log_every_epochs is 0.0", "over 0")),
    ("eval_every_epochs=-1", ("config.eval_every_epochs is -1.0",)),
    ("checkpoint_every_epochs=1e400", ("config.checkpoint_every_epochs is inf", "finite")),
    ("eval_every_epochs=1e308", ("config.eval_every_epochs is 1e+308", "finite")),
    ("scale_up.learning_rate=1e308", ("scale_up.learning_rate is 1e+308", "at most 1e+06")),
    ("recipe.warmup_epochs=1e308", ("recipe.warmup_epochs is 1e+308", "must end before")),
    ("recipe.falls=(('1e999 examples', 2),)", ("falls is (('1e999 examples', 2),)", "pairs of")),
    ("optimizer.name=sgd", ("momentum is 0.9", "'sgd'", "recipe.momentum=0")),
    ("scale_up.momentum=1", ("scale_up.momentum is 1.0", "[0, 1)")),
    ("recipe.momentum=1", ("recipe.momentum is 1.0", "[0, 1)")),
    ("optimizer=adam,scale_up.momentum=0.98", ("config.scale_up.momentum is 0.98", "Adam", "None")),
))
def test_a_value_of_no_use_is_refused_with_what_is_allowed(setting, parts):
    config = configs.load("cifar10", f"increase,{setting}")
    with pytest.raises(ValueError) as refused:
        check(config)
        make_phases(config)
    for part in parts:
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("setting", "parts"), (
    ("data.std=(1e999,)", ("config.data.std is (inf,)", "be finite numbers over 0")),
    ("data.std=(1,0)", ("config.data.std is (1, 0)", "over 0")),
    ("data.std=(1e39,)", ("finite",)),  # which float32 does not hold; nor this:
    ("data.std=(1e-46,)", ("over 0",)),
    ("data.std=('a',)", ("config.data.std is ('a',)", "numbers")),
    ("data.std=((1, 2),)", ("config.data.std is ((1, 2),)", "numbers")),
    ("data.std=(True,)", ("config.data.std is (True,)",)),
    ("data.mean=(1e999,)", ("config.data.mean is (inf,)", "be finite numbers.")),
    ("data.mean=(None,)", ("config.data.mean is (None,)", "be finite numbers.")),
))
def test_the_elements_of_tuples_are_checked_like_values(setting, parts):
    config = configs.load("cifar10", f"increase,{setting}")
    with pytest.raises(Mistake) as refused:
        check(config)
    for part in parts:
        assert part in str(refused.value)


@pytest.mark.parametrize(("key", "value", "parts"), (
    ("data.mean", (np.float32(125.3),) * 3, ("config.data.mean", "float32", ".tolist()")),
    ("recipe.falls", ((60, np.int64(5)),), ("config.recipe.falls", "int64")),
    ("model.widths", np.arange(3), ("config.model.widths", "ndarray")),
    ("model.activation", math.sqrt, ("config.model.activation", "dotted path")),
    ("model.parts", {1, 2}, ("config.model.parts", "set", "change its type")),
))
def test_a_value_that_no_file_can_hold_is_refused_by_its_key(key, value, parts):
    config = configs.load("cifar10", "increase")
    group, name = key.split(".")
    with config.unlocked():
        config[group][name] = value
    with pytest.raises(Mistake) as refused:
        check(config)
    for part in parts:
        assert part in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("key", ("label_smoothing", "optimizer.weight_decay", "optimizer.beta2",
                                 "eval_every_epochs", "recipe.momentum", "recipe.learning_rate"))
def test_no_value_may_be_nan(key):
    config = configs.load("cifar10", "increase")
    group = config[key.split(".")[0]] if "." in key else config
    group[key.split(".")[-1]] = math.nan
    with pytest.raises(ValueError, match=f"{key.split('.')[-1]} is nan"):
        check(config)
        make_phases(config)


def test_every_preset_and_optimizer_passes_the_check():
    for optimizer in ("momentum", "nesterov", "sgd", "adam"):
        for preset in ("decay", "hybrid", "increase"):
            check(configs.load("cifar10", f"{preset},optimizer={optimizer}"))
    for preset in ("figure5_increased_lr", "figure5_increased_momentum"):
        check(configs.load("cifar10", preset))
