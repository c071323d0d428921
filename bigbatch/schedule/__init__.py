"""The schedule of a run: its phases, the order of its examples, and their layout on devices.

Pure Python and NumPy. Nothing here imports JAX, nor any other part of the package but `mistake`.
"""

from bigbatch.schedule.phases import (
    STRATEGIES,
    Limits,
    Phase,
    Recipe,
    exact_updates,
    find_phase,
    learning_rate_at,
    noise_scale,
    noise_scale_approximate,
    nominal_noise_scale,
    notes,
    phase_at,
    plan_phases,
    scale_up,
    spans,
)

__all__ = [
    "STRATEGIES", "Limits", "Phase", "Recipe", "exact_updates", "find_phase", "learning_rate_at",
    "noise_scale", "noise_scale_approximate", "nominal_noise_scale", "notes", "phase_at",
    "plan_phases", "scale_up", "spans",
]
