"""What the programs of a config need on slices of TPU or GPUs, by compiling them for these."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from bigbatch import schedule
from bigbatch.config import evaluations, make_layouts, noise_layout
from bigbatch.data import feed
from bigbatch.job.chips import GIB, GPUS, TPUS
from bigbatch.mistake import Mistake
from bigbatch.planning import compiled, topology
from bigbatch.planning.compiled import Measured
from bigbatch.programs import lowering
from bigbatch.programs.compilation import (
    EVALUATE,
    Kind,
    Program,
    measuring_programs,
    programs_of,
)
from bigbatch.schedule import Phase
from bigbatch.schedule.layout import Layout, make_layout
from bigbatch.tasks import contract
from bigbatch.update import network, update

SPLITS = ("optimizer", "parameters")  # keys of config.sharding, from the least split on


def parse(text: str, phases: Sequence[Phase]) -> list[topology.Slice]:
    """The slice of each phase, by the text of --topology.

    Args:
        text: "slice", or "slice,phase=slice,...", where each slice is used from its phase on.
        phases: of the config.

    Raises:
        Mistake: if `text` has another form, or names an unknown slice or phase.
    """
    first, *changes = text.split(",")
    slices = [topology.parse(first)] * len(phases)
    for change in changes:
        name, separator, slice_name = change.partition("=")
        if not separator:
            raise Mistake(
                f"--topology has {change!r} after its first slice; write the phase from which it "
                f"is used, for example {phases[-1].name}={change}."
            )
        start = schedule.find_phase(phases, name, "--topology").index
        slices[start:] = [topology.parse(slice_name)] * (len(phases) - start)
    return slices


def compile_for(
    config: ConfigDict, phases: Sequence[Phase], slices: Sequence[topology.Slice],
    folder: Path | None, show: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Compiles the programs of each phase and of the evaluation for their slices.

    Args:
        config: see `config.base_config`.
        phases: of the config.
        slices: one for each phase.
        folder: see `compiled.measure`.
        show: called with the name of each program before it is compiled, which can take minutes.

    Returns:
        `phases`: for each phase what `_Compiler._describe` returns for an update. `evaluations`:
        for each slice the same for one evaluation, with `slice` and their `count`. `measurements`:
        the same for those of the noise scale; [] if there are none. `states`: for each slice the
        bytes of the state on a device, as `_Compiler.state_bytes`.
        `seconds_at_least` and `chip_hours_at_least` of the run, by the compiler's estimates, or
        None if it made none. `fits`: whether all programs fit. `compiler`: its version.

    Raises:
        Mistake: if the TPU compiler is not installed, or does not know a slice.
    """
    with jax.enable_x64(config.dtype == "float64"):
        layouts = [make_layouts(config, [phase], found.devices)[0]
                    for phase, found in zip(phases, slices, strict=True)]
        net = network.build(config)
        on = {
            found: _Compiler(
                config, net, found, folder, show, accumulates=any(
                    layout.microbatches > 1 or noise_layout(config, found.devices)
                    for layout, other in zip(layouts, slices, strict=True) if other == found))
            for found in dict.fromkeys(slices)
        }
        rows = [on[found].describe(layout)
                for layout, found in zip(layouts, slices, strict=True)]
        tested = [
            {"slice": found.name, "count": _count(
                config, phases, [other == found for other in slices], "eval_every_epochs"),
             **compiler.describe_evaluation()}
            for found, compiler in on.items()
        ]
        measured = [
            {"slice": found.name, "count": _count(
                config, phases, [other == found for other in slices], "noise.every_epochs"),
             **compiler.describe_measurement(noise_layout(config, found.devices))}
            for found, compiler in on.items() if noise_layout(config, found.devices)
        ]
    seconds, chip_seconds = 0.0, 0.0
    for times, row, found in [
        *((phase.updates, row, found)
          for phase, row, found in zip(phases, rows, slices, strict=True)),
        *((one["count"], one, found) for one, found in zip(tested, on, strict=True)),
        *((one["count"], one, found) for one, found in zip(measured, on, strict=False)),
    ]:
        if row["seconds"] is None:
            seconds = None
            break
        seconds += times * row["seconds"]
        chip_seconds += times * row["seconds"] * found.chips
    return {
        "phases": rows,
        "evaluations": tested,
        "measurements": measured,
        "states": {found.name: compiler.state_bytes() for found, compiler in on.items()},
        "seconds_at_least": seconds,
        "chip_hours_at_least": None if seconds is None else chip_seconds / 3600,
        "fits": all(row["fits"] for row in rows + tested + measured),
        "compiler": compiled.version(on[slices[0]].mesh),
    }


