"""The schedule of a run: its phases, the order of its examples, and their layout on devices.

Pure Python (`order` and `layout` use NumPy). Nothing here imports JAX, nor any other part of the
package but `mistake`.
"""

from bigbatch.schedule.batches import Decisions, Strategy
from bigbatch.schedule.curves import CURVES, TAILS, name_of
from bigbatch.schedule.phases import (
    Phase,
    find_phase,
    phase_at,
    plan_phases,
    spans,
    take_rates,
)
from bigbatch.schedule.rates import (
    NoiseDiffers,
    Rates,
    check_noise,
    noise,
    noise_scale,
    noise_scale_approximate,
    rates_at,
    reference_rate,
    stated_noise,
)
from bigbatch.schedule.recipe import (
    EXCHANGES,
    MOST_EXAMPLES,
    STRATEGIES,
    Limits,
    PerExample,
    Recipe,
    pairs,
    scale_up,
    stated,
)
from bigbatch.schedule.table import Row, Table, make_table, row, rows, update_at
from bigbatch.schedule.worth import ceiling, exact_updates, notes

__all__ = [
    "CURVES", "EXCHANGES", "MOST_EXAMPLES", "STRATEGIES", "TAILS", "Decisions", "Limits",
    "NoiseDiffers", "PerExample", "Phase", "Rates", "Recipe", "Row", "Strategy", "Table", "ceiling",
    "check_noise", "exact_updates", "find_phase", "make_table", "name_of", "noise", "noise_scale",
    "noise_scale_approximate", "notes", "pairs", "phase_at", "plan_phases", "rates_at",
    "reference_rate", "row", "rows", "scale_up", "spans", "stated", "stated_noise", "take_rates",
    "update_at",
]
