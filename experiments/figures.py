"""Figures and tables as data, the paper's and more: their curves, runs, and the paper's numbers.

Smith, Kindermans, Ying and Le, "Don't Decay the Learning Rate, Increase the Batch Size", ICLR 2018.
A curve names a preset that the config files of all scales have under one name. A figure also names
the functions that draw it and make its tables, so a new figure is one entry of FIGURES. Points read
off the paper's plots are in digitised.py.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from bigbatch import config_files
from bigbatch.config import check, make_phases
from bigbatch.schedule import Phase

REPOSITORY = Path(__file__).parents[1]


class Curve(NamedTuple):
    """One line of a figure, or one row of a table."""

    label: str
    config: str  # preset,key=value of the family's config file
    plotted: tuple[str, ...] = ()  # the paper's runs of it, as digitised.csv names them
    updates: str = ""  # as the paper states them, if it does
    finals: tuple[float, ...] = ()  # the paper's final accuracies, where it states them
    # How its final value compares with the first curve's in the paper: same, lower, "" (no claim).
    claim: str = ""
    # The median of five more runs of the paper's, from memory; see paper/README.md.
    median: float | None = None
    took: str = ""  # wall-clock time, as the paper states it


class Panel(NamedTuple):
    """One pair of axes."""

    name: str  # "3b"; "5" where the figure has one only
    title: str
    quantity: str  # train_loss, test_accuracy or test_loss
    axis: str  # epoch, token or update
    family: str  # the config file at the paper's scale
    curves: tuple[Curve, ...]
    # Where all the paper's curves end, read off its plot: shown for curves whose ends are hidden
    # under others and not in digitised.csv.
    ends: str = "not given"
    scale: str = "linear"  # of the quantity's axis


class Figure(NamedTuple):
    """A figure or table, with the claim it makes.

    Its functions are named by dotted path, because their modules import this one and matplotlib.
    Each is called with the figure, the scale's name and the runs that the figure shows.
    """

    name: str
    title: str
    claim: str
    panels: tuple[Panel, ...]
    draw: str = "experiments.drawing.curves"
    tables: str = "experiments.tables.of_curves"
    trained: bool = True  # whether it shows runs, and not schedules alone
    summed_up: bool = True  # whether the table over all figures has its accuracies
    papers: bool = True  # whether it is the paper's; "all" asks for these


class Scale(NamedTuple):
    """A size at which figures can be reproduced."""

    files: dict[str, str]  # config file by family
    settings: str  # after the curve's own
    margins: dict[str, float]  # two schedules within it, by quantity, are called the same
    comparable: bool  # whether the paper's numbers are about the same task
    says: str  # what a reader of its results must know
    panels: tuple[str, ...] = ()  # the names of the panels that it has; () for all


FAMILIES = ("cifar10", "imagenet_inception_resnet_v2", "imagenet_resnet50")  # the paper's
CIFAR10, INCEPTION, RESNET_50 = FAMILIES
LANGUAGE = "language"
SMALL_MARGINS = {"test_accuracy": 0.015, "train_loss": 0.05}
SCALES = {
    "paper": Scale(
        {family: f"configs/{family}.py" for family in FAMILIES}, "dtype=bfloat16",
        {"test_accuracy": 0.005, "train_loss": 0.02}, True,
        "The paper's own recipes, networks and data, computed in bfloat16 with parameters, batch "
        "statistics and the optimizer in float32.",
    ),
    "medium": Scale(
        {CIFAR10: "configs/medium.py"}, "", SMALL_MARGINS, False,
        "A narrow Wide ResNet 10-1 on all 50 000 CIFAR-10 images, for 30 of the paper's 204.8 "
        "epochs, with its batches, learning rates, weight decay and ghost batches, and the noise "
        "falling at the same fractions of training. Accuracies are below the paper's; batches, "
        "noise scales and updates an epoch are the paper's own.",
        ("1", "2a", "2b", "3a", "5"),
    ),
    "small": Scale(
        dict.fromkeys(FAMILIES, "configs/small.py"), "", SMALL_MARGINS, False,
        "A narrow Wide ResNet 10-1 on 5 120 CIFAR-10 images at half resolution, for about a tenth "
        "of the paper's epochs (a fifth for Figures 6, 7 and the 30 minutes), with the noise "
        "falling at the same fractions of training. Accuracies are not the paper's and far below "
        "them; batches, updates and noise scales stand in its ratios.",
    ),
    "bytes": Scale(
        {LANGUAGE: "configs/language.py"}, "", {"test_loss": 0.01}, False,
        "A transformer of 133 440 parameters on the bytes of Python's standard library: 32 768 "
        "sequences of 64 bytes, AdamW with decoupled weight decay, and a cosine after a warm-up. "
        "Batches grow from 8 to 128 sequences.",
    ),
    "digits": Scale(
        dict.fromkeys(FAMILIES, "configs/small.py"), "data=digits", SMALL_MARGINS, False,
        "A narrow Wide ResNet 10-1 on scikit-learn's 8x8 digits: the quickest, and without any "
        "download. Accuracies are not the paper's; batches, updates and noise scales stand in its "
        "ratios.",
    ),
}


def _schedules(optimizer: str, claim: str = "same") -> tuple[Curve, ...]:
    """The three schedules of Figures 1 to 4."""
    option = "" if optimizer == "momentum" else f",optimizer={optimizer}"
    return (
        Curve("decaying learning rate", "decay" + option, ("decaying_lr",), "about 80,000"),
        Curve("hybrid", "hybrid" + option, ("hybrid",), claim=claim),
        Curve("increasing batch size", "increase" + option, ("increasing_batch",), claim=claim),
    )


MOMENTUM = _schedules("momentum")
FIGURE_5 = (
    Curve("original schedule", "decay", ("original",), "about 80,000", (0.943,), median=0.943),
    Curve("increasing batch size", "figure5_increasing_batch", ("increasing_batch",),
          "about 29,000", (0.944,), "same", 0.942),
    Curve("+ increased initial learning rate", "figure5_increased_lr", ("increased_lr",),
          "under 6,500", (0.945,), "same", 0.942),
    Curve("+ increased momentum coefficient", "figure5_increased_momentum", (),
          "under 2,500", (0.933,), "lower", 0.935),
)
FIGURE_6 = (
    Curve("decaying learning rate", "figure6_decay", ("decaying_lr run1", "decaying_lr run2"),
          "just over 14,000", (0.787, 0.778)),
    Curve("increasing batch size", "figure6_increase",
          ("increasing_batch run1", "increasing_batch run2"), "below 6,000", (0.781, 0.768),
          "same"),
)
FIGURE_7 = (
    Curve("momentum 0.9", "figure7_momentum_0.9", ("momentum 0.9",), "", (0.788,)),
    Curve("momentum 0.95", "figure7_momentum_0.95", ("momentum 0.95 run1", "momentum 0.95 run2"),
          "under 3,500", (0.781, 0.778), "lower"),
    Curve("momentum 0.975", "figure7_momentum_0.975",
          ("momentum 0.975 run1", "momentum 0.975 run2"), "under 2,500", (0.775, 0.768), "lower"),
)
THIRTY_MINUTES = (
    Curve("8k batches", "batch_8k", finals=(0.761,), took="under 45 min"),
    Curve("8k, then 16k batches: 30 minutes", "thirty_minutes", finals=(0.761,), claim="same",
          took="under 30 min"),
    Curve("16k batches, doubled learning rate", "batch_16k", finals=(0.750,), claim="lower",
          took="22 min"),
)
# The claims of the paper's appendices are given from memory.
# Appendix A: the batch is in proportion to 1/(1-m) and nothing else changes, at a rate so low that
# no momentum makes training unstable. Logs are frequent, because lost epochs are read off the loss.
MOMENTA = (0.9, 0.95, 0.98, 0.99, 0.995)
LOST_EPOCHS = tuple(
    Curve(f"m = {momentum}", "decay,strategy=constant,recipe.epochs=20.48,"
          "recipe.learning_rate=0.004,log_every_epochs=0.0125"
          + f",scale_up.momentum={momentum}" * (momentum != 0.9))
    for momentum in MOMENTA
)
RATES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
INITIAL_RATES = tuple(
    Curve(f"rate {rate}", "decay" + f",recipe.learning_rate={rate}" * (rate != 0.1))
    for rate in RATES
)
# Beyond the paper.
COSINE = (
    Curve("decaying learning rate", "decay,curve=cosine"),
    Curve("hybrid", "hybrid,curve=cosine"),
    Curve("increasing batch size", "increase,curve=cosine,limits.growth=1.25"),
)
EXCHANGES = (
    Curve("Adam, decaying learning rate", "decay,optimizer=adam_by_sqrt"),
    *(Curve(f"Adam, increasing batch size, {exchange}",
            f"increase,optimizer=adam_by_sqrt,exchange={exchange}")
      for exchange in ("sqrt", "linear", "none")),
)
GROWING = "bytes,strategy=increase"
LANGUAGE_CURVES = (
    Curve("decaying learning rate", "bytes,strategy=decay"),
    Curve("growing: sqrt, betas and decay fixed",
          f"{GROWING},per_example.momentum=false,per_example.beta2=false,"
          "per_example.weight_decay=false"),
    Curve("growing: sqrt, all per example", GROWING),
    Curve("growing: linear", f"{GROWING},exchange=linear"),
    Curve("growing: none", f"{GROWING},exchange=none"),
)
# How often the noise is measured, and over how many ghost batches.
MEASURED = ",noise.every_epochs={},noise.ghosts={}"
NOISE = tuple(
    Curve(label, preset + MEASURED.format(0.512, 64))
    for label, preset in (("decaying learning rate", "decay"),
                          ("increasing batch size", "increase")))
LANGUAGE_NOISE = tuple(
    Curve(label, f"bytes,strategy={strategy}" + MEASURED.format(0.02, 32))
    for label, strategy in (("decaying learning rate", "decay"),
                            ("growing: sqrt, all per example", "increase")))


FIGURES = {figure.name: figure for figure in (
    Figure(
        "1", "Three schedules of one noise scale",
        "Decaying the rate, growing the batch and a mixture: the same noise at every epoch.",
        (Panel("1", "schedules", "", "epoch", CIFAR10, MOMENTUM),),
        "experiments.drawing.schedules", trained=False,
    ),
    Figure(
        "2", "Training loss, SGD with momentum",
        "At equal epochs the three schedules' training losses are one curve; against updates they "
        "part.",
        (Panel("2a", "(a)", "train_loss", "epoch", CIFAR10, MOMENTUM, "~0.077"),
         Panel("2b", "(b)", "train_loss", "update", CIFAR10, MOMENTUM, "~0.077")),
    ),
    Figure(
        "3", "Test accuracy, SGD with momentum and Nesterov momentum",
        "The three schedules' test accuracies are one curve.",
        (Panel("3a", "(a) momentum", "test_accuracy", "epoch", CIFAR10, MOMENTUM,
               "~94.25 to 94.5 %"),
         Panel("3b", "(b) Nesterov momentum", "test_accuracy", "epoch", CIFAR10,
               _schedules("nesterov"), "~94.3 to 94.5 %")),
    ),
    Figure(
        "4", "Test accuracy, vanilla SGD and Adam",
        "The same holds for vanilla SGD; with Adam the curves part a little.",
        (Panel("4a", "(a) vanilla SGD", "test_accuracy", "epoch", CIFAR10, _schedules("sgd"),
               "~93.4 to 93.65 %"),
         Panel("4b", "(b) Adam", "test_accuracy", "epoch", CIFAR10, _schedules("adam", ""),
               "~92.8 to 93.1 %")),
    ),
    Figure(
        "5", "Test accuracy against parameter updates",
        "Growing the batch, then also the first rate and the momentum: about 30 times fewer "
        "updates, at little cost until the momentum grows.",
        (Panel("5", "", "test_accuracy", "update", CIFAR10, FIGURE_5),),
    ),
    Figure(
        "6", "ImageNet, Inception-ResNet-V2: decaying rate or growing batch",
        "The same accuracy at equal epochs, in well under half the updates.",
        (Panel("6a", "(a)", "test_accuracy", "epoch", INCEPTION, FIGURE_6),
         Panel("6b", "(b)", "test_accuracy", "update", INCEPTION, FIGURE_6)),
    ),
    Figure(
        "7", "ImageNet, Inception-ResNet-V2: rising momentum and first batch",
        "Under 2 500 updates, at a small cost in accuracy.",
        (Panel("7a", "(a)", "test_accuracy", "epoch", INCEPTION, FIGURE_7),
         Panel("7b", "(b)", "test_accuracy", "update", INCEPTION, FIGURE_7)),
    ),
    Figure(
        "A", "Appendix A: epochs lost to momentum",
        "Filling the accumulator costs up to B/(N(1-m)) epochs, which grow as 1/(1-m)² where B "
        "grows with 1/(1-m).",
        (Panel("A", "", "train_loss", "epoch", CIFAR10, LOST_EPOCHS),),
        "experiments.drawing.lost_epochs", "experiments.tables.of_lost_epochs",
    ),
    Figure(
        "B", "Appendix B: the initial learning rate",
        "At a constant batch the final accuracy falls once the first rate is over about 0.4.",
        (Panel("B", "", "test_accuracy", "epoch", CIFAR10, INITIAL_RATES),),
        "experiments.drawing.initial_rate", summed_up=False,
    ),
    Figure(
        "30min", "ImageNet, ResNet-50 in 30 minutes (section 5.4)",
        "Doubling the batch at the first fall costs nothing; doubling it and the rate from the "
        "start costs a point.",
        (Panel("30min", "", "test_accuracy", "update", RESNET_50, THIRTY_MINUTES),),
    ),
    Figure(
        "cosine", "A cosine in the place of falls",
        "Under a smooth curve too, three schedules of one noise end alike.",
        (Panel("cosine a", "(a)", "test_accuracy", "epoch", CIFAR10, COSINE, ""),
         Panel("cosine b", "(b)", "test_accuracy", "update", CIFAR10, COSINE, "")), papers=False,
    ),
    Figure(
        "exchange", "Adam: which rate goes with a larger batch",
        "Batches grow alike; the rate is multiplied by their growth, by its square root, or not at "
        "all.",
        (Panel("exchange", "", "test_accuracy", "epoch", CIFAR10, EXCHANGES, ""),), papers=False,
    ),
    Figure(
        "language", "A language model: AdamW under a cosine",
        "Batches grow alike; the rate goes with them by one rule or another, and betas and decay "
        "are kept per example or are left as they are.",
        (Panel("language a", "(a)", "test_loss", "token", LANGUAGE, LANGUAGE_CURVES, ""),
         Panel("language b", "(b)", "test_loss", "update", LANGUAGE, LANGUAGE_CURVES, "")),
        papers=False,
    ),
    *(Figure(
        name, "The noise of the gradient, measured, beside the batch",
        "A batch below the measured noise scale makes steps of noise, and one above it repeats "
        "what it knows.",
        (Panel(name, "", "noise_full", "epoch", family, lines, ""),),
        "experiments.noise.draw", "experiments.noise.tables", summed_up=False, papers=False,
    ) for name, family, lines in (("noise", CIFAR10, NOISE),
                                  ("noise_language", LANGUAGE, LANGUAGE_NOISE))),
    Figure(
        "demo_language", "A language model: AdamW under a cosine",
        "A batch that grows by Adam's rule ends with the loss of a rate that falls.",
        tuple(Panel(f"demo_language {name}", "", "test_loss", axis, LANGUAGE,
                    (LANGUAGE_CURVES[0], LANGUAGE_CURVES[2]), "")
              for name, axis in (("a", "token"), ("b", "update"))),
        papers=False,
    ),
)}


def of_schedules(
    names: Sequence[str], title: str, judged_by: str = "test_accuracy"
) -> Figure:
    """A figure of a user's runs: training loss and a quantity of the test set (see
    `logs.judged_by`), against epochs and against updates."""
    lines = tuple(Curve(name, name) for name in names)
    return Figure("", title, "", tuple(
        Panel("", "", quantity, axis, "", lines, scale=scale)
        for quantity, scale in (("train_loss", "log"), (judged_by, "linear"))
        for axis in ("epoch", "update")
    ))


# The longest runs come first, so that no core is idle at the end.
DEMO = of_schedules(("decay", "hybrid", "increase"), "digits: one recipe, three schedules")


def config_text(scale: str, panel: Panel, curve: Curve, seed: int) -> str:
    """The value of --config for a run of `curve`: file.py:preset,key=value,..."""
    settings = SCALES[scale].settings
    return (f"{SCALES[scale].files[panel.family]}:{curve.config}"
            + f",{settings}" * bool(settings) + f",seed={seed}")


def load_config(text: str) -> ConfigDict:
    """The config of a `config_text`."""
    return config_files.load_config(text, REPOSITORY)


@functools.cache
def planned(text: str) -> tuple[ConfigDict, tuple[Phase, ...]]:
    """The config of a `config_text`, checked, and its phases. Cached, so not to be changed.

    Raises:
        Mistake: if no run can have this config.
    """
    config = load_config(text)
    check(config)
    return config, tuple(make_phases(config))