class _Compiler:
    """The compiler of one slice for one config."""

    def __init__(
        self, config: ConfigDict, net: network.Network, found: topology.Slice,
        folder: Path | None, show: Callable[[str], None], accumulates: bool,
    ):
        """`accumulates`: whether any phase on this slice takes several passes. `found` is the
        slice, and the other arguments are those of `compile_for`.
        """
        self.config, self.net, self.slice = config, net, found
        self.folder, self.show, self.accumulates = folder, show, accumulates
        self.mesh = topology.make_mesh(found, config.sharding.shards)
        self.state = update.abstract_state(config, self.net, self.mesh)
        self.fields = contract.fields_of(config, contract.task_of(config))
        self.resident, self.test = feed.resident_shapes(config, self.fields, self.mesh)
        self.known: dict[Program, Measured] = {}

    def measure(self, program: Program) -> Measured:
        """What the compiler says of a program; each is compiled once."""
        if program not in self.known:
            self.show(f"{self.slice.name}: {program}")
            # A pass over whole parameters has no communication, so its program is the same on all
            # slices of one kind. It is compiled for one host, and `folder` then has it for all.
            config, mesh, shapes = self.config, self.mesh, (self.state, self.resident, self.test)
            if program.kind is Kind.ACCUMULATE and not config.sharding.parameters:
                mesh = topology.make_mesh(self.slice.one_host)
                config = _split(config, "")  # a pass reads no more than the parameters
                config.sharding.shards = 0
                shapes = (update.abstract_state(config, self.net, mesh),
                          *feed.resident_shapes(config, self.fields, mesh))
            lower = lowering.lowering(config, self.net, mesh, *shapes)
            self.known[program] = compiled.measure(
                lower(program), self.slice.kind, mesh, self.folder, config.deterministic)
        return self.known[program]

    def memory(self, program: Program) -> int:
        """The bytes on a device while a program runs: its own, and the other arrays of the run."""
        measured = self.measure(program)
        kind, beside = program.kind, 0
        if kind in (Kind.EVALUATE, Kind.ACCUMULATE):  # of the state they read the parameters only
            beside += _bytes((self.state.opt_state, self.state.average))
        if kind is Kind.EVALUATE:
            beside += _bytes(self.resident)
            if self.state.average and self.splits_optimizer_alone:  # gathered to be evaluated
                beside += _bytes(self.state.params)
        else:
            beside += _bytes(self.test)
        if kind in (Kind.APPLY, Kind.MEASURE):
            beside += _bytes(self.resident)
        if kind is Kind.MEASURE:
            beside += _bytes(self.state)
        if kind in (Kind.UPDATE, Kind.EVALUATE) and self.accumulates:
            beside += self._bytes_of_sums()
        if kind in (Kind.UPDATE, Kind.ACCUMULATE):  # the next microbatch is on the device already
            shapes = feed.update_shapes(self.config, self.fields, self.mesh, program.slots)
            beside += _bytes(shapes)
        return measured.argument_bytes + measured.extra_bytes + beside

    @property
    def splits_optimizer_alone(self) -> bool:
        """Whether the optimizer's state is split, and the parameters are not."""
        return self.config.sharding.optimizer and not self.config.sharding.parameters

    def state_bytes(self) -> dict[str, int]:
        """What a device holds of the state between updates, if nothing is split and for each key of
        `config.sharding` that splits it.
        """
        return {key: _bytes(update.abstract_state(_split(self.config, key), self.net, self.mesh))
                for key in ("", *SPLITS)}

    def fits(self, program: Program) -> bool:
        """Whether a program and the other arrays of the run fit into a device's memory."""
        return self.measure(program).fits and self.memory(program) <= self.slice.kind.memory_bytes

    def describe(self, layout: Layout) -> dict[str, Any]:
        """`_describe` for an update with this layout, and `advice` if it does not fit."""
        programs = programs_of(layout)
        times = [layout.microbatches if program.kind is Kind.ACCUMULATE else 1
                 for program in programs]
        described = self._describe(programs, times)
        if not described["fits"]:
            described["advice"] = self._advice(layout)
        return described

    def describe_evaluation(self) -> dict[str, Any]:
        """`_describe` for one evaluation of the test set, and `advice` if it does not fit."""
        shapes = feed.evaluation_shapes(self.config, self.fields, self.mesh)
        rows = shapes["record"].shape[0]
        batches = -(-self.config.data.test_examples // rows)
        described = self._describe([EVALUATE], [batches])
        if not described["fits"]:
            described["advice"] = self._without_room() or (
                f"a --config.eval_batch_size below {rows // self.mesh.size} needs less")
        return described

    def describe_measurement(self, layout: Layout) -> dict[str, Any]:
        """`_describe` for one measurement of the noise scale, and `advice` if it does not fit."""
        described = self._describe(measuring_programs(layout), [layout.microbatches, 1])
        if not described["fits"]:
            described["advice"] = "a smaller ghost_size needs less, as each is a pass of its own"
        return described

    def _describe(self, programs: Sequence[Program], times: Sequence[int]) -> dict[str, Any]:
        """What a device needs to call each program the given number of times.

        Returns:
            `slice`, its `devices` and `chips`; `fits`, `memory_bytes` (the most at any time) and
            `memory_limit_bytes`; summed over all calls `flops`, `seconds` (the compiler's estimate,
            None if it made none; on GPUs a lower bound), `collectives` {kind: [how many, bytes]},
            `kernels` (see `compiled.Measured`) and `accessed_bytes`; `compile_seconds` of all
            programs, and their names, `programs`.
        """
        calls = [(self.measure(program), count)
                 for program, count in zip(programs, times, strict=True)]
        total: dict[str, list[int]] = {}
        for measured, count in calls:
            for kind, (number, size) in measured.collectives.items():
                before = total.get(kind, [0, 0])
                total[kind] = [before[0] + count * number, before[1] + count * size]
        known = all(measured.seconds is not None for measured, _ in calls)
        return {
            "slice": self.slice.name,
            "devices": self.slice.devices,
            "chips": self.slice.chips,
            "fits": all(map(self.fits, programs)),
            "memory_bytes": max(map(self.memory, programs)),
            "memory_limit_bytes": self.slice.kind.memory_bytes,
            "flops": sum(count * measured.flops for measured, count in calls),
            "seconds": (
                sum(count * measured.seconds for measured, count in calls) if known else None),
            "collectives": total,
            "kernels": sum(count * measured.kernels for measured, count in calls),
            "accessed_bytes": sum(count * measured.accessed_bytes for measured, count in calls),
            "compile_seconds": sum(measured.compile_seconds for measured, _ in calls),
            "programs": list(map(str, programs)),
        }

    def _advice(self, layout: Layout) -> str:
        """The smallest changes that make an update fit: more passes or a larger slice. Where these
        do not help, as where the state alone is too large: a split of it.
        """
        changes = [] if self._without_room() else self._smaller_parts(layout)
        if found := ", or ".join(changes) or self._split_that_fits(layout):
            return found
        ghost = self.config.ghost_size
        none = f"not even one ghost batch of {ghost} has room on a device"
        kinds = _kinds_with(max(map(self.memory, programs_of(layout))))
        if said := self._without_room():
            return f"{none}: {said}; {kinds}, or a smaller network, is needed"
        return (f"{none} beside the arrays that a run always keeps there: a --config.ghost_size "
                f"below {ghost} (batch statistics are then others), {kinds}, or a smaller network, "
                "is needed")

    def _split_that_fits(self, layout: Layout) -> str:
        """The least split of the state with which an update fits, if need be in more passes."""
        options = self.config.sharding
        for key in SPLITS:
            if options[key] or options.parameters or self.mesh.devices.size == 1:
                continue
            other = _Compiler(_split(self.config, key), self.net, self.slice, self.folder,
                              self.show, self.accumulates)
            setting = f"--config.sharding.{key}=True"
            if other._without_room():
                continue
            if all(map(other.fits, programs_of(layout))):
                return f"{setting} fits"
            if changes := other._smaller_parts(layout):
                return f"{setting} with {changes[0]}"
        return ""

    def _smaller_parts(self, layout: Layout) -> list[str]:
        """The changes that make an update fit by giving a device fewer examples at once."""
        ghost = self.config.ghost_size
        changes = []
        if slots := self._most_slots(Kind.ACCUMULATE, layout):
            passes = make_layout(
                layout.ghosts * ghost, ghost, layout.devices, slots * ghost, 0).microbatches
            setting = (f"--config.microbatches={passes}" if self.config.microbatches
                       else f"--config.max_per_device_batch={slots * ghost}")
            changes.append(f"{setting} fits ({passes} passes an update)")
        # With one pass on each device of the larger slice.
        if slots := self._most_slots(Kind.UPDATE, layout):
            changes.append(f"a slice of {-(-layout.ghosts // slots)} devices or more fits")
        return changes

    def _without_room(self) -> str:
        """What a run always keeps on a device, if that alone is too much for it; "" if not."""
        state, rest = _bytes(self.state), _bytes((self.resident, self.test))
        sums, limit = self._bytes_of_sums() * self.accumulates, self.slice.kind.memory_bytes
        if state + rest + sums <= limit:
            return ""
        parts = [f"{what} {_gib(size)} GiB" for what, size in (
            ("parameters and the optimizer's state take", state),
            ("the gradients that passes add up", sums), ("the data set", rest)) if size >= GIB / 20]
        if self.config.sharding.parameters:
            return (f"{', '.join(parts)} of each device's {_gib(limit)} GiB, so a smaller batch "
                    "does not help")
        return (f"{', '.join(parts)}, whole on each device of {_gib(limit)} GiB, so neither a "
                "smaller batch nor a larger slice of this kind helps")

    def _bytes_of_sums(self) -> int:
        return _bytes(update.abstract_sums(self.config, self.net, self.mesh))

    def _most_slots(self, kind: Kind, layout: Layout) -> int:
        """The most slots, fewer than those of `layout`, with which a program fits; 0 for none."""
        needed = max(map(self.memory, programs_of(layout)))
        # Starts from an estimate, memory in proportion to the slots, and then tries one by one.
        slots = min(layout.slots - 1,
                    layout.slots * self.slice.kind.memory_bytes // max(needed, 1))
        while slots > 0 and not self.fits(Program(kind, slots)):
            slots -= 1
        while 0 < slots < layout.slots - 1 and self.fits(Program(kind, slots + 1)):
            slots += 1
        return slots


def _count(
    config: ConfigDict, phases: Sequence[Phase], chosen: Sequence[bool], key: str
) -> int:
    """How often the interval `key` of a config is due in phases whose entry in `chosen` is True."""
    return sum(
        1 for phase, taken in zip(phases, chosen, strict=True) if taken
        for _ in evaluations(config, [phase], 0, phases[-1].end_example, key))


def _split(config: ConfigDict, key: str) -> ConfigDict:
    """The config with the split of the state that a key of `config.sharding` names; "" for none."""
    own = config.copy_and_resolve_references()
    own.sharding.update({name: name == key for name in SPLITS})
    return own


def _kinds_with(needed: int) -> str:
    """The kinds of device that have so many bytes of memory."""
    kinds = [f"{name} ({_gib(kind.memory_bytes)})" for name, kind in (TPUS | GPUS).items()
             if kind.memory_bytes >= needed]
    if not kinds:
        return f"a device with {_gib(needed)} GiB, which no known kind has"
    return f"a device with {_gib(needed)} GiB, as {', '.join(kinds)} have"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"


def _bytes(shapes: Mapping | Any) -> int:
    """The bytes that a device holds of these arrays."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(shapes))
