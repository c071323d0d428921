"""Which figures, panels and curves a command line names."""

from collections.abc import Sequence

from bigbatch.mistake import Mistake
from experiments.figures import FIGURES, SCALES, Figure, Panel


def select(names: str, scale: str) -> list[Figure]:
    """The figures that `names` asks for, as "all", "3", "3b" or "2,5,A", with these panels only.

    "all" are the paper's.

    Raises:
        Mistake: if one of them does not exist at the scale; it names those that do.
    """
    there: dict[str, set[str]] = {}  # panels by all names that they go by
    papers = []  # those of these names that are the paper's
    for figure in FIGURES.values():
        for panel in figure.panels:
            has = panel.family in SCALES[scale].files
            if has and panel.name in (SCALES[scale].panels or [panel.name]):
                for name in (figure.name, panel.name):
                    there.setdefault(name, set()).add(panel.name)
                    papers += [name] * figure.papers
    asked = papers if names == "all" else list(filter(None, map(str.strip, names.split(","))))
    if unknown := [name for name in asked if name not in there]:
        raise Mistake(f"--figure names {unknown[0]!r}; at the scale {scale} there are "
                         f"{', '.join(there)}, or all.")
    if not asked:
        raise Mistake("--figure is empty; write for example --figure=3b, or all.")
    wanted = set().union(*(there[name] for name in asked))
    chosen = [
        figure._replace(panels=tuple(panel for panel in figure.panels if panel.name in wanted))
        for figure in FIGURES.values()
    ]
    return [figure for figure in chosen if figure.panels]


def only(chosen: Sequence[Figure], curves: Sequence[str]) -> list[Figure]:
    """Figures with no other curves than those that `curves` names, each as its Curve.config.

    The paper's claims are about a panel's first curve, and go where that is left out.

    Raises:
        Mistake: if one of them is in no figure; it names those that are.
    """
    there = dict.fromkeys(curve.config for figure in chosen for panel in figure.panels
                          for curve in panel.curves)
    if unknown := [name for name in curves if name not in there]:
        raise Mistake(f"--curve is {unknown[0]!r}; the curves of these figures are "
                      f"{'; '.join(there)}.")

    def left(panel: Panel) -> Panel:
        kept = [curve for curve in panel.curves if curve.config in curves]
        if panel.curves[0] not in kept:
            kept = [curve._replace(claim="") for curve in kept]
        return panel._replace(curves=tuple(kept))

    found = [figure._replace(panels=tuple(
        panel for panel in map(left, figure.panels) if panel.curves)) for figure in chosen]
    return [figure for figure in found if figure.panels]


def beside_updates(figure: Figure) -> Figure:
    """The figure with each panel against epochs or tokens also against updates, to its right.

    Raises:
        Mistake: if the figure is drawn otherwise than as curves.
    """
    if figure.draw != Figure._field_defaults["draw"]:
        raise Mistake(f"--against_updates draws curves, and figure {figure.name} has none that are "
                      "drawn against epochs alone; leave it out of --figure.")
    return figure._replace(panels=tuple(
        each for panel in figure.panels for each in (panel, panel._replace(
            name=f"{panel.name} against updates", title="the same against updates", axis="update"))
        [:1 if panel.axis == "update" else 2]))
